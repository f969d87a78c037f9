"""Summary values of a run's records, shared by the terminal tables and the HTML report.

A record is one line of metrics.jsonl: a round's (client null) or one client's turn in a round. Higher is better except for LOWER.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.contracts.scores import SHARED, worst_decile
from fedtune.contracts.task import higher_is_better, metrics

Record = Mapping[str, Any]

NO_CLASS = "all devices"
EARLIER, FORGETTING = "earlier_", "forgetting"  # in a warm start: prefix of the metrics on the earlier test rows; their loss since the best
CHOSEN = {  # a device's choices for a turn → their headings
    "precision": "precision",
    "rank": "rank",
    "micro_batch": "micro-batch",
    "kept_layers": "kept layers",
    "batch": "batch",
    "length": "longest row",
    "steps": "steps",
    "out_of_memory": "out of memory",
}


def primary_metric(records: Iterable[Record]) -> str:
    """The run's primary metric, from round lines or else client lines; "loss" if no metric is reported."""
    rows = list(records)
    for group in (rounds(rows), turns(rows)):
        for name in metrics():
            if any(value(r, name) is not None for r in group):
                return name
    return "loss"


def value(record: Record | None, key: str) -> float | None:
    """The number under `key`; None if it is null, text, missing or NaN."""
    v = record.get(key) if record else None
    return float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) and v == v else None


def rounds(records: Iterable[Record]) -> list[Record]:
    """The round lines by round; for duplicate rounds, the later line."""
    found = {int(r["round"]): r for r in records if r.get("client") is None}
    return [found[k] for k in sorted(found)]


def turns(records: Iterable[Record]) -> list[Record]:
    """The client lines by (round, client). Lines of one client in one round (training, evaluation) are merged."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for r in records:
        if r.get("client") is not None:
            found.setdefault((int(r["round"]), str(r["client"])), {}).update(r)
    return [found[k] for k in sorted(found)]


def best(rows: Sequence[Record], metric: str) -> Record | None:
    """The round line with the best `metric`, the earliest if tied; None if no line has it."""
    scored = [r for r in rows if value(r, metric) is not None]
    if not scored:
        return None
    return (max if higher_is_better(metric) else min)(scored, key=lambda r: value(r, metric) or 0.0)


def start_of(rows: Sequence[Record]) -> str:
    """The model of round 0 in words: `untuned`, or `from NAME` in a warm start."""
    start = rows[0].get("start") if rows else None
    return f"from {start['from']}" if isinstance(start, Mapping) and "from" in start else "untuned"


@dataclass(frozen=True, kw_only=True)
class EarlierResult:
    """The primary metric on the test rows of the run that a warm start began with."""

    metric: str
    before: float  # round 0, or the first round that has it
    after: float
    forgetting: float  # the best value so far less the last one, so that more is worse

    def sentence(self) -> str:
        numbers = f"{number(self.before)} → {number(self.after)}"
        return f"earlier test rows: {self.metric} {numbers}, forgetting {number(self.forgetting)} (best value less the last one)"


def earlier_result(rows: Sequence[Record]) -> EarlierResult | None:
    """The result on the earlier test rows; None if they are not measured."""
    for name in metrics():
        values = [v for r in rows if (v := value(r, EARLIER + name)) is not None]
        lost = [v for r in rows if (v := value(r, FORGETTING)) is not None]
        if values and lost:
            return EarlierResult(metric=name, before=values[0], after=values[-1], forgetting=lost[-1])
    return None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def known_sum(values: Iterable[float | None]) -> float | None:
    """Sum of the known values; None if none is known."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def total(rows: Iterable[Record], key: str) -> float:
    return sum(value(r, key) or 0.0 for r in rows)


@dataclass(frozen=True, kw_only=True)
class ClientResult:
    """One client over the whole run: its held-out metric before (round 0) and after the run, its turns and its costs.

    `gain` is what its personal adapter gains over the shared one in the last evaluation, positive if it is better; None without one.
    """

    client: str
    device_class: str
    before: float | None
    after: float | None
    counted: int  # turns that trained and were not dropped
    dropped: Counter[str]  # why → turns
    train: int | None  # rows
    seconds: float | None  # None if no turn reported it; private turns do not
    bytes_up: float
    bytes_down: float
    peak_mb: float | None
    device_s: Sequence[float] = ()  # simulated seconds of each turn
    chosen: Mapping[str, Sequence[float | str]] = field(default_factory=dict)  # key of CHOSEN → the choices of its turns, in order
    gain: float | None = None


def client_results(records: Iterable[Record], metric: str, partition: Mapping[str, Any] | None = None) -> list[ClientResult]:
    """All clients of the records or the partition, by id."""
    known = {str(c["id"]): c for c in (partition or {}).get("clients", [])}
    by_client: dict[str, list[Record]] = {name: [] for name in known}
    for turn in turns(records):
        by_client.setdefault(str(turn["client"]), []).append(turn)
    out = []
    for name, mine in sorted(by_client.items()):
        scores = [(int(t["round"]), v) for t in mine if (v := value(t, metric)) is not None]
        examples = [int(v) for t in mine if (v := value(t, "examples")) is not None]
        peaks = [v for t in mine if (v := value(t, "peak_mb")) is not None]
        classes = [str(t["device_class"]) for t in mine if t.get("device_class")]
        named = known.get(name, {})
        out.append(
            ClientResult(
                client=name,
                device_class=classes[-1] if classes else str(named.get("device_class") or NO_CLASS),
                before=scores[0][1] if scores and scores[0][0] == 0 else None,
                after=scores[-1][1] if scores and scores[-1][0] > 0 else None,
                counted=sum("staleness" in t or (not t.get("dropped") and value(t, "steps") is not None) for t in mine),
                dropped=Counter(drop_kind(t["dropped"]) for t in mine if t.get("dropped")),
                train=int(named["train"]) if "train" in named else (examples[-1] if examples else None),
                seconds=known_sum(value(t, "seconds") for t in mine),
                bytes_up=total(mine, "bytes_up"),
                bytes_down=total(mine, "bytes_down"),
                peak_mb=max(peaks) if peaks else None,
                device_s=[v for t in mine if (v := value(t, "virtual_s"))],
                chosen=_chosen([t for t in mine if t.get("precision")]),
                gain=_gain(mine, metric),
            )
        )
    return out


def _gain(turns: Sequence[Record], metric: str) -> float | None:
    """The difference in the last evaluation after round 0."""
    pairs = [(value(t, metric), value(t, SHARED + metric)) for t in turns if int(t["round"]) > 0]
    both = [(own, shared) for own, shared in pairs if own is not None and shared is not None]
    return None if not both else (both[-1][0] - both[-1][1]) * (1 if higher_is_better(metric) else -1)


def _chosen(turns: Sequence[Record]) -> Mapping[str, Sequence[float | str]]:
    """The choices of these turns; turns without choices report none."""
    out: dict[str, Sequence[float | str]] = {"precision": [str(t["precision"]) for t in turns]}
    return out | {k: [v for t in turns if (v := value(t, k)) is not None] for k in CHOSEN if k != "precision"}


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """All clients of one device class; metrics are means over clients."""

    device_class: str
    clients: int
    before: float | None
    after: float | None
    worst: float | None  # the clients' worst decile
    counted: int
    dropped: Counter[str] = field(default_factory=Counter)
    seconds: float | None = None
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    peak_mb: float | None = None
    device_s: float | None = None  # mean per turn
    chosen: Mapping[str, str] = field(default_factory=dict)  # formatted by `span`


def class_results(clients: Iterable[ClientResult], metric: str) -> list[ClassResult]:
    """One result per device class, by name."""
    groups: dict[str, list[ClientResult]] = {}
    for c in clients:
        groups.setdefault(c.device_class, []).append(c)
    out = []
    for name, mine in sorted(groups.items()):
        after = [c.after for c in mine if c.after is not None]
        peaks = [c.peak_mb for c in mine if c.peak_mb is not None]
        chosen = {k: [v for c in mine for v in c.chosen.get(k, ())] for k in CHOSEN}
        out.append(
            ClassResult(
                device_class=name,
                clients=len(mine),
                before=mean([c.before for c in mine if c.before is not None]),
                after=mean(after),
                worst=worst_decile(after, higher_is_better=higher_is_better(metric)),
                counted=sum(c.counted for c in mine),
                dropped=sum((c.dropped for c in mine), Counter()),
                seconds=known_sum(c.seconds for c in mine),
                bytes_up=sum(c.bytes_up for c in mine),
                bytes_down=sum(c.bytes_down for c in mine),
                peak_mb=max(peaks) if peaks else None,
                device_s=mean([s for c in mine for s in c.device_s]),
                chosen={k: span(v) for k, v in chosen.items()} if chosen["precision"] else {},
            )
        )
    return out


def span(values: Sequence[float | str]) -> str:
    """`2`, `1–4`, `int8, nf4`: the values' range, or the distinct texts."""
    numbers, words = [v for v in values if not isinstance(v, str)], sorted({v for v in values if isinstance(v, str)})
    if words or not numbers:
        return ", ".join(words)
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def drop_kind(reason: object) -> str:
    """`late: 41 s of 30 s` → `late`."""
    return str(reason).split(":", 1)[0].strip()


def drops_text(dropped: Mapping[str, Any] | None) -> str:
    """`{"late": 1, "offline": 2}` → `2 offline, 1 late`: offline, late, failed, then the others by name, without zeros."""
    return ", ".join(f"{n} {kind}" for kind, n in ordered_drops(dropped).items())


def ordered_drops(dropped: Mapping[str, Any] | None) -> dict[str, int]:
    order = {"offline": 0, "late": 1, "failed": 2}
    items = sorted((dropped or {}).items(), key=lambda kv: (order.get(kv[0], 3), kv[0]))
    return {kind: int(n) for kind, n in items if n}


def number(v: float | None, digits: int = 3) -> str:
    """A metric as text: fixed decimals, one fewer from 10 up, one decimal from 100 up; – for None."""
    if v is None:
        return "–"
    if abs(v) < 100:
        return f"{v:.{digits if abs(v) < 10 else max(0, digits - 1)}f}"
    return f"{v:,.{min(digits, 1)}f}"


def signed(v: float | None) -> str:
    """A difference as text, with its sign: `+0.031`, `−0.002`."""
    return "–" if v is None else f"{'−' if v < 0 else '+'}{number(abs(v))}"


def size(v: float | None) -> str:
    """Bytes as text, in powers of 1000."""
    if v is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(v) < 1000:
            return f"{v:.0f} {unit}" if unit == "B" or v >= 100 else f"{v:.1f} {unit}"
        v /= 1000
    return f"{v:.1f} TB"


def megabytes(v: float | None) -> str:
    """MB as text, with one decimal below 100."""
    return "–" if v is None else f"{v:.1f} MB" if v < 100 else f"{v:,.0f} MB"


def duration(v: float | None) -> str:
    """Seconds as text: `4.1 s`, `3 min 20 s`, `2 h 05 min`."""
    if v is None:
        return "–"
    if v < 60:
        return f"{v:.1f} s"
    minutes, seconds = divmod(round(v), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
