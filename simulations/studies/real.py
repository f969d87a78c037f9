"""Studies with real data and pretrained weights: Shakespeare's speakers, Banking77 under label skew, Dolly with ten clients.

    FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.real banking77 --seeds 0 1 2 --out results.md

Each row is a scenario of `conf/` (shakespeare, banking77, dolly) with the row's settings; every run writes a normal run directory.
Shakespeare is compared with the results of a plain FedAvg-LoRA loop: r = 8 on all linears, 20 speakers per round, 5 steps of 8 x 128
tokens.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fedtune.clients.workspace import workspace
from fedtune.config import Config, to_dict
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import IGNORED
from fedtune.errors import FedtuneError
from fedtune.experiment import simulate
from fedtune.runs.report import read_metrics

PLAIN_LOOP = {"pretrained": {0: 4.43, 10: 3.02, 20: 2.92, 40: 2.83}, "random": {0: 6.25, 40: 5.92}}  # nats by round; random: 40 assumed
STUDIES = ("shakespeare", "banking77", "dolly")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One scenario with overrides, and the name of its row."""

    name: str
    scenario: str
    overrides: Sequence[str] = ()
    first_seed_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One run: its setting, seed and duration, and its scores by column."""

    setting: str
    seed: int
    seconds: float
    scores: Mapping[str, float]


def settings(study: str, rounds: Sequence[int], inits: Sequence[str], alphas: Sequence[float]) -> list[Setting]:
    """The rows of a study's table."""
    if study == "shakespeare":
        known = [Setting(name=f"pretrained, {n} rounds", scenario=study, overrides=[f"rounds={n}"]) for n in rounds]
        last = max(rounds)
        drawn = Setting(
            name=f"random, {last} rounds",
            scenario=study,
            overrides=[f"rounds={last}", "model.init=random", "client.lr=1e-2"],
            first_seed_only=True,
        )
        return [*(known if "pretrained" in inits else []), *([drawn] if "random" in inits else [])]
    if study == "banking77":
        skewed = {a: Setting(name=f"Dirichlet alpha = {a:g}", scenario=study, overrides=[f"partition.alpha={a:g}"]) for a in alphas}
        even = Setting(name="IID", scenario=study, overrides=["partition=iid", "partition.clients=20"])
        return [even if math.isinf(a) else s for a, s in skewed.items()]
    return [Setting(name="natural, 10 clients", scenario=study)]


def run(setting: Setting, seed: int, extra: Sequence[str]) -> Result:
    """Run one row and read its scores from the run directory."""
    (job,) = compose([f"conf={setting.scenario}", *setting.overrides, f"seed={seed}", *extra])
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table
        folder = simulate(job.config)
    seconds = time.perf_counter() - start
    scores = read_scores(read_metrics(folder))
    if setting.scenario == "shakespeare":
        scores |= marks_aside(job.config, folder)
    result = Result(setting=setting.name, seed=seed, seconds=seconds, scores=scores)
    print(f"{result}\n{folder}", file=sys.stderr, flush=True)  # show each run's result at once
    return result


def read_scores(records: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Return scores of the global test before (round 0) and after training (last round), and of the clients after it."""
    rounds = [r for r in records if r["client"] is None]
    first, last = rounds[0], rounds[-1]
    out = {}
    for key, name in (("loss", "nats"), ("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        for when, record in (("before", first), ("after", last)):
            if isinstance(value := record.get(key), (int, float)):
                out[f"{name} {when}"] = float(value)
    what = "accuracy" if "accuracy" in last else "perplexity"
    for key, name in (("clients_mean", f"clients' {what}"), ("clients_worst_decile", "of the worst tenth")):
        if isinstance(value := last.get(key), (int, float)):
            out[name] = float(value)
    return out


def marks_aside(config: Config, folder: Path) -> dict[str, float]:
    """Return nats on the test without the BOS and EOS tokens between speeches, which are new to the untuned model and easy to learn: they
    would inflate the gain."""
    space = workspace(json.dumps(to_dict(config)))  # the run's workspace, still loaded
    tokenizer = space.backbone.tokenizer
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    words = [dataclasses.replace(e, labels=np.where(np.isin(e.labels, marks), IGNORED, e.labels)) for e in space.test_examples()]
    after = AdapterState.load(folder / "adapter" / "fedtune.safetensors")
    (first,), (last,) = space.score(space.initial, words), space.score(after, words)
    return {"words before": first["loss"], "words after": last["loss"]}


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.712 ± 0.010`: mean and sample standard deviation; only the value if there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(results: Sequence[Result], reference: Mapping[str, str] | None = None) -> str:
    """A Markdown table: one row per setting, in order of appearance, with mean and spread over the seeds.

    Args:
        results: Results of one study, all with the same scores.
        reference: Setting → text of the last column; None omits the column.
    """
    names = list(dict.fromkeys(r.setting for r in results))
    columns = list(results[0].scores)
    head = ["setting", "seeds", *columns, "seconds per run", *(["plain loop, nats before → after"] if reference else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        rows = [r for r in results if r.setting == name]
        cells = [name, " ".join(str(r.seed) for r in rows)]
        cells += [mean_and_spread([r.scores[c] for r in rows]) for c in columns]
        cells.append(f"{statistics.fmean([r.seconds for r in rows]):.0f}")
        if reference:
            cells.append(reference.get(name, ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain_loop(rows: Sequence[Setting]) -> dict[str, str]:
    """Setting → result of the plain loop."""
    out = {}
    for row in rows:
        init, rounds = row.name.split(", ")
        known = PLAIN_LOOP[init]
        if (after := known.get(int(rounds.split()[0]))) is not None:
            out[row.name] = f"{known[0]} → {after}"
    return out


def hardware() -> str:
    """A short description of the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "all"], help="which study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of every setting per seed (default: 0 1 2)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[10, 20, 40], help="shakespeare: numbers of rounds (default: 10 20 40)")
    parser.add_argument(
        "--inits",
        nargs="+",
        choices=["pretrained", "random"],
        default=["pretrained", "random"],
        help="shakespeare: initial weights; random only runs with the most rounds and the first seed (default: both)",
    )
    parser.add_argument(
        "--alphas", type=float, nargs="+", default=[0.1, 1, 10], help="banking77: Dirichlet's alpha, inf is IID (default: 0.1 1 10)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for every run, such as engine.threads=1")
    parser.add_argument("--out", type=Path, help="file to append the Markdown to; it is always printed")
    args = parser.parse_args()
    command = "FEDTUNE_DATA=path/to/data python -m fedtune.simulations.studies.real " + shlex.join(sys.argv[1:])
    try:
        for study in STUDIES if args.study == "all" else [args.study]:
            rows = settings(study, args.rounds, args.inits, args.alphas)
            results = [run(row, seed, args.set) for row in rows for seed in (args.seeds[:1] if row.first_seed_only else args.seeds)]
            total = sum(r.seconds for r in results)
            note = f"{len(results)} runs, {total:.0f} s in all; {hardware()}; mean ± standard deviation over the seeds."
            summary = table(results, plain_loop(rows) if study == "shakespeare" else None)
            text = f"## {study}\n\n```\n{command}\n```\n{note}\n\n{summary}\n"
            print(text)
            if args.out:
                with args.out.open("a", encoding="utf-8") as f:
                    f.write("\n" + text)
    except FedtuneError as bad:
        sys.exit(f"study_real: {bad}")


if __name__ == "__main__":
    main()
