"""report.html: well formed, self-contained and escaped, for every shape of run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.errors import CheckpointError
from fedtune.runs.report import write_report
from fedtune.runs.report.summary import class_results, client_results

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def charts(self) -> list[str | None]:
        return [attrs.get("aria-label") for tag, attrs in self.tags if tag == "svg"]


def run(
    path: Path, metric: str = "exact_match", *, clients: int = 6, rounds: int = 3, labels: int = 3, parts: str = "config partition answers"
) -> Path:
    path.mkdir(exist_ok=True)
    classes = ["hub", "laptop", "phone"]
    ids = [(f"home-{i:04d}", classes[i % 3]) for i in range(clients)]
    lines: list[dict[str, Any]] = []
    for r in range(rounds + 1):
        for i, (name, device) in enumerate(ids):
            lines.append({"round": r, "client": name, "device_class": device, metric: 0.1 + 0.2 * r + 0.001 * (i % 50)})
            if r and i % 2:
                lines.append({"round": r, "client": name, "steps": 5, "bytes_up": 10, "bytes_down": 20, "seconds": 0.1, "peak_mb": 300.0})
            elif r:
                lines.append({"round": r, "client": name, "dropped": "late: 4 s of 3 s"})
        means = {"clients_mean": 0.2 * r, "clients_worst_decile": 0.1 * r} if clients else {}
        costs = {"bytes_up": 10, "bytes_down": 20, "cohort": clients, "counted": clients // 2, "dropped": {"late": clients - clients // 2}}
        lines.append(
            {"round": r, "client": None, metric: 0.1 + 0.2 * r, "loss": 3.0 - r / 2, "seconds": 2.0, **means, **(costs if r else {})}
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if "config" in parts:
        config = {"name": "trial", "rounds": rounds, "task": {"max_new_tokens": 24}, "data": {"path": None, "api_key": "hunter2"}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    if "partition" in parts:
        rows = [{"id": n, "device_class": d, "train": 10 + i, "held_out": 2, "histogram": [i % 7] * labels} for i, (n, d) in enumerate(ids)]
        (path / "partition.json").write_text(json.dumps({"labels": [f"label {i}" for i in range(labels)], "clients": rows, "test": 40}))
    if "answers" in parts:
        (path / "answers.json").write_text(json.dumps([{"request": "dim it", "wanted": "dim", "before": "the the", "after": "dim"}]))
    return path


CASES: dict[str, dict[str, Any]] = {
    "instruction": {},
    "classification": {"metric": "accuracy", "labels": 77},
    "causal_lm": {"metric": "perplexity", "labels": 0},
    "loss only": {"metric": "loss"},
    "round 0 only": {"rounds": 0},
    "round 0 of nothing else": {"rounds": 0, "clients": 0, "parts": ""},
    "no clients": {"clients": 0},
    "one client, one round": {"clients": 1, "rounds": 1, "labels": 1},
    "no side files": {"parts": ""},
    "many clients": {"clients": 1000, "rounds": 20, "labels": 20},
    "many rounds": {"clients": 2, "rounds": 300},
}


@pytest.mark.parametrize("case", CASES)
def test_every_shape_of_run_gives_a_self_contained_page(tmp_path: Path, case: str) -> None:
    path = write_report(run(tmp_path / "r", **CASES[case]))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert path == tmp_path / "r" / "report.html"
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"\b(nan|inf)\b", html)
    assert not list(path.parent.glob(".*"))


def test_the_page_shows_the_run_s_results(tmp_path: Path) -> None:
    page = Page(write_report(run(tmp_path / "r")).read_text(encoding="utf-8"))
    for part in ("trial", "0.100 → 0.700", "90 B", "30 B up, 60 B down", "3 device classes", "✓ ", "✗ ", "task.max_new_tokens", "late 9"):
        assert part in page.text
    assert page.charts() == [
        "Exact match",
        "Loss",
        "exact_match per client",
        "Traffic per round, B",
        "Total traffic, B",
        "Clients per round",
        "Seconds per round",
        "Labels per client",
        "Training rows per client",
    ]


def test_the_page_has_no_secrets(tmp_path: Path) -> None:
    assert "hunter2" not in write_report(run(tmp_path / "r")).read_text(encoding="utf-8")


def test_all_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&amp;\' https://example.org'
    folder = run(tmp_path / "r")
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": evil, evil: {"x": evil}}))
    (folder / "answers.json").write_text(json.dumps([{"request": evil, "wanted": evil, "before": evil + "\ud800", "after": evil}]))
    client = {"id": evil, "device_class": evil, "train": 5, "held_out": 1, "histogram": [1]}
    (folder / "partition.json").write_text(json.dumps({"labels": [evil], "clients": [client], "test": 1}))
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"round": 1, "client": evil, "device_class": evil, "exact_match": 0.5, "dropped": evil}) + "\n")
        f.write(json.dumps({"round": 3, "client": None, "exact_match": 0.5, "cohort": 1, "counted": 0, "dropped": {evil: 1}}) + "\n")
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert evil in page.text  # it is shown as it was written
    assert not [attrs for _, attrs in page.tags if {"href", "src"} & set(attrs)]


def test_a_new_report_replaces_the_old_one(tmp_path: Path) -> None:
    folder = run(tmp_path / "r")
    (folder / "report.html").write_text("old")
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("name", "text"), [("config.yaml", "a: ["), ("partition.json", "{"), ("answers.json", "{}"), ("config.yaml", "[1]")]
)
def test_a_damaged_side_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = run(tmp_path / "r")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        write_report(folder)


def test_the_last_evaluation_of_a_client_counts_and_round_0_is_its_start() -> None:
    lines = [{"round": r, "client": "a", "exact_match": v} for r, v in ((0, 0.1), (1, 0.6), (2, 0.4), (3, None))]
    (results,) = client_results(lines, "exact_match")
    assert (results.before, results.after) == (0.1, 0.4)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 0.5), ("perplexity", 9.5)])
def test_a_class_of_eleven_clients_has_two_in_its_worst_decile(metric: str, expected: float) -> None:
    lines = [{"round": 1, "client": f"c{i:02}", metric: float(i)} for i in range(11)]
    (actual,) = class_results(client_results(lines, metric), metric)
    assert actual.worst == expected  # by hand: ⌈11/10⌉ = 2 clients, (0 + 1) / 2 or (10 + 9) / 2


def test_the_class_card_shows_the_devices_choices(tmp_path: Path) -> None:
    path = run(tmp_path / "run", clients=3, rounds=1)
    assert "micro-batch" not in Page(write_report(path).read_text()).text
    chosen = {
        "precision": "int8",
        "rank": 4,
        "micro_batch": 2,
        "batch": 16,
        "length": 64,
        "steps": 7,
        "out_of_memory": 0,
        "virtual_s": 12.5,
    }
    with (path / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"round": 1, "client": "home-0000", "device_class": "hub", **chosen}) + "\n")
    text = Page(write_report(path).read_text()).text
    for words in ("precision\nint8\n–\n–", "rank\n4\n–\n–", "micro-batch\n2\n–\n–", "device time per turn\n12.5 s\n–\n–"):
        assert words in text


def gaps(path: Path, metric: str, values: dict[int, float | None], last: int) -> str:
    """report.html of a run with evaluations in some rounds."""
    path.mkdir()
    lines = [{"round": r, "client": None, "train_loss": 1.0, **({metric: values[r]} if r in values else {})} for r in range(last + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return write_report(path).read_text(encoding="utf-8")


def strokes(html: str, title: str) -> list[str]:
    """The commands (M: move, L: line) of each line of a chart."""
    (chart,) = re.findall(rf'<svg[^>]*aria-label="{title}".*?</svg>', html, re.S)
    return [re.sub(r"[^ML]", "", d) for d in re.findall(r'<path d="([^"]*)" fill="none"', chart)]


@pytest.mark.parametrize("metric", ["exact_match", "accuracy", "perplexity"])
def test_a_line_connects_points_across_unevaluated_rounds(tmp_path: Path, metric: str) -> None:
    html = gaps(tmp_path / "r", metric, {0: 0.25, 5: 0.5, 10: 0.75}, last=12)
    title = metric.replace("_", " ").capitalize()
    assert strokes(html, title) == ["MLL"] and strokes(html, "Loss") == ["M" + "L" * 12]
    assert "0.250 → 0.750" in Page(html).text and "untuned → round 10" in Page(html).text  # not a dash while the run continues


def test_a_line_breaks_at_nan(tmp_path: Path) -> None:
    html = gaps(tmp_path / "r", "exact_match", {0: 0.25, 2: 0.5, 4: None, 6: 0.5, 8: 0.75}, last=8)
    assert strokes(html, "Exact match") == ["MLML"]


@pytest.mark.parametrize(("metric", "marks"), [("exact_match", True), ("loss", False)])
def test_answers_are_marked_if_exact_match_is_scored(tmp_path: Path, metric: str, marks: bool) -> None:
    page = Page(write_report(run(tmp_path / "r", metric)).read_text(encoding="utf-8"))
    assert "the the" in page.text  # the answers are there
    assert ("✗" in page.text, "✓" in page.text) == (marks, marks)
    classes = {attrs.get("class") for tag, attrs in page.tags if tag == "td"}
    assert ({"good", "bad"} <= classes) == marks and ("bad" in classes) == marks


def test_a_warm_start_has_a_tile_and_a_chart_of_what_it_forgets(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    lines = [
        {"round": r, "client": None, "exact_match": 0.5, "earlier_exact_match": score, "forgetting": 0.9 - score}
        for r, score in enumerate((0.9, 0.8, 0.6))
    ]
    lines[0] |= {"start": {"from": "before"}}
    (tmp_path / "r" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    html = write_report(tmp_path / "r").read_text(encoding="utf-8")
    page = Page(html)
    assert "earlier test rows, exact match" in page.text and "0.900 → 0.600" in page.text and "forgetting 0.300" in page.text
    assert strokes(html, "Earlier task: exact match") == ["MLL", "MLL"]
    assert "Round 0 is the adapter from before." in page.text and "untuned" not in page.text
