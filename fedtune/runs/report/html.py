"""report.html: a run's results, curves, clients, traffic, partition, answers and config in one file without scripts or external resources.

It is built as an element tree, so that the serializer escapes all text of a run (client ids, model answers).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from fedtune.contracts.task import higher_is_better
from fedtune.errors import CheckpointError
from fedtune.runs.report import page, plots
from fedtune.runs.report.metrics import read_metrics
from fedtune.runs.report.page import element as e
from fedtune.runs.report.plots import Series
from fedtune.runs.report.summary import (
    CHOSEN,
    EARLIER,
    FORGETTING,
    ClassResult,
    ClientResult,
    Record,
    best,
    class_results,
    client_results,
    drops_text,
    duration,
    earlier_result,
    megabytes,
    number,
    ordered_drops,
    primary_metric,
    rounds,
    signed,
    size,
    start_of,
    total,
    value,
)
from fedtune.storage.atomic import write_text
from fedtune.storage.parsing import parse_json, parse_yaml, read_text
from fedtune.version import __version__

_SECRET = {"key", "token", "secret", "password", "passphrase", "credential", "credentials", "apikey"}  # words of a config key


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory atomically, from the data so far, and return its path.

    Reads metrics.jsonl, and config.yaml, partition.json and answers.json if present.

    Raises:
        CheckpointError: metrics.jsonl is missing, or a file is damaged.
    """
    records = read_metrics(run_dir)
    config = _read(run_dir / "config.yaml", parse_yaml, dict)
    partition = _read(run_dir / "partition.json", parse_json, dict)
    answers = _read(run_dir / "answers.json", parse_json, list)
    metric, lines = primary_metric(records), rounds(records)
    clients = client_results(records, metric, partition)
    names = sorted({c.device_class for c in clients})
    colors = {name: i for i, name in enumerate(names, 1)}
    title = str((config or {}).get("name") or run_dir.name)
    body = e(
        "main",
        None,
        *_headline(title, run_dir, lines, clients, metric, (config or {}).get("rounds")),
        *_answers(answers or [], lines, start_of(lines), judged=any(value(r, "exact_match") is not None for r in records)),
        *_curves(lines, metric),
        *_clients(clients, metric, colors),
        *_costs(lines),
        *_partition(partition, colors),
        *_config(config or {}),
    )
    path = run_dir / "report.html"
    write_text(path, page.render(f"{title} · fedtune", body))
    return path


def _read(path: Path, parse: Callable[[str], Any], kind: type) -> Any:
    """The parsed file; None if it is missing."""
    if not path.exists():
        return None
    try:
        found = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}): restore it or move it away") from error
    if not isinstance(found, kind):
        raise CheckpointError(f"{path} should hold a {kind.__name__}, not a {type(found).__name__}: restore it or move it away")
    return found


def _headline(
    title: str, run_dir: Path, lines: Sequence[Record], clients: Sequence[ClientResult], metric: str, planned: object
) -> list[Element]:
    done = [r for r in lines if r["round"] > 0]
    first = lines[0] if lines and lines[0]["round"] == 0 else None
    here = any(value(r, metric) is not None for r in lines) or all(value(r, "clients_mean") is None for r in lines)
    key = metric if here else "clients_mean"
    last = next((r for r in reversed(done) if key in r), done[-1] if done else None)  # the last evaluated round
    top = best(done, metric)
    up, down, seconds = total(lines, "bytes_up"), total(lines, "bytes_down"), total(lines, "seconds")
    count = f"{len(done)}" if planned in (None, len(done)) else f"{len(done)} of {planned}"
    change = f"{number(value(first, key))} → {number(value(last, key))}" if last else number(value(first, key))
    note = f"{start_of(lines)} → round {last['round']}" if last else "no tuned round finished yet"
    note += "; higher is better" if higher_is_better(metric) else "; lower is better"
    if top is not None and last is not None and top["round"] != last["round"]:
        note += f"; best {number(value(top, metric))} in round {top['round']}"
    n = len({c.device_class for c in clients})
    kinds = f"{n} device class{'es' if n > 1 else ''}" if n else "none reported"
    scope = "global test" if key == metric else "clients' mean"
    tiles = [
        page.tile(f"{_words(metric)}, {scope}", change, note, main=True),
        page.tile("rounds", count, f"{duration(seconds)} in all"),
        page.tile("traffic", size(up + down), f"{size(up)} up, {size(down)} down"),
        page.tile("clients", f"{len(clients):,}", kinds),
    ]
    if kept := earlier_result(lines):
        change = f"{number(kept.before)} → {number(kept.after)}"
        note = f"forgetting {number(kept.forgetting)}: the best value less the last one"
        tiles.insert(1, page.tile(f"earlier test rows, {_words(kept.metric)}", change, note))
    if last and (worst := value(last, "clients_worst_decile")) is not None:
        before = number(value(first, "clients_worst_decile"))
        tiles.insert(
            1, page.tile(f"worst tenth of clients, {_words(metric)}", f"{before} → {number(worst)}", "held-out rows of each client")
        )
    if last and (gain := value(last, "clients_gain")) is not None:
        better, worse = (f"{value(last, key):.0f}" for key in ("clients_better", "clients_worse"))
        note = (
            f"over the shared adapter; {better} clients gain, {worse} lose; worst tenth {signed(value(last, 'clients_gain_worst_decile'))}"
        )
        tiles.insert(2, page.tile(f"personal adapters, {_words(metric)}", signed(gain), note))
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [
        e("h1", None, title),
        e("p", {"class": "soft"}, f"run {run_dir.resolve().name} · fedtune {__version__} · written {when}"),
        e("div", {"class": "tiles"}, *tiles),
    ]


def _curves(lines: Sequence[Record], metric: str) -> list[Element]:
    if not lines:
        return []
    xs = [int(r["round"]) for r in lines]
    share = higher_is_better(metric)

    def column(key: str) -> list[float | None]:
        """The values by round. metrics.jsonl stores NaN and infinity as null, read as NaN here; unevaluated rounds lack the key."""
        return [math.nan if key in r and r[key] is None else value(r, key) for r in lines]

    def figure(title: str, candidates: Iterable[Series], caption: str, log: bool = False) -> Element | None:
        series = [s for s in candidates if any(y is not None and y == y for y in s.ys)]
        if not series:
            return None
        chart = plots.line_chart(xs, series, title=title, zero=share and not log and title != "Loss", log=log)
        last = {s.name: next((y for y in reversed(s.ys) if y is not None and y == y), None) for s in series}
        return page.figure(title, chart, caption, [(f"{s.name} {number(last[s.name])}", s.color) for s in series])

    scores = [
        Series(name="global test", ys=column(metric), color=1),
        *([Series(name="global macro-F1", ys=column("macro_f1"), color=4)] if metric == "accuracy" else []),
        Series(name="clients' mean", ys=column("clients_mean"), color=3),
        Series(name="worst tenth of clients", ys=column("clients_worst_decile"), color=2),
        Series(name="shared adapter, clients' mean", ys=column("clients_shared_mean"), color=5),
    ]
    losses = [Series(name="global test", ys=column("loss"), color=1), Series(name="training", ys=column("train_loss"), color=2)]
    start = start_of(lines)
    first = "the untuned backbone" if start == "untuned" else f"the adapter {start}"
    caption = f"Round 0 is {first}. " + ("Higher is better." if higher_is_better(metric) else "Lower is better.")
    figures = [
        figure(_words(metric).capitalize(), scores, caption, metric == "perplexity") if metric != "loss" else None,
        figure("Loss", losses if metric != "loss" else [*losses, *scores[1:]], "Mean over tokens or examples; lower is better."),
    ]
    if kept := earlier_result(lines):
        earlier = [
            Series(name="earlier test rows", ys=column(EARLIER + kept.metric), color=1),
            Series(name="forgetting", ys=column(FORGETTING), color=2),
        ]
        text = "On the test rows of the run that this one started from. Forgetting is the best value less the current one; lower is better."
        figures.append(figure(f"Earlier task: {_words(kept.metric)}", earlier, text))
    spent = Series(name="ε of the client that spent most", ys=column("epsilon"), color=5)
    figures.append(figure("Privacy spent", [spent], "For the δ and privacy unit in the adapter's card; lower is more private."))
    shown = [f for f in figures if f is not None]
    return [e("h2", None, "Learning"), e("div", {"class": "pair"}, *shown)] if shown else []


def _clients(clients: Sequence[ClientResult], metric: str, colors: Mapping[str, int]) -> list[Element]:
    if not clients:
        return []
    tuned = any(c.after is not None for c in clients)
    groups = []
    for name, slot in colors.items():
        mine = [c for c in clients if c.device_class == name]
        pairs = [(c.client, v) for c in mine if (v := c.after if tuned else c.before) is not None]
        before = [c.before for c in mine if c.before is not None]
        if pairs:
            groups.append((name, slot, pairs, sum(before) / len(before) if before and tuned else None))
    out: list[Element] = [e("h2", None, "Clients")]
    if groups:
        chart = plots.swarm(groups, title=f"{metric} per client", log=metric == "perplexity")
        caption = "Each dot is a client, on its held-out rows in the last evaluation. Solid tick: mean" + (
            "; dashed: mean before tuning." if any(g[3] is not None for g in groups) else "."
        )
        spread = page.figure(f"{_words(metric).capitalize()} per client", chart, caption)
        out.append(e("div", {"class": "pair"}, spread, _class_card(clients, metric)))
    else:
        out.append(_class_card(clients, metric))
    by_class = {name: [(c.client, c.gain) for c in clients if c.device_class == name and c.gain is not None] for name in colors}
    if gains := [(name, colors[name], pairs, None) for name, pairs in by_class.items() if pairs]:
        chart = plots.swarm(gains, title="gain per client")
        caption = "Personal against shared adapter, on the client's held-out rows; above 0, the personal one is better. Tick: mean."
        out.append(e("div", {"class": "pair"}, page.figure(f"Gain of the personal adapter, {_words(metric)}", chart, caption)))
    head = ["client", "class", "train rows", "before", "after", "gain", "counted", "dropped", "time", "up", "down"]
    rows = [
        [
            c.client,
            c.device_class,
            "–" if c.train is None else f"{c.train:,}",
            number(c.before),
            number(c.after),
            signed(c.gain),
            str(c.counted),
            drops_text(c.dropped) or "–",
            duration(c.seconds),
            size(c.bytes_up),
            size(c.bytes_down),
        ]
        for c in clients
    ]
    out.append(page.folded(f"All {len(clients):,} clients", page.table(head, rows)))
    return out


def _class_card(clients: Sequence[ClientResult], metric: str) -> Element:
    classes = class_results(clients, metric)
    measures: list[tuple[str, Callable[[ClassResult], str]]] = [
        ("clients", lambda c: f"{c.clients:,}"),
        (f"{_words(metric)} before", lambda c: number(c.before)),
        (f"{_words(metric)} after", lambda c: number(c.after)),
        ("worst tenth", lambda c: number(c.worst)),
        ("counted", lambda c: f"{c.counted:,}"),
        *((kind, lambda c, kind=kind: f"{c.dropped[kind]:,}") for kind in ordered_drops(sum((c.dropped for c in classes), Counter()))),
        ("time", lambda c: duration(c.seconds)),
        ("bytes up", lambda c: size(c.bytes_up)),
        ("bytes down", lambda c: size(c.bytes_down)),
        ("peak memory", lambda c: megabytes(c.peak_mb)),
    ]
    if any(c.chosen for c in classes):
        measures.insert(-3, ("device time per turn", lambda c: duration(c.device_s)))
        measures += [(name, lambda c, key=key: c.chosen.get(key) or "–") for key, name in CHOSEN.items()]
    head, rows = ["", *(c.device_class for c in classes)], [[name, *map(text, classes)] for name, text in measures]
    note = f"{_words(metric).capitalize()}: mean over clients. Counted and the following rows: turns in a cohort."
    if any(c.chosen for c in classes):
        note += " From precision on: the devices' choices per turn, minimum to maximum."
    caption = e("p", {"class": "soft"}, note)
    return e("div", {"class": "card"}, e("h3", None, "Device classes"), page.table(head, rows), caption)


def _costs(lines: Sequence[Record]) -> list[Element]:
    done = [r for r in lines if r["round"] > 0]
    xs, figures = [int(r["round"]) for r in done], []
    up, down = [value(r, "bytes_up") or 0.0 for r in done], [value(r, "bytes_down") or 0.0 for r in done]
    if any(up) or any(down):
        scale, unit = _scale(max(a + b for a, b in zip(up, down, strict=True)))
        stacks = [Series(name="up", ys=[v / scale for v in up], color=1), Series(name="down", ys=[v / scale for v in down], color=3)]
        chart = plots.stacked_bars(xs, stacks, title=f"Traffic per round, {unit}", unit=f" {unit}")
        legend = [(f"up {size(sum(up))}", 1), (f"down {size(sum(down))}", 3)]
        figures.append(page.figure("Traffic per round", chart, "Bytes on the wire, all clients of the round.", legend))
        scale, unit = _scale(sum(up) + sum(down))
        sums = [[v / scale for v in accumulate(ys)] for ys in (up, down)]
        stacks = [Series(name="up", ys=sums[0], color=1), Series(name="down", ys=sums[1], color=3)]
        chart = plots.stacked_bars(xs, stacks, title=f"Total traffic, {unit}", unit=f" {unit}")
        figures.append(page.figure("Total traffic", chart, "Sum over rounds.", legend))
    if any(r.get("cohort") for r in done):
        drops = [ordered_drops(r.get("dropped")) for r in done]
        kinds = list(ordered_drops({k: 1 for d in drops for k in d}))
        palette = {"offline": None, "late": 4, "failed": 8}
        spare = iter((7, 5, 2, 3, 6))
        slots = {k: palette[k] if k in palette else next(spare, None) for k in kinds}
        stacks = [Series(name="counted", ys=[value(r, "counted") for r in done], color=1)]
        stacks += [Series(name=k, ys=[float(d.get(k, 0)) for d in drops], color=slots[k]) for k in kinds]
        legend = [(f"{s.name} {sum(y or 0 for y in s.ys):,.0f}", s.color) for s in stacks]
        chart = plots.stacked_bars(xs, stacks, title="Clients per round")
        figures.append(page.figure("Cohort outcome", chart, "Clients sampled per round.", legend))
    seconds = [value(r, "seconds") for r in done]
    if any(seconds):
        chart = plots.stacked_bars(xs, [Series(name="time", ys=seconds, color=1)], title="Seconds per round", unit=" s")
        figures.append(page.figure("Time per round", chart, "Wall-clock time of the process that started the run."))
    return [e("h2", None, "Cost"), e("div", {"class": "pair"}, *figures)] if figures else []


def _partition(partition: Mapping[str, Any] | None, colors: Mapping[str, int]) -> list[Element]:
    clients = list((partition or {}).get("clients", []))
    if not partition or not clients:
        return []
    labels = [str(n) for n in partition.get("labels") or []]
    ranked = sorted(clients, key=lambda c: (-c.get("train", 0), str(c["id"])))
    items = [(str(c["id"]), float(c.get("train", 0)), colors.get(str(c.get("device_class")))) for c in ranked]
    train, held = sum(c.get("train", 0) for c in clients), sum(c.get("held_out", 0) for c in clients)
    caption = f"{train:,} rows to train, {held:,} held out, {partition.get('test', 0):,} in the global test."
    present = {str(c.get("device_class")) for c in clients}
    legend = [(name, slot) for name, slot in colors.items() if name in present]
    figures = [page.figure("Training rows per client", plots.ranked_bars(items, title="Training rows per client"), caption, legend)]
    if labels and any(c.get("histogram") for c in clients):
        n = min(len(ranked), plots.MAX_MAP_ROWS)
        shown = [ranked[i * (len(ranked) - 1) // max(1, n - 1)] for i in range(n)]
        rows = [(str(c["id"]), c.get("histogram") or [0] * len(labels)) for c in shown]
        note = f"{n} of {len(ranked):,} clients, evenly spaced by size. " if n < len(ranked) else ""
        chart = plots.heat_map(rows, labels, title="Labels per client")
        figures.insert(0, page.figure("Labels per client", chart, note + "A stronger color is a larger share of the client's rows."))
    return [e("h2", None, "Partition"), e("div", {"class": "pair"}, *figures)]


def _answers(answers: Sequence[Mapping[str, Any]], lines: Sequence[Record], start: str, judged: bool) -> list[Element]:
    """The answers side by side, marked right or wrong if the run reports exact match; and folded, those after each evaluated round."""
    if not answers:
        return []
    columns = {"request": "request", "wanted": "wanted", "before": start, "after": "tuned and merged"}
    rows = []
    for answer in answers:
        texts = {key: str(answer.get(key, "")) for key in columns}
        cells = []
        for key, name in columns.items():
            right = texts[key].strip() == texts["wanted"].strip()
            verdict = "" if key in ("request", "wanted") or not judged else "good" if right else "bad"
            mark = {"good": "✓ ", "bad": "✗ ", "": None}[verdict]
            text = texts[key] if key == "request" else e("code", None, texts[key])
            cells.append(e("td", {"data-name": name, "class": verdict}, mark, text))
        rows.append(e("tr", None, *cells))
    head = e("thead", None, e("tr", None, *(e("th", None, name) for name in columns.values())))
    table = e("table", {"class": "text answers"}, head, e("tbody", None, *rows))
    requests = [str(answer.get("request", "")) for answer in answers]
    by_round = [[str(r["round"]), *map(str, r["answers"])] for r in lines if isinstance(r.get("answers"), list)]
    later = [page.folded(f"answers after {len(by_round)} rounds", page.table(["round", *requests], by_round, "text"))] if by_round else []
    return [e("h2", None, "Sample answers"), e("div", {"class": "card scroll"}, table), *later]


def _config(config: Mapping[str, Any]) -> list[Element]:
    def flat(node: Any, prefix: str) -> Iterable[list[str]]:
        if isinstance(node, Mapping) and node:
            for k, v in node.items():
                if not _SECRET & set(re.split(r"[^a-z]+", str(k).lower())):
                    yield from flat(v, f"{prefix}.{k}" if prefix else str(k))
        else:
            yield [prefix, "none" if node is None else str(node)]

    rows = list(flat(config, "")) if config else []
    return [e("h2", None, "Config"), page.folded(f"{len(rows)} values", page.table(["key", "value"], rows, "text"))] if rows else []


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _scale(top: float) -> tuple[float, str]:
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if top >= s), (1.0, "B"))
