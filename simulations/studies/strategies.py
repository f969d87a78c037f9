"""Compares all strategies on Banking77 and seven methods on SST-2, with the same pretrained encoder and tuning budget.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.strategies banking77 sst2 --out docs

Each row is a run of `conf/banking77.yaml` (each class distributed over the clients by Dir(alpha)) or `conf/sst2.yaml` (equal sizes, each
client's class mix from Dir(alpha · class prior)) with 100 clients, 10 of them sampled per round. The tuning budget is the same for every
row: three learning rates, each about three times the one before, with a short run and a separate seed. The rate whose clients score best on
their own held-out examples is used. The test set is not used for tuning. Finished runs are stored in RESULTS/runs.jsonl and not repeated;
the table and the plot are made from that file.

`--preset full` is FedPETuning's setting (arXiv:2212.10025): RoBERTa-base, 100 rounds, one epoch, batch 32, length 128. It needs a GPU.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console

from fedtune.config.compose import choices, compose
from fedtune.errors import FedtuneError
from fedtune.experiment import simulate
from fedtune.runs.report import read_metrics
from fedtune.simulations.studies.real import hardware, mean_and_spread

MOST = ("fedavg", "flora", "ffa", "fedsvd", "slora", "full", "fedpeptao")  # rows of SST-2
TUNING_SEED = 1000
TITLES = {"banking77": "Banking77", "sst2": "SST-2"}
SCALE = {"banking77": 1.0, "sst2": 1 / 3}  # factor for the learning rates below: two classes need smaller rates than 77
COMMON = (
    "partition.clients=100",
    "clients_per_round=10",
    "min_clients=1",
    "engine.threads=1",
)
SGD = ("client.optimizer=sgd", "client.clip_norm=null")
SETTINGS: Mapping[str, tuple[Sequence[str], Sequence[float]]] = {  # row → overrides, candidate learning rates; others as fedavg
    "fedavg": ((), (3e-3, 1e-2, 3e-2)),
    "full": (("strategy=fedavg", "peft=full", "model.precision=fp32"), (2e-4, 6e-4, 2e-3)),
    "fedpeptao": (
        ("peft=ptuning_v2", "peft.tokens=8", "strategy.warmup_rounds=2", "strategy.ratio=0.5", "client.weight_decay=0.1"),
        (1e-2, 4e-2, 1e-1),
    ),
    "ffa": ((), (1e-2, 3e-2, 1e-1)),
    "fedsvd": ((), (1e-2, 3e-2, 1e-1)),
    "scaffold": (SGD, (1e-1, 3e-1, 1.0)),
    "fednova": (SGD, (1e-1, 3e-1, 1.0)),
    **{name: (("min_clients=7",), (3e-3, 1e-2, 3e-2)) for name in ("krum", "multikrum", "bulyan", "fedtrimmedavg")},
}
PRESETS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "quick": {
        "all": (
            "eval.every=5",
            "eval.clients=20",
            "data.test_limit=500",
            "client.steps=5",
            "client.batch_size=8",
            "task.max_length=24",
            "model.precision=bf16",
        )
    },
    "full": {
        "all": (
            "eval.every=5",
            "eval.clients=20",
            "model.name=FacebookAI/roberta-base",
            "client.steps=null",
            "client.epochs=1",
            "client.batch_size=32",
            "task.max_length=128",
            "peft.targets=[query,value]",
            "peft.rank=8",
            "peft.alpha=8",
        )  # fmt: skip
    },
}
ROUNDS = {  # rounds of a tuning run, of a final run
    "quick": {"banking77": (5, 25), "sst2": (5, 25)},
    "full": {"banking77": (20, 100), "sst2": (20, 100)},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: data, skew, method, seed and learning rate."""

    preset: str
    data: str
    alpha: float
    name: str
    lr: float
    seed: int
    rounds: int

    def overrides(self) -> list[str]:
        chosen = SETTINGS.get(self.name, SETTINGS["fedavg"])[0]
        strategy = [] if any(o.startswith("strategy=") for o in chosen) else [f"strategy={self.name}"]
        own = [
            f"partition.alpha={self.alpha:g}",
            f"client.lr={self.lr:g}",
            f"seed={self.seed}",
            f"rounds={self.rounds}",
            f"name={self.data}",
        ]
        return [f"conf={self.data}", *strategy, *COMMON, *PRESETS[self.preset]["all"], *chosen, *own]


class Results:
    """Finished runs on disk: one line per run."""

    def __init__(self, folder: Path, extra: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._extra, self._folder = folder / "runs.jsonl", list(extra), folder
        self.known: list[dict[str, Any]] = []
        if self._path.exists():
            self.known = [json.loads(line) for line in self._path.read_text().splitlines()]

    def find(self, row: Row) -> dict[str, Any] | None:
        return next((k for k in self.known if k["row"] == asdict(row)), None)

    def get(self, row: Row) -> dict[str, Any]:
        """Return the result of a row; run it if there is none yet."""
        if (found := self.find(row)) is not None:
            return found
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
            run = simulate(compose([*row.overrides(), f"output_dir={self._folder / 'runs'}", *self._extra])[0].config)
        rounds = [r for r in read_metrics(run) if r["client"] is None]
        curve, sent = [], 0
        for r in rounds:
            sent += r.get("bytes_up", 0) + r.get("bytes_down", 0)
            if "accuracy" in r:
                curve.append([r["round"], sent, r["accuracy"], r.get("clients_mean")])
        made = {"row": asdict(row), "seconds": time.perf_counter() - started, "curve": curve, "run": str(run)}
        self.known.append(made)
        with self._path.open("a") as f:
            f.write(json.dumps(made) + "\n")
        print(f"{row.data} alpha={row.alpha:g} {row.name} lr={row.lr:g} seed={row.seed}: {curve[-1][2]:.3f}", file=sys.stderr, flush=True)
        return made


def rows(preset: str, data: str) -> Iterator[tuple[str, float, Sequence[int]]]:
    """Yield row name, alpha and seeds of a study."""
    if data == "banking77":
        for name in (*choices("strategy"), "full"):
            yield name, 0.1, (0,)
    else:
        for name in MOST:
            for alpha in (0.1, 1.0):
                yield name, alpha, (0, 1, 2)


def tuned(results: Results, preset: str, data: str, name: str, alpha: float, *, run: bool) -> float | None:
    """Return the learning rate of the best tuning run; None if a tuning run is missing and `run` is false."""
    rates = [lr * SCALE[data] for lr in SETTINGS.get(name, SETTINGS["fedavg"])[1]]
    tries = [Row(preset=preset, data=data, alpha=alpha, name=name, lr=lr, seed=TUNING_SEED, rounds=ROUNDS[preset][data][0]) for lr in rates]
    found = [results.get(t) if run else results.find(t) for t in tries]
    if any(f is None for f in found):
        return None
    # scored on the clients' held-out examples: the personalized method has no other score, and the test set is not used
    return max(zip(rates, found, strict=True), key=lambda pair: pair[1]["curve"][-1][3])[0]  # type: ignore[index]


def study(results: Results, preset: str, data: str, only: Sequence[str], *, run: bool) -> list[dict[str, Any]]:
    """Return the results of the final runs; with `run`, missing ones are run first."""
    made = []
    for name, alpha, seeds in rows(preset, data):
        if only and name not in only:
            continue
        # SST-2 is tuned at one alpha: three rates per method, as on Banking77
        lr = tuned(results, preset, data, name, alpha if data == "banking77" else 1.0, run=run)
        for seed in seeds if lr is not None else ():
            row = Row(preset=preset, data=data, alpha=alpha, name=name, lr=lr, seed=seed, rounds=ROUNDS[preset][data][1])  # type: ignore[arg-type]
            if (result := results.get(row) if run else results.find(row)) is not None:
                made.append(result)
    return made


def table(made: Sequence[Mapping[str, Any]], alpha: float) -> str:
    """A Markdown table, best accuracy first. The accuracy target is 90 % of FedAvg's mean accuracy."""
    mine = [m for m in made if m["row"]["alpha"] == alpha]
    base = [m["curve"][-1][2] for m in mine if m["row"]["name"] == "fedavg"]
    target = 0.9 * statistics.fmean(base) if base else None
    lines = ["| method | seeds | lr | accuracy | clients' own | MB per round | MB to the target | seconds per run |", "|" + "---|" * 8]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for m in mine:
        groups.setdefault(m["row"]["name"], []).append(m)
    for name, runs in sorted(groups.items(), key=lambda g: -statistics.fmean([m["curve"][-1][2] for m in g[1]])):
        ends = [m["curve"][-1] for m in runs]
        reach = [r for m in runs if (r := reached(m["curve"], target)) is not None]
        own = [e[3] for e in ends if e[3] is not None]
        cells = [
            name,
            " ".join(str(m["row"]["seed"]) for m in runs),
            f"{runs[0]['row']['lr']:g}",
            mean_and_spread([e[2] for e in ends]),
            mean_and_spread(own) if own else "–",
            f"{statistics.fmean([e[1] / e[0] for e in ends]) / 1e6:.2f}",
            f"{statistics.fmean(reach) / 1e6:.1f}" + (f" ({len(reach)} of {len(runs)})" if len(reach) < len(runs) else "")
            if reach
            else "–",
            f"{statistics.fmean([m['seconds'] for m in runs]):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Target: accuracy {target:.3f}, nine tenths of FedAvg's." if target is not None else ""
    return "\n".join([*lines, "", note])


def reached(curve: Sequence[Sequence[float]], target: float | None) -> float | None:
    """Bytes in both directions, of all clients, until the accuracy first reaches the target; None if it never does."""
    return next((sent for _, sent, accuracy, *_ in curve if target is not None and accuracy >= target), None)


def plot(made: Sequence[Mapping[str, Any]], data: str, path: Path) -> None:
    """Plot accuracy over bytes: one line per method (mean over seeds), one panel per alpha."""
    alphas = sorted({m["row"]["alpha"] for m in made})
    figure, axes = plt.subplots(1, len(alphas), figsize=(6.5 * len(alphas), 5.5), squeeze=False, sharey=True)
    for axis, alpha in zip(axes[0], alphas, strict=True):
        for i, name in enumerate(sorted({m["row"]["name"] for m in made if m["row"]["alpha"] == alpha})):
            curves = [m["curve"] for m in made if m["row"]["alpha"] == alpha and m["row"]["name"] == name]
            points = [(statistics.fmean(p[1] for p in at) / 1e6, statistics.fmean(p[2] for p in at)) for at in zip(*curves, strict=True)]
            axis.plot(*zip(*points[1:], strict=True), label=name, color=plt.get_cmap("tab20")(i % 20), linestyle=("-", "--")[i // 20])
        axis.set(xscale="log", xlabel="MB both ways, whole cohort", ylabel="accuracy on the test", title=f"{data}, alpha = {alpha:g}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=["banking77", "sst2"], help="which studies")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="quick: for two cores; full: FedPETuning's, for a GPU")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="only these rows")
    parser.add_argument("--results", type=Path, default=Path("outputs/study"), help="folder of the runs (default: outputs/study)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every run")
    parser.add_argument("--no-run", action="store_true", help="only write the table and the plot of finished runs")
    parser.add_argument("--out", type=Path, help="folder for study-DATA.md and study-DATA.png")
    args = parser.parse_args()
    command = "FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.strategies " + shlex.join(
        a for a in sys.argv[1:] if a != "--no-run"
    )
    results = Results(args.results, args.set)
    try:
        for data in args.data:
            made = study(results, args.preset, data, args.only, run=not args.no_run)
            if not made:
                Console(stderr=True).print(f"{data}: nothing has run yet")
                continue
            tuning, counting = ROUNDS[args.preset][data]
            seconds = sum(k["seconds"] for k in results.known if k["row"]["data"] == data and k["row"]["preset"] == args.preset)
            parts = [f"# Strategies on {TITLES[data]}\n\n```\n{command}\n```\n"]
            parts.append(
                f"{len(made)} runs of {counting} rounds, after three tuning runs of {tuning} rounds for each method;"
                f" {seconds:.0f} s in all; {hardware()}. Accuracy on the global test, mean ± standard deviation over the seeds.\n"
            )
            ran = {(m["row"]["name"], m["row"]["alpha"], m["row"]["seed"]) for m in made}
            missing = [f"{n} (alpha = {al:g}, seed {k})" for n, al, ks in rows(args.preset, data) for k in ks if (n, al, k) not in ran]
            if missing and not args.only:
                parts.append(f"\nNot run yet: {', '.join(missing)}.\n")
            for alpha in sorted({m["row"]["alpha"] for m in made}):
                parts.append(f"\n## alpha = {alpha:g}\n\n{table(made, alpha)}\n")
            text = "\n".join(parts)
            print(text)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                plot(made, data, args.out / f"study-{data}.png")
                (args.out / f"study-{data}.md").write_text(f"{text}\n![accuracy over bytes](study-{data}.png)\n", encoding="utf-8")
    except FedtuneError as bad:
        sys.exit(f"study_strategies: {bad}")


if __name__ == "__main__":
    main()
