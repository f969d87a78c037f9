"""Many clients at once, for minutes: no lost or corrupted answer, constant memory.

    python -m tests.inference.serve.soak --seconds 300 --clients 32 [--model FOLDER] [--kind int8]

Starts `fedtune serve` and lets the clients ask, most of them streaming; some hang up in the middle. Each answer must be the one that the
request gets alone, and what a client had read when it hung up must be the beginning of that. In kinds that round, requests are greedy, and
an answer may part from the other where the two best scores lie closer than the rounding; such close calls are counted apart.
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

from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling
from tests.inference.serve.rounding import bound, first_difference, lead
from tests.inference.serve.served import continuation, tiny_model

ROOT = Path(__file__).parents[3]
BEGINNINGS = (
    "Once upon a time", "Lily and Tom", "One day, a little dog", "The sun was", "There was a big", "A girl named Sue", "turn on the light",
    "The cat and the bird", "Mom said", "In the park, the boys", "the kettle, please", "He was very",
)  # fmt: skip
MANY = 48  # different requests
BLOCKS = 48  # of the pool, 16 tokens each


@dataclass
class Case:
    """A request and its answer without other requests."""

    ask: dict[str, Any]
    text: str = ""
    end: str | None = None
    tokens: int = 0
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # the answer's tokens as the server tells them, where it is asked to


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
    deviations: list[tuple[Case, int, str]] = field(default_factory=list)  # at which token an answer is another: to be judged
    close: list[float] = field(default_factory=list)  # leads of the tokens there, where rounding could have decided
    rss: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB

    @property
    def drift(self) -> float:
        """MB a minute, by least squares over the second half."""
        points = self.rss[len(self.rss) // 2 :]
        if len(points) < 2:
            return 0.0
        return 60 * statistics.linear_regression([t for t, _ in points], [mb for _, mb in points]).slope

    def report(self, seconds: float) -> str:
        sizes = [mb for _, mb in self.rss] or [0.0]
        marks = [sizes[min(len(sizes) - 1, round(part * (len(sizes) - 1)))] for part in (0, 0.25, 0.5, 0.75, 1)]
        return (
            f"{seconds:.0f} s: {self.whole} whole answers, {self.left} hung up on, {self.refused} times told to come back, "
            f"{self.tokens / seconds:.0f} tok/s in {self.passes} passes, {self.preempted} times out of blocks; "
            f"lost {len(self.lost)}, different {len(self.garbled)}, different at a close call {len(self.close)}; "
            f"server's RSS {' → '.join(f'{mb:.1f}' for mb in marks)} MB at 0, 25, 50, 75, 100 % of the time, "
            f"{self.drift:+.2f} MB a minute over the second half"
        )


def cases(model: Path, engine: Engine, seed: int = 0) -> tuple[list[Case], int]:
    """Requests with their answers, and the bytes of a pool smaller than half of what 16 requests may need."""
    rng, rounds, out = random.Random(seed), bound(engine) > 0, []
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
    return out, PagedPool.bytes_for(engine.shape, BLOCKS - 1)


@contextlib.contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`fedtune serve` in a separate process, stopped by SIGTERM."""
    command = [sys.executable, "-m", "fedtune.cli.main", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
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


async def client(url: str, known: list[Case], tally: Tally, until: float, rng: random.Random) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as line:
        while time.monotonic() < until:
            case = rng.choice(known)
            what = json.dumps(case.ask)
            try:
                if rng.random() < 0.1:
                    await _whole(line, case, tally, what)
                else:
                    await _stream(line, case, tally, what, leave_after=rng.randint(0, 12) if rng.random() < 0.25 else None)
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
        await asyncio.sleep(1)


async def _all(url: str, process: subprocess.Popen[str], known: list[Case], clients: int, seconds: float, seed: int) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    rngs = [random.Random(f"{seed}-{i}") for i in range(clients)]
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch(process, tally, until))
        for rng in rngs:
            group.create_task(client(url, known, tally, until, rng))
    return tally


def soak(model: Path, *, seconds: float, clients: int, seed: int = 0, kind: str = "fp32") -> Tally:
    """Serve the model to clients; the queue is short enough to be full sometimes, and the pool small enough for preemption."""
    engine = load_engine(model, kind)
    known, budget = cases(model, engine, seed)
    options = ("--kind", kind, "--max-concurrent", "16", "--queue", "12", "--timeout", "100", "--kv-budget", str(budget))
    with server(model, *options) as (url, process):
        tally = asyncio.run(_all(url, process, known, clients, seconds, seed))
        for _ in range(100):  # whoever hung up last is noticed within moments
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    parser.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], default="fp32", help="how weights are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or tiny_model(Path(folder) / "tiny")
        tally = soak(model, seconds=args.seconds, clients=args.clients, seed=args.seed, kind=args.kind)
    print(tally.report(args.seconds))
    for line in [*tally.lost, *tally.garbled][:10]:
        print(line[:600])
    return 1 if tally.lost or tally.garbled else 0


if __name__ == "__main__":
    sys.exit(main())
