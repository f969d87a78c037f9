"""Tables that fit the terminal without losing text.

Headings wrap between words. Columns that do not fit go into a further table, which repeats the first column. A cell wider than its column
continues on the next line.
"""

from collections.abc import Iterable, Sequence

from rich.box import HEAVY_HEAD, Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    console: Console,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    left: Sequence[str] = (),
    wrap: Sequence[str] = (),
    footer: Sequence[str] = (),
    box: Box | None = HEAVY_HEAD,
) -> None:
    """Print a table, split into as many parts as the console's width requires.

    Args:
        console: Where to print.
        header: One heading per column.
        rows: The cells of each row, as plain text.
        title: Title above the table.
        left: Headings of left-aligned columns; the first column always is.
        wrap: Headings of columns whose cells may break between words if space is short.
        footer: Cells of a last row, below a line.
        box: Lines between the cells; None for none.
    """
    lines = [list(r) for r in rows]
    room = console.width - (0 if box is None else 1)  # the right edge
    gap = 2 if box is None else 3  # between columns
    columns = [[line[i] for line in (*lines, *([footer] if footer else []))] for i in range(len(header))]
    least = [max(_longest_word([name]), _longest_word(cells) if name in wrap else _widest(cells))
             for name, cells in zip(header, columns, strict=True)]  # fmt: skip
    least[0] = max(1, min(least[0], room // 2 - gap))
    least[1:] = [max(1, min(width, room - 2 * gap - least[0])) for width in least[1:]]
    full = [max(least[i], cell_len(name), _widest(columns[i]) if name in wrap else 0) for i, name in enumerate(header)]
    for part in _parts(least, room, gap):
        widths, spare = [least[i] for i in part], room - sum(least[i] + gap for i in part)
        for k in sorted(range(len(part)), key=lambda k: header[part[k]] not in wrap):  # long cells use extra width better than headings
            gain = min(spare, full[part[k]] - widths[k])
            widths[k], spare = widths[k] + gain, spare - gain
        around = (0, 2, 0, 0) if box is None else (0, 1, 0, 1)
        table = Table(title=title, title_justify="left", box=box, padding=around, pad_edge=box is not None, show_footer=bool(footer))
        for i, width in zip(part, widths, strict=True):
            name = header[i]
            align = "left" if i == 0 or name in left or name in wrap else "right"
            table.add_column(Text(name), Text(footer[i]) if footer else "", justify=align, width=width, overflow="fold")
        for line in lines:
            table.add_row(*(Text(line[i]) for i in part))
        console.print(table)
        title = None


def _parts(least: Sequence[int], room: int, gap: int) -> list[list[int]]:
    """The columns of each part: the first, and some of the others in order. As few parts as possible, of about equal width."""

    def filled(room: int) -> list[list[int]]:
        parts, used = [[0]], least[0] + gap
        for i, width in enumerate(least[1:], start=1):
            if used + width + gap > room and len(parts[-1]) > 1:
                parts.append([0])
                used = least[0] + gap
            parts[-1].append(i)
            used += width + gap
        return parts

    count = len(filled(room))
    return filled(next(r for r in range(room + 1) if len(filled(r)) == count))


def _widest(cells: Iterable[str]) -> int:
    return max((cell_len(line) for c in cells for line in c.split("\n")), default=0)


def _longest_word(cells: Iterable[str]) -> int:
    return max((cell_len(word) for c in cells for word in c.split()), default=0)
