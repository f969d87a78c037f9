"""Tables at every width: no line is too long, and no text is lost."""

import io
from typing import Any

import pytest
from rich.box import HEAVY_HEAD, Box
from rich.cells import cell_len
from rich.console import Console

from fedtune.cli.simulate import help_text
from fedtune.runs.report import print_partition, print_results
from fedtune.runs.report.tables import print_table

HEADER = ["client", "exact_match: before → after", "dropped", "time", "last result", "peak"]
ROWS = [
    ["home-000", "0.000 → 0.948", "12 offline, 3 late, 1 failed", "1 h 05 min", "late: no reply within 9 s", "30.6 MB"],
    ["a-client-whose-name-is-longer-than-half-of-the-terminal-is-wide", "–", "none", "0.0 s", "", "–"],
    ["家-7", "0.1 → 0.2", "[red]1 late[/red]", "3 s", "counted", "1,024 MB"],
]


def table_text(width: int, *args: Any, **named: Any) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_table(console, *args, **named)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str, box: Box | None) -> list[list[str]]:
    """The parts' lines, cell by cell."""
    return [[c.strip() for c in line.replace("┃", "│").split("│")[1:-1]] for line in text.splitlines() if "│" in line or "┃" in line]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_every_cell_can_be_read_at_every_width(width: int) -> None:
    text = table_text(width, HEADER, ROWS, title="Devices", wrap=["dropped", "last result"])
    assert max(map(cell_len, text.splitlines())) <= width and "…" not in text
    # a cell's lines are below each other: joined by column, they give its characters in order
    columns: list[str] = []
    for part in text.split("┏")[1:]:
        lines = cells(part, HEAVY_HEAD)
        columns += ["".join("".join(line[i] for line in lines).split()) for i in range(len(lines[0]))]
    for i, name in enumerate(HEADER):
        expected = "".join("".join([name, *(row[i] for row in ROWS)]).split())
        assert expected in columns


def test_columns_that_fit_are_one_table_and_further_tables_repeat_the_first_column() -> None:
    assert table_text(200, HEADER, ROWS).count("┏") == 1
    parts = table_text(80, HEADER, ROWS).split("┏")[1:]
    assert len(parts) > 1 and all("client" in p and "home-000" in p for p in parts)


def test_numbers_and_words_that_fit_are_never_broken() -> None:
    text = table_text(80, HEADER, [ROWS[0]], wrap=["dropped", "last result"])
    for words in ("0.000 → 0.948", "1 h 05 min", "30.6 MB", "exact_match:", "offline,"):
        assert words in text


def test_a_run_s_tables_fit_eighty_columns() -> None:
    chosen = {"precision": "nf4", "rank": 2.0, "micro_batch": 1.0, "batch": 16.0, "length": 64.0, "steps": 9, "out_of_memory": 0.0}
    costs = {"bytes_up": 123_456_789, "bytes_down": 123_456_789, "seconds": 7500.0, "loss": 10.25, "clients_mean": 0.1}
    records: list[dict[str, Any]] = [{"round": r, "client": None, "exact_match": 0.1 * r, **costs} for r in (0, 1)]
    records += [{"round": 1, "client": "a", "device_class": "single-board", "exact_match": 0.1, "virtual_s": 10.0, **chosen}]
    for why in ("late", "refused", "offline", "failed"):
        records.append({"round": 1, "client": f"b-{why}", "device_class": "phone", "dropped": f"{why}: x"})
    clients = [{"id": "speaker-" + "x" * 60, "device_class": "single-board", "train": 10_000, "held_out": 2, "histogram": [8, 0, 2] * 20}]
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    print_partition({"labels": [f"l{i}" for i in range(60)], "clients": clients, "test": 240}, console)
    print_results(records, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= 80 and "…" not in text
    for words in ("single-board", "out of memory", "worst decile", "123 MB", "2 h 05 min", "10,000", "refused", "0.100", "micro-batch"):
        assert words in " ".join(text.split()), words


def test_help_fits_eighty_columns_and_shows_every_default() -> None:
    text = help_text()
    assert max(map(cell_len, text.splitlines())) <= 80 and "…" not in text
    assert "  client.lora_lr = 0.001\n      peak learning rate" in text and "fedtune.strategies.fedavg.FedAvg" in text
