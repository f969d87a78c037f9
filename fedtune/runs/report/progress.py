"""Terminal output: progress bars during a run (plain lines if stderr is not a terminal), and tables at the start and end.

Progress goes to stderr; stdout is for results.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from fedtune.runs.report.summary import (
    CHOSEN,
    FORGETTING,
    Record,
    best,
    class_results,
    client_results,
    drops_text,
    duration,
    earlier_result,
    megabytes,
    number,
    primary_metric,
    rounds,
    size,
    total,
    value,
)
from fedtune.runs.report.tables import print_table

_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_ROWS, _MAX_BINS = 30, 24


class Progress:
    """Bars for the rounds and for the clients of the current round.

    Args:
        console: Where to draw; None is stderr. Without a terminal it prints one plain line per round, and notes.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: bars.Progress | None = None
        if self._console.is_terminal:
            self._bars = bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[news]}"),
                console=self._console,
                speed_estimate_period=1e9,  # the default ignores rounds older than 30 s and loses the ETA
            )
        self._of = 0
        self._rounds: bars.TaskID | None = None
        self._clients: bars.TaskID | None = None
        self._dropped = 0

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    def round_started(self, round: int, rounds: int, cohort: int) -> None:
        """Round `round` of `rounds` begins with `cohort` clients; 0 is the evaluation before training."""
        self._of, self._dropped = rounds, 0
        if not self._bars:
            return
        if self._rounds is None:
            # a resumed run starts at its own round: the bar is filled up to it, and the speed is measured from it
            self._rounds = self._bars.add_task("rounds ", total=rounds, completed=max(0, round - 1), news="")
            self._clients = self._bars.add_task("clients", total=None, news="")
        assert self._clients is not None
        self._bars.reset(self._clients, total=cohort, description="clients", news="before training" if round == 0 else "")

    def client_done(self, client: str, dropped: str | None) -> None:
        """One client's turn is over; `dropped` is the reason if it does not count, else None."""
        self._dropped += dropped is not None
        if self._bars and self._clients is not None:
            news = escape(client if dropped is None else f"{client} dropped, {dropped}")
            self._bars.update(self._clients, advance=1, news=f"{news}  ({self._dropped} dropped)" if self._dropped else news)

    def round_done(self, record: Record) -> None:
        """Show the round's line of metrics.jsonl."""
        if not self._bars:
            self._console.file.write(round_line(record, self._of) + "\n")
            self._console.file.flush()
        elif self._rounds is not None:
            metric = primary_metric([record])
            self._bars.update(self._rounds, completed=int(record["round"]), news=f"{metric} {number(value(record, metric))}")

    def note(self, text: str) -> None:
        """Print a line above the bars, or on its own without bars."""
        (self._bars.console if self._bars else self._console).print(text, markup=False, highlight=False, soft_wrap=True)


def round_line(record: Record, of: int) -> str:
    """`round 3/20  exact_match 0.412  clients 0.39 (worst decile 0.20)  6/8 counted (1 offline, 1 late)  4.1 s`, without missing values."""
    metric = primary_metric([record])
    parts = [f"round {record['round']}/{of}" if of else f"round {record['round']}"]
    if (v := value(record, metric)) is not None:
        parts.append(f"{metric} {number(v)}")
    if (v := value(record, "clients_mean")) is not None:
        worst = value(record, "clients_worst_decile")
        parts.append(f"clients {number(v, 2)}" + ("" if worst is None else f" (worst decile {number(worst, 2)})"))
    if (v := value(record, "clients_shared_mean")) is not None:
        parts.append(f"shared adapter {number(v, 2)}")
    if (v := value(record, FORGETTING)) is not None:
        parts.append(f"forgetting {number(v)}")
    if record.get("cohort"):
        drops = drops_text(record.get("dropped"))
        parts.append(f"{record.get('counted', 0)}/{record['cohort']} counted" + (f" ({drops})" if drops else ""))
    if (v := value(record, "seconds")) is not None:
        parts.append(duration(v))
    return "  ".join(parts)


def print_partition(summary: Mapping[str, Any], console: Console) -> None:
    """Print a table of the clients: class, rows, histogram of labels. Beyond 30 clients it shows only the number of the others.

    Args:
        summary: partition.json: `labels`, `clients` (id, device_class, train, held_out, histogram), `test`.
        console: Where to print; commands use stderr.
    """
    clients, labels = list(summary.get("clients", [])), list(summary.get("labels") or [])
    bins = min(len(labels), _MAX_BINS)
    counts = [f"{sum(c.get(part, 0) for c in clients):,}" for part in ("train", "held_out")]
    kinds = f"{len({c.get('device_class') for c in clients})} classes" if clients else ""
    header, footer = ["client", "class", "train", "held out"], [f"{len(clients)} clients", kinds, *counts]
    if labels:
        pooled = [sum(col) for col in zip(*(c["histogram"] for c in clients if c.get("histogram")), strict=True)]
        header.append(f"{len(labels)} labels" + (f" in {bins} bins" if bins < len(labels) else ""))
        footer.append(histogram(pooled, bins))
    rows = []
    for c in clients[:_MAX_ROWS]:
        row = [str(c["id"]), str(c.get("device_class") or "–"), f"{c.get('train', 0):,}", f"{c.get('held_out', 0):,}"]
        rows.append([*row, *([histogram(c.get("histogram") or [], bins)] if labels else [])])
    if len(clients) > _MAX_ROWS:
        rows.append([f"... and {len(clients) - _MAX_ROWS} more", *[""] * (len(header) - 1)])
    print_table(console, header, rows, title="Partition", left=["class", *header[4:]], footer=footer)
    if labels and len(labels) <= 12:
        console.print(f"labels: {', '.join(map(str, labels))}", markup=False, highlight=False)
    if summary.get("test") is not None:
        console.print(f"global test: {summary['test']:,} examples", markup=False, highlight=False)


def histogram(counts: Sequence[float], bins: int) -> str:
    """One bar per label (`·` is zero), scaled to the highest; with more labels than bins, neighboring labels are summed."""
    if not counts or not bins:
        return ""
    edges = [len(counts) * i // bins for i in range(bins + 1)]
    heights = [sum(counts[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    top = max(heights) or 1
    return "".join("·" if h <= 0 else _BLOCKS[min(7, int(8 * h / top))] for h in heights)


def print_results(records: Iterable[Record], console: Console, partition: Mapping[str, Any] | None = None) -> None:
    """Print the run's results: before training, best and last round; forgetting, if measured; then one line per device class.

    Args:
        records: Records from `read_metrics`.
        console: Where to print; commands use stderr.
        partition: partition.json, for the device classes of clients that never took part.
    """
    rows = list(records)
    metric, lines = primary_metric(rows), rounds(rows)
    if not lines:
        console.print("no round has finished: there are no results yet", highlight=False)
        return
    done = [r for r in lines if r["round"] > 0]
    shown = []
    if lines[0]["round"] == 0:
        shown.append([f"round 0 ({'warm start' if 'start' in lines[0] else 'untuned'})", *_cells(lines[:1], lines[0], metric)])
    if done and (top := best(done, metric)) is not None and top is not done[-1]:
        shown.append([f"round {top['round']} (best)", *_cells([r for r in done if r["round"] <= top["round"]], top, metric)])
    if done:
        shown.append([f"round {done[-1]['round']} (last)", *_cells(done, done[-1], metric)])
    header = ["", metric, "clients mean", "worst decile", "loss", "bytes up", "bytes down", "time"]
    print_table(console, header, shown, title="Results")
    if kept := earlier_result(lines):
        console.print(kept.sentence(), markup=False, highlight=False, soft_wrap=True)
    classes = class_results(client_results(rows, metric, partition), metric)
    if not classes:
        return
    shown = []
    for c in classes:
        scores = (f"{number(c.before)} → {number(c.after)}", number(c.worst), str(c.counted))
        costs = (duration(c.seconds), size(c.bytes_up + c.bytes_down), megabytes(c.peak_mb))
        shown.append([c.device_class, str(c.clients), *scores, drops_text(c.dropped) or "none", *costs])
    header = ["class", "clients", f"{metric}: before → after", "worst decile", "turns", "dropped", "time", "traffic", "peak"]
    print_table(console, header, shown, title="Device classes", wrap=["dropped"])
    if chose := [c for c in classes if c.chosen]:
        shown = [[c.device_class, *(c.chosen[k] or "–" for k in CHOSEN), duration(c.device_s)] for c in chose]
        header = ["class", *CHOSEN.values(), "device time"]
        print_table(console, header, shown, title="Devices' choices per turn", wrap=["precision"])


def _cells(spent: Sequence[Record], row: Record, metric: str) -> list[str]:
    """The row's metrics, and the total cost up to it."""
    scores = [number(value(row, k)) for k in (metric, "clients_mean", "clients_worst_decile", "loss")]
    return [*scores, size(total(spent, "bytes_up")), size(total(spent, "bytes_down")), duration(total(spent, "seconds"))]
