"""Accuracy and bytes of each codec of `traffic`: MiniLM on Banking77 under label skew.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.traffic --seeds 0 1 2 --out docs

Each row is FedAvg in the quick setting of the strategies study: `conf/banking77.yaml` with 100 clients, 10 of them sampled per round,
alpha = 0.1, and the learning rate chosen there for FedAvg. Only the codec differs. Bytes are those of Flower's messages to and from a
client per round, including headers. Finished runs are stored in RESULTS/runs.jsonl and not repeated; the table and the plot are made from
that file.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.runs.report import read_metrics
from fedtune.simulations.studies import strategies as study_strategies
from fedtune.simulations.studies.real import hardware, mean_and_spread
from fedtune.simulations.studies.strategies import Results, plot, reached

WHOLE = "fp32"  # the baseline
EVERY = 3  # rounds between evaluations: the resolution of the bytes to the target
CODECS: Mapping[str, str] = {  # row → overrides
    WHOLE: "traffic=fp32",
    "bf16": "traffic=bf16",
    "int8 up": "traffic=int8 traffic.down=fp32",
    "int8 both ways": "traffic=int8",
    "nf4 up, no feedback": "traffic=nf4 traffic.down=fp32 traffic.error_feedback=false",
    "nf4 up, int8 down, feedback": "traffic=nf4",
    "top 10 %": "traffic=topk traffic.topk=0.1 traffic.error_feedback=false",
    "top 10 %, feedback": "traffic=topk traffic.topk=0.1",
    "top 1 %": "traffic=topk traffic.topk=0.01 traffic.error_feedback=false",
    "top 1 %, feedback": "traffic=topk traffic.topk=0.01",
    "top 10 % int8, feedback": "traffic=topk traffic.topk=0.1 traffic.up=int8",
    "top 10 % int8, int8 down, feedback": "traffic=topk traffic.topk=0.1 traffic.up=int8 traffic.down=int8",
}
COLUMNS = (
    "traffic",
    "seeds",
    "accuracy",
    "clients' own",
    "MB up per client and round",
    "MB down",
    "smaller up",
    "MB to the target",
    "seconds per run",
)


@dataclass(frozen=True, kw_only=True)
class Row(study_strategies.Row):
    """One run: a codec, given by `name`, and a seed."""

    traffic: str

    def overrides(self) -> list[str]:
        mine = [o for o in super().overrides() if o != f"strategy={self.name}"]  # the name is a codec's; the strategy is FedAvg
        return [*mine, f"eval.every={EVERY}", *self.traffic.split()]


def row(name: str, seed: int, rounds: int, lr: float) -> Row:
    return Row(preset="quick", data="banking77", alpha=0.1, name=name, lr=lr, seed=seed, rounds=rounds, traffic=CODECS[name])


def costs(run: Path) -> tuple[float, float]:
    """Mean MB that a client sends and receives in a round, over all clients that reply."""
    turns = [r for r in read_metrics(run) if r["client"] is not None and "bytes_up" in r]
    return statistics.fmean(r["bytes_up"] for r in turns) / 1e6, statistics.fmean(r["bytes_down"] for r in turns) / 1e6


def table(made: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, in the codecs' order. The accuracy target is 90 % of the mean accuracy without a codec.

    Args:
        made: Runs from `Results`, each with `up` and `down` in MB.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for m in made:
        groups.setdefault(m["row"]["name"], []).append(m)
    whole = groups.get(WHOLE, [])
    target = 0.9 * statistics.fmean(m["curve"][-1][2] for m in whole) if whole else None
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, runs in groups.items():
        up = statistics.fmean(m["up"] for m in runs)
        own = [m["curve"][-1][3] for m in runs if m["curve"][-1][3] is not None]
        reach = [r for m in runs if (r := reached(m["curve"], target)) is not None]
        cells = [
            name,
            " ".join(str(m["row"]["seed"]) for m in runs),
            mean_and_spread([m["curve"][-1][2] for m in runs]),
            mean_and_spread(own) if own else "–",
            f"{up:.3f}",
            f"{statistics.fmean(m['down'] for m in runs):.3f}",
            f"{statistics.fmean(m['up'] for m in whole) / up:.1f} ×" if whole else "–",
            f"{statistics.fmean(reach) / 1e6:.1f} ({len(reach)} of {len(runs)})" if reach else "–",
            f"{statistics.fmean(m['seconds'] for m in runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Target: accuracy {target:.3f}, nine tenths of that without a codec; MB both ways, of all clients of a round." if target else ""
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of every codec per seed (default: 0)")
    parser.add_argument("--rounds", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="the clients' peak learning rate (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=list(CODECS), choices=list(CODECS), metavar="CODEC", help="only these rows")
    parser.add_argument("--results", type=Path, default=Path("outputs/study-traffic"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every run")
    parser.add_argument("--no-run", action="store_true", help="only write the table and the plot of finished runs")
    parser.add_argument("--out", type=Path, help="folder for study-traffic.md and study-traffic.png")
    args = parser.parse_args()
    flags = ["--seeds", *map(str, args.seeds), "--rounds", str(args.rounds), "--lr", f"{args.lr:g}"]  # without folders
    flags += [*(["--only", *args.only] if args.only != list(CODECS) else []), *(["--set", *args.set] if args.set else [])]
    results = Results(args.results, args.set)
    made = []
    try:
        for seed in args.seeds:  # all codecs of a seed before the next seed
            for name in args.only:
                wanted = row(name, seed, args.rounds, args.lr)
                if (found := results.find(wanted) if args.no_run else results.get(wanted)) is not None:
                    up, down = costs(Path(found["run"]))
                    made.append({**found, "up": up, "down": down})
    except FedtuneError as bad:
        sys.exit(f"study_traffic: {bad}")
    if not made:
        sys.exit("study_traffic: nothing has run yet")
    command = f"FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.traffic {shlex.join(flags)} --out docs"
    text = (
        f"# Traffic: accuracy against bytes\n\n```\n{command}\n```\n\n"
        f"{len(made)} runs of {args.rounds} rounds, lr {args.lr:g}; {sum(m['seconds'] for m in made):.0f} s in all; {hardware()}."
        f" Accuracy on the global test, mean ± standard deviation over the seeds.\n\n{table(made)}\n"
    )
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(made, "banking77", args.out / "study-traffic.png")
        (args.out / "study-traffic.md").write_text(f"{text}\n![accuracy over bytes](study-traffic.png)\n", encoding="utf-8")


if __name__ == "__main__":
    main()
