"""Many clients at once, for minutes: no lost or corrupted answer, constant memory and threads.

    python -m tests.inference.serve.soak --seconds 300 --clients 32 [--model FOLDER] [--kind int8] [--threads 2]
    python -m tests.inference.serve.soak --seconds 300 --clients 32 --package --threads 2
    python -m tests.inference.serve.soak --seconds 20 --clients 16 --package --threads 2 --pairs 3

Starts `fedtune serve` and clients. Most of them stream, and some disconnect in the middle. Each answer must equal the answer to the same
request alone, and the text that a client has read before it disconnects must be its beginning. If torch runs a kind that rounds, requests
are greedy, and an answer may differ where the two best scores are closer than the rounding; such cases are counted separately.
`--pairs` compares one server with two at once that share the clients.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.export.edge import export_edge
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling
from tests.inference.serve.rounding import bound, first_difference, lead
from tests.inference.serve.servers import continuation, tiny_model

WARM = 0.2  # share of the time after which memory may not grow
ROOT = Path(__file__).parents[3]
BEGINNINGS = (
    "Once upon a time", "Lily and Tom", "One day, a little dog", "The sun was", "There was a big", "A girl named Sue", "turn on the light",
    "The cat and the bird", "Mom said", "In the park, the boys", "the kettle, please", "He was very",
)  # fmt: skip
MANY = 48  # different requests
BLOCKS = 48  # blocks of the pool, 16 tokens each


@dataclass
class Case:
    """A request and its answer without other requests."""

    ask: dict[str, Any]
    text: str = ""
    end: str | None = None
    tokens: int = 0
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # the answer's tokens in the server's log-probabilities, if the request asks for them


@dataclass
class Tally:
    whole: int = 0
    left: int = 0
    refused: int = 0
    tokens: int = 0
    passes: int = 0
    preempted: int = 0
    lost: list[str] = field(default_factory=list)
    garbled: list[str] = field(default_factory=list)
    deviations: list[tuple[Case, int, str]] = field(default_factory=list)  # the first token at which an answer differs
    close: list[float] = field(default_factory=list)  # leads of the tokens there that rounding could have decided
    rss: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB
    threads: list[int] = field(default_factory=list)  # numbers of threads at the same times
    busy: int = 0  # threads that took more than 5 % of the process's time: the engine's, those of its kernels, and the event loop

    @property
    def drift(self) -> float:
        """MB a minute, by least squares over the second half."""
        points = self.rss[len(self.rss) // 2 :]
        if len(points) < 2:
            return 0.0
        return 60 * statistics.linear_regression([t for t, _ in points], [mb for _, mb in points]).slope

    @property
    def growth(self) -> float:
        """Share by which memory has grown since `WARM`."""
        sizes = [mb for _, mb in self.rss]
        return max(sizes[-5:]) / sizes[int(WARM * len(sizes))] - 1

    def report(self, seconds: float) -> str:
        sizes = [mb for _, mb in self.rss] or [0.0]
        marks = [sizes[min(len(sizes) - 1, round(part * (len(sizes) - 1)))] for part in (0, 0.25, 0.5, 0.75, 1)]
        every = [f"{mb:.1f}" for _, mb in self.rss[::10]]
        return (
            f"{seconds:.0f} s: {self.whole} whole answers, {self.left} disconnected, {self.refused} times refused with status 429, "
            f"{self.tokens / seconds:.0f} tok/s in {self.passes} passes, {self.preempted} times out of blocks; "
            f"lost {len(self.lost)}, different {len(self.garbled)}, different at a close call {len(self.close)}; "
            f"server's RSS {' → '.join(f'{mb:.1f}' for mb in marks)} MB at 0, 25, 50, 75, 100 % of the time, "
            f"{self.drift:+.2f} MB a minute over the second half, {100 * self.growth:+.2f} % after the first {100 * WARM:.0f} %; "
            f"{min(self.threads)} to {max(self.threads)} threads, {self.busy} of them busy; RSS each 10 s: {' '.join(every)}"
        )


def cases(model: Path, engine: Engine, seed: int = 0) -> tuple[list[Case], int]:
    """Requests with their answers, and the bytes of a pool smaller than half of what 16 requests may need."""
    rng, rounds, out = random.Random(seed), bound(engine) > 0 and engine.decoder.native_step() is None, []  # native rows are independent
    for i in range(MANY):
        prompt = " ".join(rng.sample(BEGINNINGS, rng.choice([1, 1, 2, 6])))
        ask = {"prompt": prompt, "max_tokens": rng.choice([4, 16, 48, 96]), "seed": i, "temperature": rng.choice([0.0, 0.0, 0.7, 1.0])}
        ask |= {"temperature": 0.0, "logprobs": 0} if rounds else {}
        ask |= {"top_p": 0.9} if rng.random() < 0.3 else {}
        ask |= {"stop": ["."]} if rng.random() < 0.2 else {}
        way = Sampling(temperature=ask["temperature"], seed=i, top_p=ask.get("top_p", 1.0), stop=tuple(ask.get("stop", ())))
        pieces = list(Generation(engine, prompt, way, ask["max_tokens"]))
        ids, answer = engine.text.encode(prompt), [piece.token for piece in pieces]
        words = [engine.text.tokenizer.decode([token], skip_special_tokens=False) for token in answer] if rounds else []
        text = continuation(engine.text, ids, answer, way.stop)
        out.append(Case({"model": model.name, **ask}, text, pieces[-1].end, len(pieces), ids, answer, words))
    return out, PagedPool.bytes_for(engine.shape, BLOCKS - 1, dtype=engine.entries)


@contextlib.contextmanager
def server(model: Path, *options: str, threads: int = 1) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`fedtune serve` in a separate process, stopped by SIGTERM."""
    command = [sys.executable, "-m", "fedtune.cli.main", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "the server did not start"
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def client(url: str, known: list[Case], tally: Tally, until: float, rng: random.Random, *, leaves: float = 0.25) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as line:
        while time.monotonic() < until:
            case = rng.choice(known)
            what = json.dumps(case.ask)
            try:
                if rng.random() < 0.1:
                    await _whole(line, case, tally, what)
                else:
                    await _stream(line, case, tally, what, leave_after=rng.randint(0, 12) if rng.random() < leaves else None)
            except (httpx.HTTPError, ValueError, KeyError) as bad:
                tally.lost.append(f"{what}: {bad!r}")


async def _whole(line: httpx.AsyncClient, case: Case, tally: Tally, what: str) -> None:
    answer = await line.post("/v1/completions", json=case.ask)
    if answer.status_code == 429:
        return await _come_back(tally)
    got = answer.json()
    choice = got["choices"][0]
    words = choice["logprobs"]["tokens"] if case.words else []
    _judge(case, choice["text"], choice["finish_reason"], got["usage"]["completion_tokens"], words, tally, what)


async def _stream(line: httpx.AsyncClient, case: Case, tally: Tally, what: str, *, leave_after: int | None) -> None:
    ask = case.ask | {"stream": True, "stream_options": {"include_usage": True}}
    text, end, tokens, done, chunks = "", None, 0, False, 0
    words: list[str] = []
    async with line.stream("POST", "/v1/completions", json=ask) as answer:
        if answer.status_code == 429:
            await answer.aread()
            return await _come_back(tally)
        async for row in answer.aiter_lines():
            if not row:
                continue
            if row == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(row.removeprefix("data: "))
            if "error" in chunk:
                tally.lost.append(f"{what}: {chunk}")
                return
            for choice in chunk["choices"]:
                text, end = text + choice["text"], choice["finish_reason"] or end
                words += (choice["logprobs"] or {}).get("tokens", [])
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            chunks += 1
            if leave_after is not None and chunks > leave_after:
                tally.left += 1
                if (at := first_difference(case.words, words)) is not None:
                    tally.deviations.append((case, at, what))
                elif not case.text.startswith(text):
                    tally.garbled.append(f"{what}: {text!r} does not begin {case.text!r}")
                return
    if not done:
        tally.lost.append(f"{what}: the stream ended early")
    else:
        _judge(case, text, end, tokens, words, tally, what)


def _judge(case: Case, text: str, end: str | None, tokens: int, words: list[str], tally: Tally, what: str) -> None:
    tally.whole += 1
    tally.tokens += tokens
    if (at := first_difference(case.words, words)) is not None:
        tally.deviations.append((case, at, what))
    elif (text, end, tokens) != (case.text, case.end, case.tokens):
        tally.garbled.append(f"{what}: {(text, end, tokens)} is not {(case.text, case.end, case.tokens)}")


async def _come_back(tally: Tally) -> None:
    tally.refused += 1
    await asyncio.sleep(0.2)


async def _watch(process: subprocess.Popen[str], tally: Tally, until: float) -> None:
    seen, begun = psutil.Process(process.pid), time.monotonic()
    while time.monotonic() < until:
        tally.rss.append((time.monotonic() - begun, seen.memory_info().rss / 1e6))
        tally.threads.append(seen.num_threads())
        await asyncio.sleep(1)
    times = [thread.user_time + thread.system_time for thread in seen.threads()]
    tally.busy = sum(took > 0.05 * sum(times) for took in times)


async def _all(url: str, process: subprocess.Popen[str], known: list[Case], clients: int, seconds: float, seed: int) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    rngs = [random.Random(f"{seed}-{i}") for i in range(clients)]
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch(process, tally, until))
        for rng in rngs:
            group.create_task(client(url, known, tally, until, rng))
    return tally


def soak(model: Path, *, seconds: float, clients: int, seed: int = 0, kind: str = "fp32", threads: int = 1) -> Tally:
    """Serve the model to clients; the queue is short enough to be full sometimes, and the pool small enough for preemption."""
    engine = load_engine(model, kind)
    known, budget = cases(model, engine, seed)
    options = ("--kind", kind, "--max-concurrent", "16", "--queue", "12", "--timeout", "100", "--kv-budget", str(budget))
    with server(model, *options, threads=threads) as (url, process):
        tally = asyncio.run(_all(url, process, known, clients, seconds, seed))
        for _ in range(100):  # the server notices the last disconnect within moments
            state = httpx.get(f"{url}/health").json()
            if (state["running"], state["waiting"]) == (0, 0):
                tally.passes, tally.preempted = state["passes"], state["preempted"]
                break
            time.sleep(0.1)
        else:
            tally.lost.append(f"work without a client goes on: {state}")
    if process.returncode != 0:
        tally.lost.append(f"the server ended with code {process.returncode}")
    leads: dict[tuple[int, int], float] = {}
    for case, at, what in tally.deviations:
        if (id(case), at) not in leads:
            leads[id(case), at] = lead(engine, case.prompt, case.answer, at)
        if (gap := leads[id(case), at]) <= bound(engine):
            tally.close.append(gap)
        else:
            tally.garbled.append(f"{what}: another token at {at}, where the best leads by {gap:.4f} of the largest score")
    return tally


def faults(tally: Tally, seconds: float, threads: int) -> list[str]:
    """The faults of a soak; memory may grow by 3 % after the first minute of five."""
    found = [*tally.lost, *tally.garbled]
    if tally.busy > threads + 1:
        found.append(f"{tally.busy} threads were busy: {threads} are set, and the event loop has one")
    if seconds >= 300 and tally.growth > 0.03:
        found.append(f"memory grew by {100 * tally.growth:.1f} %")
    return found


def package(folder: Path) -> Path:
    """An int4 package of a random model whose passes take milliseconds."""
    config = json.loads((tiny_model(folder / "hf") / "config.json").read_text())
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(config | sizes | {"initializer_range": 0.1}))).save_pretrained(folder / "hf")
    return export_edge(folder / "hf", folder / "int4", quantize="int4")


def speed(model: Path, known: list[Case], *, servers: int, clients: int, seconds: float, threads: int) -> float:
    """Tokens per second of all servers together; each has a part of the clients. All answers must be right."""
    tally = Tally()

    async def run(urls: list[str]) -> None:
        until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(client(urls[i % servers], known, tally, until, random.Random(i), leaves=0))

    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(server(model, threads=threads))[0] for _ in range(servers)]
        begun = time.monotonic()
        asyncio.run(run(urls))
        took = time.monotonic() - begun
    assert not tally.lost and not tally.garbled, [*tally.lost, *tally.garbled][:3]
    return tally.tokens / took


def compare(model: Path, *, clients: int, seconds: float, threads: int, pairs: int) -> tuple[list[float], list[float]]:
    """Tokens a second of one server and of two at once, measured in turn."""
    known, _ = cases(model, load_engine(model))
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for servers in (1, 2):
            found[servers - 1].append(speed(model, known, servers=servers, clients=clients, seconds=seconds, threads=threads))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of a model; default: a tiny random one")
    parser.add_argument("--package", action="store_true", help="serve a random int4 package")
    parser.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="kind of the linears; default: fp32, or the package's")
    parser.add_argument("--threads", type=int, default=1, help="threads of the server")
    parser.add_argument("--pairs", type=int, default=0, help="compare one server with two this many times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or (package if args.package else tiny_model)(Path(folder) / "tiny")
        kind = args.kind or ("int4" if args.package else "fp32")
        if args.pairs:
            one, two = compare(model, clients=args.clients, seconds=args.seconds, threads=args.threads, pairs=args.pairs)
            ratio = statistics.median(two) / statistics.median(one)
            rounds = " ".join(f"{a:.0f}/{b:.0f}" for a, b in zip(one, two, strict=True))
            print(f"tokens a second of one server / two: {rounds}; of two by one, medians: {ratio:.2f}")
            return 0
        tally = soak(model, seconds=args.seconds, clients=args.clients, seed=args.seed, kind=kind, threads=args.threads)
    print(tally.report(args.seconds))
    wrong = faults(tally, args.seconds, args.threads)
    for line in wrong[:10]:
        print(line[:600])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
