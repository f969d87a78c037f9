"""Building blocks of report.html: elements, tiles, figures, tables and the page.

Everything is an element tree, so that the serializer escapes all text of a run (client ids, model answers).
"""

from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element, tostring

from fedtune.runs.report.style import CSS


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: Element | str | None) -> Element:
    """An element with text and elements as children; None is skipped. The serializer escapes text and attributes."""
    out = Element(tag, {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in (attributes or {}).items()})
    for child in children:
        if isinstance(child, Element):
            out.append(child)
        elif child is not None and len(out):
            out[-1].tail = (out[-1].tail or "") + child
        elif child is not None:
            out.text = (out.text or "") + child
    return out


def color(index: int | None) -> str:
    """CSS color of a palette slot; gray beyond eight, because a ninth hue is not distinguishable."""
    return f"var(--s{index})" if index is not None and 1 <= index <= 8 else "var(--muted)"


def render(title: str, body: Element) -> str:
    """The complete page as text."""
    viewport = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    metas = element("meta", {"charset": "utf-8"}), element("meta", viewport)
    head = element("head", None, *metas, element("title", None, title), element("style", None, CSS))
    page = element("html", {"lang": "en"}, head, element("body", None, body))
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html")


def tile(label: str, value: str, note: str, *, main: bool = False) -> Element:
    """A headline figure with its label and a note."""
    parts = [element("span", {"class": "soft"}, label), element("b", None, value), element("span", {"class": "soft"}, note)]
    return element("div", {"class": "tile main" if main else "tile"}, *parts)


def figure(title: str, chart: Element, caption: str, legend: Sequence[tuple[str, int | None]] = ()) -> Element:
    """A chart with its title, legend of (name, color) and caption."""
    keys = [element("span", None, element("i", {"style": f"background:{color(slot)}"}), name) for name, slot in legend]
    return element(
        "figure", None, element("h3", None, title), element("div", {"class": "legend"}, *keys), chart, element("figcaption", None, caption)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> Element:
    """A table that scrolls sideways if it is wider than the screen; style `text` aligns left and wraps."""
    top = element("thead", None, element("tr", None, *(element("th", None, n) for n in head)))
    body = element("tbody", None, *(element("tr", None, *(element("td", None, c) for c in row)) for row in rows))
    return element("div", {"class": "scroll"}, element("table", {"class": style} if style else None, top, body))


def folded(summary: str, content: Element) -> Element:
    """A card that a click opens."""
    return element("details", {"class": "card", "style": "margin-top:14px"}, element("summary", None, summary), content)
