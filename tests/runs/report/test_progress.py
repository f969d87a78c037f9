"""The terminal output, verbatim if stderr is not a terminal."""

import io
from typing import Any

from rich.console import Console

from fedtune.runs.report import Progress, print_partition, print_results
from fedtune.runs.report.progress import histogram, round_line

ROUND = {
    "round": 3,
    "client": None,
    "exact_match": 0.4123,
    "clients_mean": 0.391,
    "clients_worst_decile": 0.2,
    "seconds": 4.09,
    "cohort": 8,
    "counted": 6,
    "dropped": {"late": 1, "offline": 1},
}


def plain(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_round_is_one_plain_line() -> None:
    console = plain(width=40)  # narrower than the line: it must not wrap
    with Progress(console) as progress:
        progress.round_started(3, 20, 8)
        progress.client_done("home-1", None)
        progress.client_done("home-2", "late: 41 s of 30 s")
        progress.note("a note")
        progress.round_done(ROUND)
    assert text_of(console) == (
        "a note\nround 3/20  exact_match 0.412  clients 0.39 (worst decile 0.20)  6/8 counted (1 offline, 1 late)  4.1 s\n"
    )


def test_the_untuned_backbone_has_no_cohort() -> None:
    console = plain()
    with Progress(console) as progress:
        progress.round_started(0, 5, 0)
        progress.round_done({"round": 0, "client": None, "perplexity": 123.456, "loss": 4.8, "seconds": 75.2})
    assert text_of(console) == "round 0/5  perplexity 123.5  1 min 15 s\n"


def test_without_a_global_test_the_line_shows_the_known_values() -> None:
    console = plain()
    with Progress(console) as progress:
        progress.round_started(1, 5, 2)
        progress.round_done({"round": 1, "client": None, "exact_match": None, "cohort": 2, "counted": 2, "dropped": {}})
    assert text_of(console) == "round 1/5  2/2 counted\n"


def test_a_terminal_gets_bars_with_the_metric_and_markup_stays_text() -> None:
    known = {"TERM": "xterm"}  # on a dumb terminal Rich always takes 80 columns
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, _environ=known)
    with Progress(console) as progress:
        progress.round_started(3, 20, 2)
        progress.client_done("[red]x[/red]", "late: 4 s of 3 s")
        progress.note("[bold]note[/bold]")
        progress.round_done(ROUND)
    text = text_of(console)
    for expected in ("3/20", "exact_match 0.412", "1/2", "[red]x[/red] dropped, late", "[bold]note[/bold]"):
        assert expected in text


def partition(n: int, labels: int = 3) -> dict[str, Any]:
    clients = [
        {"id": f"home-{i:03d}", "device_class": "phone", "train": 10, "held_out": 2, "histogram": [8, 0, 2][:labels]} for i in range(n)
    ]
    return {"labels": ["light", "heat", "[music]"][:labels], "clients": clients, "test": 240}


def test_a_long_partition_is_shortened_but_its_totals_count_all_clients() -> None:
    console = plain()
    print_partition(partition(100), console)
    text = text_of(console)
    assert text.count("home-") == 30
    for expected in ("... and 70 more", "100 clients", "1,000", "200", "█·▃", "labels: light, heat, [music]", "global test: 240 examples"):
        assert expected in text


def test_thirty_clients_are_all_shown_and_an_empty_partition_works() -> None:
    console = plain()
    print_partition(partition(30), console)
    assert text_of(console).count("home-") == 30
    assert "more" not in text_of(console)
    for summary in (partition(0), partition(2, labels=0), {}):
        print_partition(summary, plain())


def test_a_histogram_pools_neighbors_when_there_are_more_labels_than_bins() -> None:
    assert histogram([0, 4, 8], 3) == "·▅█"  # 8 * 4/8 = 4, the fifth block
    assert histogram([1, 1, 0, 0, 4, 0], 3) == "▅·█"  # 2, 0, 4
    assert histogram([0, 0], 2) == "··"
    assert histogram([], 0) == ""


def test_a_warm_start_shows_what_it_forgets() -> None:
    def line(r: int, score: float, lost: float) -> dict[str, Any]:
        return {"round": r, "client": None, "exact_match": 0.5, "earlier_exact_match": score, "forgetting": lost}

    console = plain()
    print_results([{**line(0, 0.9, 0.0), "start": {"from": "before"}}, line(1, 0.95, 0.0), line(2, 0.7, 0.25)], console)
    assert "round 0 (warm start)" in text_of(console) and "untuned" not in text_of(console)
    assert "earlier test rows: exact_match 0.900 → 0.700, forgetting 0.250 (best value less the last one)" in text_of(console)
    assert round_line(line(2, 0.7, 0.25), 2) == "round 2/2  exact_match 0.500  forgetting 0.250"


def test_results_show_before_best_and_last_and_each_device_class() -> None:
    def line(r: int, score: float) -> dict[str, Any]:
        return {
            "round": r,
            "client": None,
            "exact_match": score,
            "bytes_up": 1000 if r else 0,
            "bytes_down": 2000 if r else 0,
            "seconds": 2.0,
        }

    records = [line(0, 0.05), line(1, 0.9), line(2, 0.8)]
    records += [{"round": r, "client": "a", "device_class": "phone", "exact_match": 0.1 + 0.2 * r} for r in range(3)]
    records += [{"round": 1, "client": "b", "device_class": "hub", "dropped": "late: 4 s of 3 s"}]
    console = plain()
    print_results(records, console)
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in text_of(console).splitlines() if "│" in line}
    assert rows["round 0 (untuned)"][0] == "0.050"
    assert rows["round 1 (best)"] == ["0.900", "–", "–", "–", "1.0 kB", "2.0 kB", "2.0 s"]  # costs up to that round
    assert rows["round 2 (last)"] == ["0.800", "–", "–", "–", "2.0 kB", "4.0 kB", "4.0 s"]
    assert rows["phone"][:3] == ["1", "0.100 → 0.500", "0.500"]
    assert rows["hub"][4] == "1 late"


def test_the_best_perplexity_is_the_lowest() -> None:
    console = plain()
    print_results([{"round": r, "client": None, "perplexity": p} for r, p in ((0, 90.0), (1, 20.0), (2, 25.0))], console)
    assert "round 1 (best)" in text_of(console)
    print_results([], console)
    assert "no round has finished" in text_of(console)


def test_the_devices_choices_are_shown_as_ranges() -> None:
    chosen = {"device_class": "phone", "batch": 16.0, "length": 64.0, "steps": 9, "peak_mb": 2.74, "out_of_memory": 0.0, "kept_layers": 5.0}
    records: list[dict[str, Any]] = [{"round": r, "client": None, "exact_match": 0.1 * r} for r in range(3)]
    records += [
        {"round": 1, "client": "a", **chosen, "precision": "nf4", "rank": 2.0, "micro_batch": 1.0, "virtual_s": 10.0},
        {"round": 2, "client": "a", **chosen, "precision": "nf4", "rank": 2.0, "micro_batch": 2.0, "virtual_s": 20.0, "out_of_memory": 1.0},
        {"round": 2, "client": "b", "device_class": "hub", "steps": 3, "virtual_s": 0.0},  # an older run, without choices
    ]
    console = plain()
    print_results(records, console)
    _, _, chose = text_of(console).partition("Devices' choices per turn")
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in chose.splitlines() if "│" in line}
    # the mean of 10 s and 20 s
    assert rows == {"phone": ["nf4", "2", "1–2", "5", "16", "64", "9", "0–1", "15.0 s"]}
    assert "2.7 MB" in text_of(console)
    bare = plain()
    print_results([records[0], records[1], records[-1]], bare)
    assert "Devices' choices per turn" not in text_of(bare)
