"""`fedtune serve` beside llama.cpp's server: tokens a second with several streams at once.

    python -m fedtune.simulations.benchmarks.inference.servers --llama-server PATH --models FOLDER --sizes 125m 0.4b

Both serve the same random weights (int4 and Q4_0, or int8 and Q8_0) through OpenAI's protocol, and have a place in the batch for each
stream. They take turns. In each round a server starts and answers one request as a warm-up. Then each stream sends `--requests` requests,
each after the previous answer is complete. Random weights do not end an answer, so all answers have the same length. The figure is the
number of answered tokens, divided by the seconds from the first request to the last answer; these include the prompts.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from fedtune.simulations.benchmarks.delivery import free_port
from fedtune.simulations.benchmarks.inference.models import SIZES, build, gguf, package

KINDS = {"int4": "q4_0", "int8": "q8_0"}  # fedtune's number format → llama.cpp's of the same size
SIDES = ("fedtune", "llama.cpp")


def command(side: str, model: Path, streams: int, length: int, port: int, threads: int, llama_server: str) -> list[str]:
    """The command of a server with a place for every stream, each of `length` tokens."""
    if side == "fedtune":
        return [sys.executable, "-m", "fedtune.cli.main", "serve", str(model), "--port", str(port), "--max-concurrent", str(streams),
                "--queue", str(streams)]  # fmt: skip
    own = ["-np", str(streams), "-c", str(streams * length), "-t", str(threads), "-tb", str(threads), "-lm", "none"]
    return [llama_server, "-m", str(model), "--port", str(port), *own]


@contextlib.contextmanager
def server(words: list[str], port: int, threads: int, log: Path) -> Iterator[str]:
    """Run a server until the block ends; yields its address once it answers."""
    with log.open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{words[0]} did not start: see {log}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def speed(url: str, streams: int, requests: int, prompt: int, new: int) -> float:
    """Answered tokens a second, of all streams together.

    Args:
        url: The server's address.
        streams: Requests at once.
        requests: Requests of each stream.
        prompt, new: Tokens of a prompt and of an answer.

    Raises:
        RuntimeError: An answer was shorter.
    """

    async def ask(line: httpx.AsyncClient, number: int) -> int:
        text = "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz ", k=prompt))  # a token for each letter
        asked = {"model": model, "prompt": text, "max_tokens": new, "temperature": 0.0}
        answer = await line.post("/v1/completions", json=asked)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    async def stream(line: httpx.AsyncClient, number: int) -> int:
        return sum([await ask(line, number * requests + i) for i in range(requests)])

    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as line:
        model = (await line.get("/v1/models")).json()["data"][0]["id"]
        await ask(line, -1)
        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*(stream(line, i) for i in range(streams))))
        took = time.perf_counter() - begun
    if tokens != streams * requests * new:
        raise RuntimeError(f"{tokens} tokens were answered instead of {streams * requests * new}")
    return tokens / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True, metavar="PATH", help="llama.cpp's server")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "0.4b"], help="(default: 125m 0.4b)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["int4"], help="number formats (default: int4)")
    parser.add_argument("--streams", nargs="+", type=int, default=[8, 32], help="streams at once (default: 8 32)")
    parser.add_argument("--requests", type=int, default=2, help="requests of each stream (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--models", type=Path, default=Path("outputs/bench-inference"), help="folder for the models (default: %(default)s)")
    args = parser.parse_args()
    print("| model | streams | fedtune tok/s | llama.cpp tok/s | ratio of medians |\n|---|---|---|---|---|", flush=True)
    for size in args.sizes:
        folder = build(size, args.models)
        for kind in args.kinds:
            models = {"fedtune": package(folder, kind), "llama.cpp": gguf(folder, KINDS[kind])}
            for streams in args.streams:
                seen: dict[str, list[float]] = {side: [] for side in SIDES}
                for _ in range(args.rounds):
                    for side in SIDES:
                        port = free_port()
                        length = args.prompt + args.new + 16
                        words = command(side, models[side], streams, length, port, args.threads, args.llama_server)
                        with server(words, port, args.threads, args.models / f"server-{side}.log") as url:
                            seen[side].append(asyncio.run(speed(url, streams, args.requests, args.prompt, args.new)))
                ratio = statistics.median(seen["fedtune"]) / statistics.median(seen["llama.cpp"])
                cells = [f"{statistics.median(s):.0f} ({min(s):.0f}–{max(s):.0f})" for s in seen.values()]
                print(f"| {size} {kind} | {streams} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
