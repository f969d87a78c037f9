"""Charts as inline SVG elements, without a plotting library: small, and in the page's light or dark colors.

Every chart is W wide, so that it is legible on a phone; colors are the CSS variables --s1 … --s8 of `style.py`. Marks have a <title>,
which browsers show on hover.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fedtune.runs.report.page import color, element
from fedtune.runs.report.summary import number

W, H = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 12, 40
MAX_HOVER = 400  # with more marks than this, each series is one path without titles
MAX_MAP_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Series:
    """A named line or stack: `ys` at the chart's common xs; None is unmeasured, NaN a measured NaN."""

    name: str
    ys: Sequence[float | None]
    color: int | None = None  # 1 to 8; None is the muted gray


def line_chart(
    xs: Sequence[int], series: Sequence[Series], *, title: str, unit: str = "", zero: bool = False, log: bool = False
) -> Element:
    """Lines over rounds. They connect points across unmeasured rounds and break at NaN.

    Args:
        xs: The rounds.
        series: The lines.
        title: Title of the chart.
        unit: Unit of the values.
        zero: Start the axis at 0.
        log: Use a logarithmic axis if the values span more than a power of ten.
    """
    values = [y for s in series for y in s.ys if y is not None and y == y]
    log = log and bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    axis = _Axis(values, zero=zero, log=log, top=H - BOTTOM, bottom=TOP)
    svg, x = _frame(title, axis, xs, unit)
    for s in series:
        measured = [(a, b) for a, b in zip(xs, s.ys, strict=True) if b is not None]
        points = [(x(a), axis(b), a, b) for a, b in measured if b == b]
        path, pen = "", "M"
        for a, b in measured:
            path += f"{pen}{x(a):.1f} {axis(b):.1f} " if b == b else ""
            pen = "L" if b == b else "M"
        style = {"fill": "none", "stroke": color(s.color), "stroke-width": 2, "stroke-linejoin": "round", "stroke-linecap": "round"}
        svg.append(element("path", {"d": path.rstrip(), **style}))
        if len(points) <= 60:
            for px, py, a, b in points:
                dot = {"cx": px, "cy": py, "r": 3 if len(points) <= 30 else 2, "fill": color(s.color), "class": "dot"}
                svg.append(element("circle", dot, element("title", None, f"{s.name}, round {a}: {number(b)}{unit}")))
    return svg


def stacked_bars(xs: Sequence[int], series: Sequence[Series], *, title: str, unit: str = "") -> Element:
    """One bar per round, with the series stacked in order."""
    sums = [sum(s.ys[i] or 0 for s in series) for i in range(len(xs))]
    axis = _Axis(sums, zero=True, log=False, top=H - BOTTOM, bottom=TOP)
    svg, x = _frame(title, axis, xs, unit, bars=True)
    step = (W - LEFT - RIGHT) / max(1, len(xs))
    width = max(0.8, min(26.0, step * 0.75 if step < 8 else step - 3))
    base, hover = [0.0] * len(xs), len(xs) * len(series) <= MAX_HOVER
    for s in series:
        whole = ""
        for i, a in enumerate(xs):
            y = s.ys[i] or 0
            if y <= 0:
                continue
            low, high = axis(base[i]), axis(base[i] + y)
            base[i] += y
            # a thin gap separates stacked parts without an outline
            path = f"M{x(a) - width / 2:.1f} {high:.1f}h{width:.1f}v{max(0.6, low - high - 1):.1f}h{-width:.1f}z"
            whole += "" if hover else path
            if hover:
                name = f"{s.name}, round {a}: {number(y, 0 if y == int(y) else 2)}{unit}"
                svg.append(element("path", {"d": path, "fill": color(s.color)}, element("title", None, name)))
        if whole:
            svg.append(element("path", {"d": whole, "fill": color(s.color)}))
    return svg


def swarm(groups: Sequence[tuple[str, int | None, Sequence[tuple[str, float]], float | None]], *, title: str, log: bool = False) -> Element:
    """One dot per client along the metric, one row per group.

    Args:
        groups: Name, color, (client, value) pairs and the group's mean before the run, which is drawn as a dashed tick.
        title: Title of the chart.
        log: Use a logarithmic axis if the values span more than a power of ten.
    """
    values = [v for _, _, pairs, _ in groups for _, v in pairs] + [b for *_, b in groups if b is not None]
    log = log and bool(values) and min(values) > 0 and max(values) > 10 * min(values)
    row, head = 84, 20
    height = head + row * len(groups) + BOTTOM - 12
    axis = _Axis(values, zero=bool(values) and min(values) >= 0 and max(values) <= 1, log=log, top=16, bottom=W - RIGHT)
    svg = _svg(title, height)
    floor = head + row * len(groups)
    for tick in axis.ticks:
        px = axis(tick)
        svg.append(element("path", {"d": f"M{px:.1f} {head - 8}V{floor}", "class": "grid"}))
        svg.append(element("text", {"x": px, "y": floor + 18, "text-anchor": "middle"}, axis.label(tick)))
    for g, (name, slot, pairs, before) in enumerate(groups):
        middle, r = head + g * row + row / 2 + 12, 3.5 if len(pairs) <= 200 else 2.0
        svg.append(element("text", {"x": 16, "y": middle - 31, "class": "strong"}, f"{name} ({len(pairs)})"))
        bins: dict[int, int] = {}
        counts: dict[int, int] = {}
        for _, v in pairs:
            counts[round(axis(v) / (2 * r))] = counts.get(round(axis(v) / (2 * r)), 0) + 1
        pitch = min(2 * r, 42 / max(counts.values(), default=1))  # a full column is squeezed into the row
        path = ""
        for client, v in sorted(pairs, key=lambda p: (p[1], p[0])):
            slot_x = round(axis(v) / (2 * r))
            k = bins[slot_x] = bins.get(slot_x, 0) + 1
            py = middle + pitch * (k // 2) * (1 if k % 2 else -1)
            if len(values) <= MAX_HOVER:
                dot = {"cx": axis(v), "cy": py, "r": r, "fill": color(slot), "class": "dot"}
                svg.append(element("circle", dot, element("title", None, f"{client}: {number(v)}")))
            else:
                path += f"M{axis(v) - r:.1f} {py:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0"
        if path:
            svg.append(element("path", {"d": path, "fill": color(slot), "fill-opacity": "0.75"}))
        mean = sum(v for _, v in pairs) / len(pairs) if pairs else None
        for at, style, what in ((before, "before", "mean before"), (mean, "after", "mean after")):
            if at is not None:
                tick = {"d": f"M{axis(at):.1f} {middle - 22:.1f}V{middle + 22:.1f}", "class": f"mean {style}"}
                svg.append(element("path", tick, element("title", None, f"{name}, {what}: {number(at)}")))
    return svg


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], *, title: str) -> Element:
    """One row per client, one column per label; opacity is the label's share of the client's rows, relative to the largest share."""
    top_share = max((n / (sum(counts) or 1) for _, counts in rows for n in counts), default=1) or 1
    cell, left, top = 15, 112, 8
    named = len(labels) <= 24
    bottom = 8 + (min(90, 8 + 5 * max((len(str(n)) for n in labels), default=0)) if named else 18)
    height, width = top + cell * len(rows) + bottom, (W - left - 8) / max(1, len(labels))
    svg = _svg(title, height)
    for i, (client, counts) in enumerate(rows):
        y, whole = top + cell * i, sum(counts) or 1
        svg.append(element("text", {"x": left - 6, "y": y + 11, "text-anchor": "end", "class": "small"}, _short(client, 15)))
        for j, n in enumerate(counts):
            if n > 0:
                box = {"x": round(left + width * j, 1), "y": y, "width": max(0.8, round(width - min(1, width / 5), 1)), "height": cell - 1}
                tone = {"fill": color(1), "fill-opacity": f"{0.1 + 0.9 * n / whole / top_share:.2f}"}
                text = f"{client}, {labels[j]}: {n:g} of {whole:g}"
                svg.append(element("rect", {**box, **tone}, element("title", None, text)))
    svg.append(element("path", {"d": f"M{left} {top}V{top + cell * len(rows)}H{W - 8}", "class": "axis"}))
    floor = top + cell * len(rows)
    if named:
        for j, name in enumerate(labels):
            px, py = left + width * (j + 0.5) + 3, floor + 11
            at = {"x": px, "y": py, "text-anchor": "end", "class": "small", "transform": f"rotate(-38 {px:.1f} {py:.1f})"}
            svg.append(element("text", at, _short(str(name), 18)))
    else:
        middle = {"x": (left + W - 8) / 2, "y": floor + 18, "text-anchor": "middle", "class": "small"}
        svg.append(element("text", middle, f"{len(labels)} labels"))
    return svg


def ranked_bars(items: Sequence[tuple[str, float, int | None]], *, title: str) -> Element:
    """One bar per item (name, value, color), from the largest to the smallest."""
    ranked = sorted(items, key=lambda p: (-p[1], p[0]))
    axis = _Axis([v for _, v, _ in ranked], zero=True, log=False, top=H - BOTTOM, bottom=TOP)
    svg, x = _frame(title, axis, list(range(1, len(ranked) + 1)), "", bars=True, below="clients, by size")
    width = (W - LEFT - RIGHT) / max(1, len(ranked))
    merged: dict[int | None, str] = {}
    for i, (name, v, slot) in enumerate(ranked):
        left, right = x(i + 1) - width / 2, x(i + 1) + width / 2 - min(1.0, width / 5)
        path = f"M{left:.1f} {axis(v):.1f}H{right:.1f}V{axis(0):.1f}H{left:.1f}z"
        if len(ranked) <= MAX_HOVER:
            svg.append(element("path", {"d": path, "fill": color(slot)}, element("title", None, f"{name}: {v:,.0f}")))
        else:
            merged[slot] = merged.get(slot, "") + path
    for slot, path in merged.items():
        svg.append(element("path", {"d": path, "fill": color(slot)}))
    return svg


class _Axis:
    """Value → pixel, with round ticks; `top` and `bottom` are the pixels of the lowest and the highest value."""

    def __init__(self, values: Sequence[float], *, zero: bool, log: bool, top: float, bottom: float) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self._log, self._from, self._to = log, top, bottom
        if log:
            self._low, self._high = math.log10(low) - 0.03, math.log10(high) + 0.03
            exponents = range(math.floor(self._low), math.ceil(self._high) + 1)
            steps = (1, 2, 5) if self._high - self._low < 2 else (1,)
            self.ticks = [m * 10.0**k for k in exponents for m in steps if self._low <= math.log10(m * 10.0**k) <= self._high]
            return
        low = min(low, 0.0) if zero else low
        if high <= low:
            half = max(0.5, abs(low) * 1e-6)  # added to a huge number, 0.5 is lost in rounding
            low, high = (low, low + 2 * half) if zero else (low - half, low + half)
        step = _round_step((high - low) / 5)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [round(k * step, 12) for k in range(first, last + 1)]
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def __call__(self, v: float) -> float:
        share = ((math.log10(v) if self._log else v) - self._low) / (self._high - self._low)
        return self._from + share * (self._to - self._from)

    def label(self, tick: float) -> str:
        return f"{tick:,.0f}" if abs(tick) >= 1000 else f"{tick:.4g}"


def _round_step(raw: float) -> float:
    scale = 10.0 ** math.floor(math.log10(raw))
    return next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= raw * 0.999)


def _svg(title: str, height: float) -> Element:
    return element("svg", {"viewBox": f"0 0 {W} {height:.0f}", "role": "img", "aria-label": title})


def _frame(
    title: str, axis: _Axis, xs: Sequence[int], unit: str, *, bars: bool = False, below: str = "round"
) -> tuple[Element, Callable[[float], float]]:
    """The axes of a chart over rounds, and round → pixel."""
    svg = _svg(title, H)
    low, high = (min(xs), max(xs)) if xs else (0, 1)
    pad = (W - LEFT - RIGHT) / max(1, len(xs)) / 2 if bars else 6.0
    span = max(1, high - low)

    def x(a: float) -> float:
        middle = low == high
        return LEFT + pad + (W - LEFT - RIGHT - 2 * pad) * (0.5 if middle else (a - low) / span)

    for tick in axis.ticks:
        py = axis(tick)
        svg.append(element("path", {"d": f"M{LEFT} {py:.1f}H{W - RIGHT}", "class": "grid"}))
        svg.append(element("text", {"x": LEFT - 7, "y": py + 4, "text-anchor": "end"}, axis.label(tick) + unit))
    step = max(1, round(_round_step(max(1, span) / 7)))
    for a in sorted({low, *(k for k in range(low, high + 1) if k % step == 0 and k - low >= step * 0.6)}) if xs else []:
        svg.append(element("text", {"x": x(a), "y": H - BOTTOM + 18, "text-anchor": "middle"}, str(a)))
    svg.append(element("path", {"d": f"M{LEFT} {H - BOTTOM}H{W - RIGHT}", "class": "axis"}))
    svg.append(element("text", {"x": W - RIGHT, "y": H - 5, "text-anchor": "end", "class": "small"}, below))
    return svg, x


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
