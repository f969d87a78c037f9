"""Speculation from end to end: real text, a real pair, at the cost of a model that is bound by memory.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.benchmarks.inference.speculation --out docs/bench-speculation.md

The target is a pretrained checkpoint, widened to a shape of the benchmark (`widen`): text and acceptance are those of real weights and real
prompts, time is that of the large shape. The draft is distilled from the checkpoint by `fedtune draft` (`pair`); "wide draft" is widened
too, to about a twelfth of the target, "small draft" is as distilled. "auto" is what `fedtune generate` does by itself, with a draft model
what it does with `--draft`; each answer begins with nothing measured, as a command does. "early exit" leaves behind the last layer that
came from the checkpoint, where nothing is missing any more: an upper bound for a model that was trained for it, not a forecast.

Each number format is a process of its own. In it all sides answer a prompt one after the other before the next prompt comes, so that a
machine whose speed drifts drifts for all: figures are ratios to plain decoding of the same prompt, medians with quartiles. "kept" is the
share of the guesses that stayed, "same" how many greedy answers are plain decoding's, token for token.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from fedtune.inference.engine.generate import Generation, Report, Speculation
from fedtune.inference.engine.linear import KINDS
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate.adapt import Adapt
from fedtune.inference.engine.speculate.draft import DraftModel
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.speculate.lookup import Lookup
from fedtune.inference.generate import open_speculation
from fedtune.simulations.benchmarks.inference.__main__ import told
from fedtune.simulations.benchmarks.inference.models import SIZES, VOCABULARY, package
from fedtune.simulations.benchmarks.inference.pair import ANSWER, MODELS, acceptance, draft_of, prompts
from fedtune.simulations.benchmarks.inference.widen import Size, widen
from fedtune.simulations.studies.real import hardware

PLAIN = "plain"
WIDE = {"125m": (256, 4, 8, 4, 512), "0.4b": (512, 8, 8, 4, 1536)}  # of the draft, as in SIZES
DRAFT_KINDS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}  # of the target → of the wide draft


@dataclass(frozen=True, kw_only=True)
class Job:
    """One number format's part.

    Args:
        size, kind: Of the target.
        target, wide, small: Folders.
        exit_at: Layers of the early exit.
        rows: Prompts.
        new: Tokens of an answer.
        fixed: Numbers of guesses that lookup and the wide draft also make whatever they cost.
    """

    size: str
    kind: str
    target: Path
    wide: Path
    small: Path
    exit_at: int
    rows: list[list[int]]
    new: int
    temperatures: list[float]
    fixed: list[int]
    threads: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one side took for one prompt; ratio and same compare it with plain decoding."""

    tokens: int
    seconds: float
    passes: int
    drafted: int
    accepted: int
    draft_seconds: float
    ratio: float
    same: bool


Found = dict[str, dict[str, list[Answer]]]  # temperature, side → an answer a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="checkpoint to widen (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=list(WIDE), default=["125m"], help="shapes to widen it to (default: 125m)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=f"number formats (default: {' '.join(KINDS)})")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts, half of each text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=ANSWER, help="new tokens, where no end comes before (default: %(default)s)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8], help="0 is greedy (default: 0 0.8)")
    parser.add_argument("--fixed", nargs="*", type=int, default=[], metavar="N", help="also guess N tokens always, whatever that costs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--models", type=Path, default=Path("outputs/bench-inference"), help="where models are kept (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write; a .json and a .png lie beside it")
    args = parser.parse_args()
    data = Path(os.environ.get("FEDTUNE_DATA", "data"))
    source = data / "models" / args.model / "hf"
    draft = draft_of(source, data, args.models / f"{args.model}-draft")
    os.environ.update(OMP_NUM_THREADS=str(args.threads))  # of the processes to come
    command = f"FEDTUNE_DATA=path/to/data python -m fedtune.simulations.benchmarks.inference.speculation {shlex.join(told(sys.argv[1:]))}"
    lines = ["# Speculation, from end to end\n", f"```\n{command.strip()}\n```\n"]
    lines.append(
        f"{hardware()}; {args.threads} threads; {args.model}, widened; {args.prompts} held-out prompts, answers of {args.tokens} tokens;"
        f" the draft, one of the checkpoint's layers, is accepted at {100 * acceptance(draft):.0f} % on held-out text at temperature 1.\n"
    )
    seen: dict[str, dict[str, Found]] = {}
    for size in args.sizes:
        seen[size] = {}
        for job in jobs(source, draft, size, data, args):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seen[size][job.kind] = process.submit(measure, job).result()
            print(table({job.kind: seen[size][job.kind]}), flush=True)
        lines += [f"\n## {size}\n", table(seen[size])]
    if args.out:
        lines.append(f"\n![ratios]({args.out.with_suffix('.png').name})")
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(seen, args.out.with_suffix(".png"))
        args.out.with_suffix(".json").write_text(json.dumps(seen, indent=1, default=asdict), encoding="utf-8")


def jobs(source: Path, draft: Path, size: str, data: Path, args: argparse.Namespace) -> list[Job]:
    """The measurements of a size; its models are made where they are not there yet."""
    engine = load_engine(source, "fp32")
    target = widen(source, args.models / f"{args.model}-{size}", as_size(SIZES[size]))
    wide = widen(draft, args.models / f"{args.model}-draft-for-{size}", as_size(WIDE[size]))
    rows = prompts(engine, data, args.prompts, held=True)
    return [
        Job(
            size=size, kind=kind, target=package(target, kind) if kind in ("int8", "int4") else target, wide=wide, small=draft,
            exit_at=engine.shape.layers, rows=rows, new=args.tokens, temperatures=args.temperatures, fixed=args.fixed, threads=args.threads,
        )
        for kind in args.kinds
    ]  # fmt: skip


def as_size(numbers: tuple[int, int, int, int, int]) -> Size:
    hidden, layers, heads, kv_heads, inner = numbers
    return Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=VOCABULARY)


def sides(engine: Engine, job: Job) -> dict[str, Callable[[], Speculation | None]]:
    """By name, what begins an answer."""
    wide, small = load_engine(job.wide, DRAFT_KINDS[job.kind]), load_engine(job.small)
    found: dict[str, Callable[[], Speculation | None]] = {
        PLAIN: lambda: None,
        "auto": lambda: open_speculation(engine, "auto", None),
        "auto, wide draft": lambda: Speculation(DraftModel(wide, engine)),
        "auto, small draft": lambda: Speculation(DraftModel(small, engine)),
    }
    if job.exit_at < engine.shape.layers:
        found["early exit"] = lambda: Speculation(EarlyExit(job.exit_at))
    for n in job.fixed:
        found[f"lookup, always {n}"] = partial(lambda n: Speculation(Lookup(), Adapt(fixed=n)), n)
        found[f"wide draft, always {n}"] = partial(lambda n: Speculation(DraftModel(wide, engine), Adapt(fixed=n)), n)
    return found


def measure(job: Job) -> Found:
    """All sides in turn for each prompt, behind a short round that warms up."""
    torch.set_num_threads(job.threads)
    engine = load_engine(job.target, None if job.kind in ("int8", "int4") else job.kind)
    ways = sides(engine, job)
    for begin in ways.values():
        _answer(engine, job.rows[0], Sampling(), 16, begin())
    found: Found = {}
    for temperature in job.temperatures:
        seen = found[f"{temperature:g}"] = {way: list[Answer]() for way in ways}
        for i, row in enumerate(job.rows):
            print(f"{job.size} {job.kind}, temperature {temperature:g}: prompt {i + 1} of {len(job.rows)}", file=sys.stderr, flush=True)
            plain: tuple[list[int], Report] = [], Report()
            for way, begin in ways.items():
                tokens, report = _answer(engine, row, Sampling(temperature=temperature, seed=i), job.new, begin())
                plain = (tokens, report) if way == PLAIN else plain
                seen[way].append(
                    Answer(
                        tokens=report.tokens, seconds=report.decode_seconds, passes=report.passes, drafted=report.drafted,
                        accepted=report.accepted, draft_seconds=report.draft_seconds, ratio=report.speed / max(plain[1].speed, 1e-9),
                        same=tokens == plain[0],
                    )
                )  # fmt: skip
    return found


def _answer(engine: Engine, row: list[int], sampling: Sampling, new: int, speculation: Speculation | None) -> tuple[list[int], Report]:
    run = Generation(engine, row, sampling, new, speculation=speculation)
    return [piece.token for piece in run], run.report


def table(seen: Mapping[str, Found]) -> str:
    """A row for each kind and side, some columns for each temperature."""
    temperatures = list(next(iter(seen.values())))
    head = ["target", "side"]
    for t in temperatures:
        head += [f"× plain, {_name(t)}", "tokens a pass", "kept", *(["same"] if float(t) == 0 else [])]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, found in seen.items():
        for way in found[temperatures[0]]:
            cells = [kind, way]
            for t in temperatures:
                answers = found[t][way]
                cells += [spread(answers) if way != PLAIN else speed(answers), f"{tokens_a_pass(answers):.2f}", kept(answers)]
                cells += [f"{sum(a.same for a in answers)}/{len(answers)}"] if float(t) == 0 else []
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _name(temperature: str) -> str:
    return "greedy" if float(temperature) == 0 else f"T = {temperature}"


def quartiles(answers: Sequence[Answer]) -> tuple[float, float, float]:
    """Of the ratios to plain decoding; answers that ended at once say nothing."""
    ratios = [a.ratio for a in answers if a.tokens > 1]
    if len(ratios) < 2:
        return (ratios or [float("nan")])[0], (ratios or [float("nan")])[0], (ratios or [float("nan")])[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def spread(answers: Sequence[Answer]) -> str:
    low, middle, high = quartiles(answers)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def speed(answers: Sequence[Answer]) -> str:
    return f"{statistics.median((a.tokens - 1) / a.seconds for a in answers if a.tokens > 1):.1f} tok/s"


def tokens_a_pass(answers: Sequence[Answer]) -> float:
    return sum(a.tokens - 1 for a in answers) / max(1, sum(a.passes for a in answers))


def kept(answers: Sequence[Answer]) -> str:
    drafted = sum(a.drafted for a in answers)
    return f"{100 * sum(a.accepted for a in answers) / drafted:.0f} %" if drafted else "–"


def plot(seen: Mapping[str, Mapping[str, Found]], path: Path) -> None:
    """A row a size, a column a temperature: each side's ratio to plain decoding by the target's number format."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    temperatures = list(next(iter(next(iter(seen.values())).values())))
    figure, axes = plt.subplots(len(seen), len(temperatures), figsize=(5.5 * len(temperatures), 0.6 + 3.2 * len(seen)), squeeze=False)
    for row, (size, kinds) in zip(axes, seen.items(), strict=True):
        for axis, t in zip(row, temperatures, strict=True):
            ways = [way for way in next(iter(kinds.values()))[t] if way != PLAIN]
            for j, way in enumerate(ways):
                places = [i + (j - (len(ways) - 1) / 2) * 0.8 / len(ways) for i in range(len(kinds))]
                low, middle, high = zip(*(quartiles(found[t][way]) for found in kinds.values()), strict=True)
                error = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
                axis.bar(places, middle, 0.8 / len(ways), yerr=error, label=way, error_kw={"lw": 0.8})
            axis.axhline(1, color="0.4", lw=0.8)
            axis.set_xticks(range(len(kinds)), list(kinds))
            axis.set(title=f"{size}: {_name(t)}", ylabel="× plain decoding")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
