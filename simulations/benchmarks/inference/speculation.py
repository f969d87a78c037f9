"""End-to-end speculative decoding: real text and a real pair of models, at the cost of a memory-bound model.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.benchmarks.inference.speculation --out docs/bench-speculation.md

The target is a pretrained checkpoint, widened to a shape of the benchmark (`widen`): text and acceptance are those of real weights and real
prompts, time is that of the large shape. `fedtune draft` distills the draft model from the checkpoint (`pair`). "wide draft" is that model,
widened to about a twelfth of the target; "small draft" is not widened. "auto" is the default of `fedtune generate`, and "auto, ... draft"
that of `--draft`. Each answer starts without measurements, as a command does. "auto, kept" keeps the measurements and texts of earlier
answers, as in a chat. "early exit" exits after the checkpoint's last layer, where the result is already exact: an upper bound for a model
trained for early exit, not a forecast.

With `--llama-server`, llama.cpp's server answers the same prompts before and after fedtune (Q4_0 beside int4, Q8_0 beside int8), without a
draft model and with each of the two at 3, 5 and 8 draft tokens. Its figures are the tokens per second that it reports, without the prompt.

Each number format has its own process. There all sides answer one prompt before the next prompt, so that changes in machine speed affect
all of them. Figures are ratios to plain decoding of the same prompt, medians with quartiles. "accepted" is the share of draft tokens kept,
"same" the number of greedy answers that equal plain decoding token for token.
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

import httpx
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
from fedtune.simulations.benchmarks.delivery import free_port
from fedtune.simulations.benchmarks.inference.__main__ import without_paths
from fedtune.simulations.benchmarks.inference.models import SIZES, VOCABULARY, gguf, package
from fedtune.simulations.benchmarks.inference.pair import ANSWER, MODELS, acceptance, draft_of, prompts
from fedtune.simulations.benchmarks.inference.servers import command
from fedtune.simulations.benchmarks.inference.servers import server as run_server
from fedtune.simulations.benchmarks.inference.widen import Size, widen
from fedtune.simulations.studies.real import hardware

PLAIN = "plain"
WIDE = {"125m": (256, 4, 8, 4, 512), "0.4b": (512, 8, 8, 4, 1536)}  # shapes of the wide draft, as in SIZES
PEERS = {"int4": "q4_0", "int8": "q8_0"}  # our number format → llama.cpp's
DRAFT_KINDS = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int4"}  # number format of the target → of the wide draft


@dataclass(frozen=True, kw_only=True)
class SpeculationCase:
    """The measurements of one number format.

    Args:
        size, kind: Shape and number format of the target.
        target, wide, small: Folders of the target and the two drafts.
        target_hf: The target before it was packaged.
        exit_at: Layers of the early exit.
        rows: Token ids of each prompt.
        new: Maximum tokens of an answer.
        fixed: Fixed numbers of draft tokens, also measured with lookup and the wide draft.
    """

    size: str
    kind: str
    target: Path
    target_hf: Path
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
    """One side's cost for one prompt; `ratio` and `same` compare it with plain decoding."""

    tokens: int
    seconds: float
    passes: int
    drafted: int
    accepted: int
    draft_seconds: float
    ratio: float
    same: bool


Found = dict[str, dict[str, list[Answer]]]  # temperature → side → one answer per prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="checkpoint to widen (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=list(WIDE), default=["125m"], help="shapes to widen it to (default: 125m)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help=f"number formats (default: {' '.join(KINDS)})")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts, half from each text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=ANSWER, help="maximum new tokens (default: %(default)s)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8], help="0 is greedy (default: 0 0.8)")
    parser.add_argument("--fixed", nargs="*", type=int, default=[], metavar="N", help="also measure a fixed number of N draft tokens")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server, to measure beside int4 and int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--models", type=Path, default=Path("outputs/bench-inference"), help="folder for the models (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write, with a .json and a .png beside it")
    args = parser.parse_args()
    data = Path(os.environ.get("FEDTUNE_DATA", "data"))
    source = data / "models" / args.model / "hf"
    draft = draft_of(source, data, args.models / f"{args.model}-draft")
    os.environ.update(OMP_NUM_THREADS=str(args.threads))  # inherited by the measuring processes
    arguments = shlex.join(without_paths(sys.argv[1:]))
    command = f"FEDTUNE_DATA=path/to/data python -m fedtune.simulations.benchmarks.inference.speculation {arguments}"
    lines = ["# Speculation, from end to end\n", f"```\n{command.strip()}\n```\n"]
    lines.append(
        f"{hardware()}; {args.threads} threads; {args.model}, widened; {args.prompts} held-out prompts, answers of {args.tokens} tokens;"
        f" the draft, one of the checkpoint's layers, is accepted at {100 * acceptance(draft):.0f} % on held-out text at temperature 1.\n"
    )
    seen: dict[str, dict[str, Found]] = {}
    beside: dict[str, list[str]] = {size: [] for size in args.sizes}
    for size in args.sizes:
        seen[size] = {}
        for case in cases(source, draft, size, data, args):
            peers = [llama_cpp(args.llama_server, case)] if args.llama_server and case.kind in PEERS else []
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seen[size][case.kind] = process.submit(measure, case).result()
            peers += [llama_cpp(args.llama_server, case)] if peers else []
            beside[size] += peer_rows(case.kind, peers)
            print("\n".join([table({case.kind: seen[size][case.kind]}), *peer_rows(case.kind, peers)]), flush=True)
        lines += [f"\n## {size}\n", table(seen[size])]
        if beside[size]:
            lines += ["\n| llama.cpp | tok/s, greedy |", "|---|---|", *beside[size]]
    if args.out:
        lines.append(f"\n![ratios]({args.out.with_suffix('.png').name})")
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(seen, args.out.with_suffix(".png"))
        args.out.with_suffix(".json").write_text(json.dumps(seen, indent=1, default=asdict), encoding="utf-8")


def cases(source: Path, draft: Path, size: str, data: Path, args: argparse.Namespace) -> list[SpeculationCase]:
    """Return the measurements of a size; creates missing models."""
    engine = load_engine(source, "fp32")
    target = widen(source, args.models / f"{args.model}-{size}", as_size(SIZES[size]))
    wide = widen(draft, args.models / f"{args.model}-draft-for-{size}", as_size(WIDE[size]))
    rows = prompts(engine, data, args.prompts, held=True)
    return [
        SpeculationCase(
            size=size, kind=kind, target=package(target, kind) if kind in PEERS else target, target_hf=target, wide=wide, small=draft,
            exit_at=engine.shape.layers, rows=rows, new=args.tokens, temperatures=args.temperatures, fixed=args.fixed, threads=args.threads,
        )
        for kind in args.kinds
    ]  # fmt: skip


def as_size(numbers: tuple[int, int, int, int, int]) -> Size:
    hidden, layers, heads, kv_heads, inner = numbers
    return Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=VOCABULARY)


def sides(engine: Engine, case: SpeculationCase) -> dict[str, Callable[[], Speculation | None]]:
    """Side name → a function that starts an answer's speculation."""
    wide, small = load_engine(case.wide, DRAFT_KINDS[case.kind]), load_engine(case.small)
    found: dict[str, Callable[[], Speculation | None]] = {
        PLAIN: lambda: None,
        "auto": lambda: open_speculation(engine, "auto", None),
        "auto, kept": partial(lambda kept: kept, open_speculation(engine, "auto", None)),
        "auto, wide draft": lambda: Speculation(DraftModel(wide, engine)),
        "auto, small draft": lambda: Speculation(DraftModel(small, engine)),
    }
    if case.exit_at < engine.shape.layers:
        found["early exit"] = lambda: Speculation(EarlyExit(case.exit_at))
    for n in case.fixed:
        found[f"lookup, always {n}"] = partial(lambda n: Speculation(Lookup(), Adapt(fixed=n)), n)
        found[f"wide draft, always {n}"] = partial(lambda n: Speculation(DraftModel(wide, engine), Adapt(fixed=n)), n)
    return found


def measure(case: SpeculationCase) -> Found:
    """Run all sides on each prompt, after a short warm-up."""
    torch.set_num_threads(case.threads)
    engine = load_engine(case.target, None if case.kind in ("int8", "int4") else case.kind)
    found: Found = {}
    for temperature in case.temperatures:
        ways = sides(engine, case)  # nothing is kept from one temperature to the next: the prompts are the same
        for begin in ways.values():
            _answer(engine, case.rows[0][::-1], Sampling(), 16, begin())
        seen = found[f"{temperature:g}"] = {way: list[Answer]() for way in ways}
        for i, row in enumerate(case.rows):
            print(f"{case.size} {case.kind}, temperature {temperature:g}: prompt {i + 1} of {len(case.rows)}", file=sys.stderr, flush=True)
            plain: tuple[list[int], Report] = [], Report()
            for way, begin in ways.items():
                tokens, report = _answer(engine, row, Sampling(temperature=temperature, seed=i), case.new, begin())
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


def llama_cpp(server: str, case: SpeculationCase) -> dict[str, list[float]]:
    """Tokens a second of llama.cpp on each prompt, greedy: draft model and number of draft tokens → one figure per prompt."""
    target, found = gguf(case.target_hf, PEERS[case.kind]), dict[str, list[float]]()
    drafts = {"wide draft": gguf(case.wide, "q8_0"), "small draft": gguf(case.small, "q8_0")}
    ways = {PLAIN: list[str]()}
    ways |= {f"{name}, {n}": ["-md", str(file), "--spec-draft-n-max", str(n)] for name, file in drafts.items() for n in (3, 5, 8)}
    for way, more in ways.items():
        words = command("llama.cpp", target, 1, 512, port := free_port(), case.threads, server) + more
        with run_server(words, port, case.threads, target.with_suffix(".log")) as url:
            for row in [case.rows[0], *case.rows]:
                asked = {"prompt": row, "n_predict": case.new, "temperature": 0.0, "cache_prompt": False}
                answer = httpx.post(f"{url}/completion", json=asked, timeout=600)
                answer.raise_for_status()
                found.setdefault(way, []).append(float(answer.json()["timings"]["predicted_per_second"]))
        del found[way][0]  # a warm-up
    return found


def peer_rows(kind: str, runs: Sequence[Mapping[str, Sequence[float]]]) -> list[str]:
    """Table rows: medians over the prompts of both runs, with quartiles."""
    rows = list[str]()
    for way in runs[0] if runs else ():
        low, middle, high = statistics.quantiles([speed for run in runs for speed in run[way]], n=4, method="inclusive")
        rows.append(f"| {PEERS[kind].upper()}, {way} | {middle:.1f} ({low:.1f}–{high:.1f}) |")
    return rows


def table(seen: Mapping[str, Found]) -> str:
    """A Markdown table: a row per number format and side, three or four columns per temperature."""
    temperatures = list(next(iter(seen.values())))
    head = ["target", "side"]
    for t in temperatures:
        head += [f"× plain, {_name(t)}", "tokens per pass", "accepted", *(["same"] if float(t) == 0 else [])]
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
    """Quartiles of the ratios to plain decoding, without answers of one token: these have no decoding time."""
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
    """Plot each side's ratio to plain decoding by number format: a row per size, a column per temperature."""
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
