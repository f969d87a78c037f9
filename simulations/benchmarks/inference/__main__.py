"""Prefill, decode, memory and verification cost of fedtune's engine and other engines, on the same random Llama weights.

    python -m fedtune.simulations.benchmarks.inference --peers PYTHON --out docs/bench-inference.md

Each backend runs in its own process, which stays loaded. Rounds alternate between the backends (A B C A B C ...), so that changes in
machine speed affect all of them: quote the ratios. A round is a prefill of 128 tokens (time to the first logits) and 128 greedy tokens.
"verify n" is the time of a pass of n tokens after the prompt, divided by that of one token; it limits the gain of speculation. Peak memory
is the process's high-water mark after the rounds, with Python and libraries; pages of mapped files count.

PYTHON is an interpreter with openvino, optimum-intel and llama-cpp-python (built without AMX if AMX crashes); without --peers only fedtune
and transformers run. Other engines use the best settings that we know: llama.cpp without mmap and with huge pages, OpenVINO with its
latency hint and logits of the last token only, transformers with huge pages. fedtune runs with its commands' defaults. All use the same
number of threads.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.simulations.benchmarks.inference.models import SIZES, VOCABULARY, build, gguf, openvino, package
from fedtune.simulations.studies.real import hardware

OURS = ("fedtune fp32", "fedtune bf16", "fedtune int8", "fedtune int4")
SIDES = (*OURS, "transformers bf16", "transformers nf4", "openvino int8", "openvino int4", "llama.cpp Q8_0", "llama.cpp Q4_0")
VERIFY = (2, 4, 8)
COMMAND = "python -m fedtune.simulations.benchmarks.inference"
HUGE = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # only read at process start


@dataclass
class Side:
    """A backend's process and its measurements: seconds by operation."""

    name: str
    process: "subprocess.Popen[str]"
    load_s: float = float("nan")
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and return the answer; {} once the process has failed."""
        if self.error:
            return {}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}
        self.error = answer.get("error")
        if self.error:
            print(f"{self.name}: {self.error}", file=sys.stderr)
            return {}
        return answer

    def note(self, what: str, answer: Mapping[str, Any]) -> None:
        if "seconds" in answer:
            self.seconds.setdefault(what, []).append(answer["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "0.4b"], help="models (default: 125m 0.4b)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=f"default: {', '.join(SIDES)}")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with openvino and llama_cpp")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per backend, after one warm-up round (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each backend (default: all cores)")
    parser.add_argument("--models", type=Path, default=Path("outputs/bench-inference"), help="folder for the models (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write, with a .json and a .png beside it")
    args = parser.parse_args()
    lines = ["# fedtune's engine and other engines\n", f"```\n{COMMAND} {shlex.join(without_paths(sys.argv[1:]))}\n```\n"]
    lines.append(f"{hardware()}; {args.threads} threads, {args.rounds} rounds in turn; medians, with the least and the greatest.\n")
    kept = {}
    seen: dict[str, list[Side]] = {}
    for size in args.sizes:
        chosen = [s for s in args.sides if args.peers or not s.startswith(("openvino", "llama.cpp"))]
        with workers(size, chosen, args) as sides:
            measure(sides, args.rounds, args.prompt, args.tokens)
        lines += [f"\n## {size}\n", table(sides, args.prompt, args.tokens)]
        seen[size] = sides
        kept[size] = {s.name: {"load_s": s.load_s, **s.seconds, **s.memory, "error": s.error} for s in sides}
        print(lines[-1], flush=True)
    if args.out:
        lines.append(f"\n![speeds]({args.out.with_suffix('.png').name})")
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(seen, args.prompt, args.tokens, args.out.with_suffix(".png"))
        args.out.with_suffix(".json").write_text(json.dumps(kept, indent=1), encoding="utf-8")


@contextlib.contextmanager
def workers(size: str, names: Sequence[str], args: argparse.Namespace) -> Iterator[list[Side]]:
    """Yield the backends' processes, started one after the other."""
    folder = build(size, args.models)
    sides: list[Side] = []
    try:
        for name in names:
            context = args.prompt + args.tokens + 64
            command = [*arguments(name, folder, args.peers), "--threads", str(args.threads), "--context", str(context)]
            huge = {} if name in OURS else HUGE
            environment = {**os.environ, **huge, "OMP_NUM_THREADS": str(args.threads)}
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            sides.append(side := Side(name, process))
            side.load_s = side.hear().get("load_s", float("nan"))
        yield sides
    finally:
        for side in sides:
            side.process.kill()
            side.process.wait()


def arguments(name: str, folder: Path, peers: str | None) -> list[str]:
    """The command line of a backend's worker."""
    backend, kind = name.split()
    worker = str(Path(__file__).with_name("worker.py"))
    if backend == "fedtune":
        form = package(folder, kind) if kind in ("int8", "int4") else folder
        return [
            sys.executable,
            "-m",
            "fedtune.simulations.benchmarks.inference.worker",
            backend,
            str(form),
            "--kind",
            "package" if form != folder else kind,
        ]
    if backend == "transformers":
        return [sys.executable, worker, backend, str(folder), "--kind", kind]
    assert peers
    form = gguf(folder, kind.lower()) if backend == "llama.cpp" else openvino(folder, int(kind.removeprefix("int")), peers)
    return [peers, worker, backend, str(form), "--kind", kind]


def measure(sides: Sequence[Side], rounds: int, prompt: int, tokens: int) -> None:
    """Run alternating rounds, the first as a warm-up; then time passes of a few tokens."""
    draw = random.Random(0)
    for round in range(rounds + 1):
        ids = [draw.randrange(1, VOCABULARY) for _ in range(prompt)]
        for side in sides:
            first = side.ask(do="prefill", ids=ids)
            rest = side.ask(do="decode", token=first.get("token"), n=tokens)
            if round:
                side.note("prefill", first)
                side.note("decode", rest)
    for side in sides:
        side.memory = side.ask(do="memory")
    ids = [draw.randrange(1, VOCABULARY) for _ in range(prompt)]
    for side in sides:
        side.ask(do="prefill", ids=ids)
    for round in range(4 * rounds):
        for side in sides:
            for n in (1, *VERIFY):
                answer = side.ask(do="verify", ids=[draw.randrange(1, VOCABULARY) for _ in range(n)])
                if round:
                    side.note(f"verify {n}", answer)


def table(sides: Sequence[Side], prompt: int, tokens: int) -> str:
    """A Markdown table with one row per backend: medians, with minimum and maximum."""
    head = ["backend", "prefill tok/s", "decode tok/s", "peak MB", "load s", *(f"verify {n}" for n in VERIFY)]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for side in sides:
        if side.error:
            rows.append(f"| {side.name} | {side.error} |" + " |" * (len(head) - 2))
            continue
        rates = [speed(side.seconds["prefill"], prompt), speed(side.seconds["decode"], tokens)]
        one = statistics.median(side.seconds["verify 1"])
        costs = [f"{statistics.median(side.seconds[f'verify {n}']) / one:.2f}" for n in VERIFY]
        rows.append(f"| {side.name} | {' | '.join(rates)} | {side.memory['peak_mb']:.0f} | {side.load_s:.1f} | {' | '.join(costs)} |")
    return "\n".join(rows)


def plot(seen: Mapping[str, Sequence[Side]], prompt: int, tokens: int, path: Path) -> None:
    """Plot prefill and decode speed of each backend, one row per size."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(seen), 2, figsize=(11, 0.6 + 3.2 * len(seen)), squeeze=False)
    for row, (size, sides) in zip(axes, seen.items(), strict=True):
        good = [s for s in sides if not s.error]
        colors = ["tab:blue" if s.name in OURS else "0.65" for s in good]
        for axis, what, n in ((row[0], "prefill", prompt), (row[1], "decode", tokens)):
            bars = axis.barh([s.name for s in good], [n / statistics.median(s.seconds[what]) for s in good], color=colors)
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set(title=f"{size}: {what}", xlabel="tokens a second")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def without_paths(arguments: Sequence[str]) -> list[str]:
    """Replace this machine's paths in a command line with placeholders."""
    return [
        "PYTHON" if before == "--peers" else "FOLDER" if before == "--models" else a
        for before, a in zip(["", *arguments], arguments, strict=False)
    ]


def speed(seconds: Sequence[float], tokens: int) -> str:
    return f"{tokens / statistics.median(seconds):.1f} ({tokens / max(seconds):.1f}–{tokens / min(seconds):.1f})"


if __name__ == "__main__":
    main()
