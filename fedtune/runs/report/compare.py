"""Compares finished runs: mean ± standard deviation over seeds and paired differences, as a table, Markdown, CSV and a plot.

Runs whose configs differ only in the seed form one setting. Differences between settings are computed per seed and then averaged, so that
effects of the seed on both (partition, order of clients) cancel.
"""

import csv
import io
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.config import Config, to_dict
from fedtune.contracts.scores import worst_decile
from fedtune.contracts.task import higher_is_better
from fedtune.errors import ConfigError
from fedtune.runs.report import summary
from fedtune.runs.report.metrics import read_metrics
from fedtune.storage.atomic import write_text

_IGNORED = frozenset({"seed", "name", "output_dir", "resume"})  # keys that may differ within one setting


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished run.

    Args:
        path: Its directory.
        config: Its config.
        records: Its metrics.
    """

    path: Path
    config: Config
    records: Sequence[summary.Record]

    @cached_property
    def values(self) -> dict[str, str]:
        """Config key → value as text, without the keys that may differ within one setting."""
        return {k: v for k, v in _flat(to_dict(self.config)).items() if k not in _IGNORED}

    def curve(self, metric: str) -> dict[int, float]:
        """Round → value."""
        return {int(r["round"]): v for r in summary.rounds(self.records) if (v := summary.value(r, metric)) is not None}

    def figures(self, metric: str) -> dict[str, float | None]:
        """The last value of the metric, and the table's other columns."""
        last = list(self.curve(metric).values())
        clients = summary.client_results(self.records, metric)
        after = [c.after for c in clients if c.after is not None]
        rows = summary.rounds(self.records)
        return {
            metric: last[-1] if last else None,
            "clients": summary.mean(after),
            "worst tenth": worst_decile(after, higher_is_better=higher_is_better(metric)),
            "gain": summary.mean([c.gain for c in clients if c.gain is not None]),
            "MB up": summary.total(rows, "bytes_up") / 1e6,
            "MB down": summary.total(rows, "bytes_down") / 1e6,
            "seconds": summary.total(rows, "seconds"),
        }


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ only in the seed.

    Args:
        label: The config values that distinguish it from the other settings.
        runs: Seed → run.
    """

    label: str
    runs: Mapping[int, Finished]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Settings in the order of their first runs; the first is the baseline.

    Args:
        metric: The metric to compare.
        settings: At least one.
        also: Further keys that differ between settings but are not in the labels.
    """

    metric: str
    settings: Sequence[Setting]
    also: Sequence[str]

    def cell(self, setting: Setting, column: str) -> str:
        """`mean ± std` over the setting's seeds."""
        return spread([v for r in setting.runs.values() if (v := r.figures(self.metric)[column]) is not None])

    def difference(self, setting: Setting) -> str:
        """`mean ± std (n)` of this setting's metric minus the baseline's, over the n common seeds."""
        first = self.settings[0]
        if setting is first:
            return "–"
        both = [(setting.runs[s].figures(self.metric)[self.metric], first.runs[s].figures(self.metric)[self.metric])
                for s in sorted(set(setting.runs) & set(first.runs))]  # fmt: skip
        pairs = [a - b for a, b in both if a is not None and b is not None]
        return f"{spread(pairs, sign=True)} ({len(pairs)})" if pairs else "no common seed"

    @cached_property
    def columns(self) -> list[str]:
        """The columns after the metric that some run has."""
        each = [run.figures(self.metric) for setting in self.settings for run in setting.runs.values()]
        return [c for c in each[0] if c != self.metric and any(figures[c] is not None for figures in each)]

    @property
    def header(self) -> list[str]:
        return ["setting", "seeds", self.metric, "difference (pairs)", *self.columns]

    def rows(self) -> list[list[str]]:
        """The table's cells, one row per setting."""
        return [
            [s.label, str(len(s.runs)), self.cell(s, self.metric), self.difference(s), *(self.cell(s, c) for c in self.columns)]
            for s in self.settings
        ]

    def notes(self) -> list[str]:
        """Notes below the table."""
        better = "higher" if higher_is_better(self.metric) else "lower"
        out = [f"{self.metric} after the last round, {better} is better: mean ± standard deviation over seeds."]
        if len(self.settings) > 1:
            out.append(f"Differences are paired by seed, from the first setting, {self.settings[0].label}.")
        if self.also:
            out.append(f"Settings also differ in these keys: {', '.join(self.also)}.")
        return out


def compare(configs: Mapping[Path, Config], metric: str | None = None) -> Comparison:
    """Read the metrics of finished runs and group them by their settings.

    Args:
        configs: Run directory → the run's config.
        metric: Metric to compare; None takes the runs' primary metric, which must be the same in all.

    Raises:
        ConfigError: There is no run, a run has not finished, two have the same config and seed, or they have no common metric.
        CheckpointError: The metrics of a run cannot be read.
    """
    if not configs:
        raise ConfigError("there is no run to compare: give run directories, such as outputs/heterogeneous/*")
    runs = [Finished(path=p, config=c, records=read_metrics(p)) for p, c in configs.items()]
    for run in runs:
        done, rounds = rounds_done(run.records), run.config.rounds
        if done < rounds:
            raise ConfigError(f"{run.path} has done {done} of {rounds} rounds: finish it with resume={run.path}, or leave it out")
    found = sorted({metric} if metric else {summary.primary_metric(r.records) for r in runs})
    if len(found) > 1:
        raise ConfigError(f"the runs report different metrics ({', '.join(found)}): choose one that all have with --metric")
    if missing := [r for r in runs if not r.curve(found[0])]:
        raise ConfigError(f"{missing[0].path} does not report {found[0]}: choose another --metric")
    return Comparison(metric=found[0], **_settings(runs))


def rounds_done(records: Iterable[summary.Record]) -> int:
    """The last round with a line; -1 if there is none."""
    return max((int(r["round"]) for r in summary.rounds(records)), default=-1)


def finished(path: Path, config: Config) -> bool:
    """Whether the run at `path` with this config has written all its output."""
    parts = ["adapter/README.md", *(["merged/config.json"] if config.inference.export == "hf" else [])]
    return all((path / p).is_file() for p in parts) and rounds_done(read_metrics(path)) >= config.rounds


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """`0.912 ± 0.013` (sample standard deviation, n - 1); the mean alone for one value; – for none."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    text = ("+" if sign and mean > 0 else "") + summary.number(mean)
    return f"{text} ± {summary.number(statistics.stdev(values))}" if len(values) > 1 else text


def show(comparison: Comparison, fixed: str = "") -> None:
    """Print the settings by number, then the table in 80 columns."""
    from rich.console import Console

    from fedtune.runs.report.tables import print_table

    console = Console(width=None if sys.stdout.isatty() else 80)
    rows = []
    for number, (label, *cells) in enumerate(comparison.rows(), start=1):
        console.print(f"{number:>2}  {label}", highlight=False, markup=False)
        rows.append([f"{number:>2}", *cells])
    print_table(console, ["", *comparison.header[1:]], rows, box=None)
    for note in [*comparison.notes(), *([f"Common to all: {fixed}"] if fixed else [])]:
        console.print(note, style="dim", highlight=False, markup=False)


def markdown(comparison: Comparison, fixed: str = "") -> str:
    """The table as GitHub Markdown, then the notes and the overrides that all runs share."""
    lines = [comparison.header, ["---"] * len(comparison.header), *comparison.rows()]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = [*comparison.notes(), *([f"Common to all: `{fixed}`."] if fixed else [])]
    return "\n\n".join([table, *notes]) + "\n"


def table_csv(comparison: Comparison) -> str:
    """One row per run: setting, seed, path, and its figures as numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", "seed", "run", comparison.metric, *comparison.columns])
    for setting in comparison.settings:
        for seed, run in sorted(setting.runs.items()):
            figures = run.figures(comparison.metric)
            values = (figures[c] for c in (comparison.metric, *comparison.columns))
            writer.writerow([setting.label, seed, run.path, *("" if v is None else v for v in values)])
    return out.getvalue()


def write(comparison: Comparison, folder: Path, fixed: str = "") -> None:
    """Write compare.md, compare.csv and compare.png into the folder, and create it if needed.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "compare.md", markdown(comparison, fixed))
        write_text(folder / "compare.csv", table_csv(comparison))
        _plot(comparison, folder / "compare.png")
    except OSError as bad:
        raise ConfigError(f"cannot write the comparison to {folder}: {bad.strerror or bad}; choose another folder") from None


def _plot(comparison: Comparison, path: Path) -> None:
    """The metric by round: each setting's mean as a line with a band of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for setting in comparison.settings:
        curves = [r.curve(comparison.metric) for r in setting.runs.values()]
        rounds = sorted(set.intersection(*(set(c) for c in curves)))
        means = [statistics.fmean(c[k] for c in curves) for k in rounds]
        stds = [statistics.stdev([c[k] for c in curves]) if len(curves) > 1 else 0.0 for k in rounds]
        (line,) = axes.plot(rounds, means, marker="o", markersize=3, label=f"{setting.label} (n = {len(curves)})")
        low, high = [m - s for m, s in zip(means, stds, strict=True)], [m + s for m, s in zip(means, stds, strict=True)]
        axes.fill_between(rounds, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="round", ylabel=comparison.metric)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, format="png")


def _settings(runs: Sequence[Finished]) -> dict[str, Any]:
    named, also = _distinguishing_keys(runs)
    groups: dict[tuple[tuple[str, str], ...], dict[int, Finished]] = {}
    for run in runs:
        group = groups.setdefault(tuple(sorted(run.values.items())), {})
        if (twin := group.get(run.config.seed)) is not None:
            raise ConfigError(f"{twin.path} and {run.path} have the same settings and seed {run.config.seed}: leave one out")
        group[run.config.seed] = run
    settings = []
    for group in groups.values():
        values = next(iter(group.values())).values
        label = " ".join(f"{k.removesuffix('._target_')}={values[k].rpartition('.')[2] if k.endswith('._target_') else values[k]}"
                         for k in named if k in values)  # fmt: skip
        settings.append(Setting(label=label or "all runs", runs=group))
    return {"settings": settings, "also": also}


def _distinguishing_keys(runs: Sequence[Finished]) -> tuple[list[str], list[str]]:
    """The keys that distinguish the settings, in the config's order, and the other keys that differ among the runs that have them."""
    keys = list(dict.fromkeys(k for r in runs for k in r.values))
    differing = [k for k in keys if len({r.values.get(k) for r in runs}) > 1]
    named: list[str] = []
    for key in differing:
        before = {tuple(r.values.get(k) for k in named) for r in runs}
        if len({tuple(r.values.get(k) for k in (*named, key)) for r in runs}) > len(before):
            named.append(key)
    return named, [k for k in differing if k not in named and len({r.values[k] for r in runs if k in r.values}) > 1]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for name, x in value.items() for k, v in _flat(x, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: "null" if value is None else str(value)}
