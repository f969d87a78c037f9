"""The benchmark of speculation: its prompts, its pair of models and its figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import DataError
from fedtune.export.distill import Distillation
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.models.checkpoint import NANO
from fedtune.simulations.benchmarks.inference import pair, speculation
from fedtune.simulations.benchmarks.inference.speculation import Answer, SpeculationCase, measure, plot, quartiles, table
from fedtune.simulations.benchmarks.inference.widen import Size, widen


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(NANO, "fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts whose words encode their position."""
    root = tmp_path_factory.mktemp("data")
    for name, file in pair.TEXTS.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("\n".join(f"{name} word {i} <unk>" if i % 50 == 0 else f"{name[:4]} {i} light" for i in range(3000)))
    return root


def test_prompts_are_held_out_words(engine: Engine, data: Path) -> None:
    held = pair.prompts(engine, data, 12, held=True, length=20)
    assert held == pair.prompts(engine, data, 12, held=True, length=20) != pair.prompts(engine, data, 12, held=True, length=20, seed=1)
    texts = [engine.text.decode(ids) for ids in held]
    assert all(len(ids) == 20 for ids in held) and not any("<unk>" in text for text in texts)
    assert [("wiki" in text, "Shak" in text) for text in texts[:2]] == [(True, False), (False, True)]
    numbers = [int(w) for text in texts for w in text.split()[1:-1] if w.isdigit()]
    learned = [engine.text.decode(ids) for ids in pair.prompts(engine, data, 40, held=False, length=20)]
    others = [int(w) for text in learned for w in text.split()[1:-1] if w.isdigit()]
    assert min(numbers) > max(others) > 2000  # the last tenth against the text before it


def test_missing_and_short_texts_are_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="FEDTUNE_DATA"):
        pair.prompts(engine, tmp_path, 1, held=True)
    for file in pair.TEXTS.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a few words")
    with pytest.raises(DataError, match="too few"):
        pair.prompts(engine, tmp_path, 1, held=True)


def test_a_draft_learns_from_the_models_own_answers(engine: Engine, data: Path, tmp_path: Path) -> None:
    file = pair.learn_from(engine, data, tmp_path / "x.jsonl", rows=3)
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    expected = [engine.text.decode(ids) for ids in pair.prompts(engine, data, 3, held=False)]
    assert len(rows) == 3 and all(row.strip().startswith(start.strip()[:20]) for row, start in zip(rows, expected, strict=True))
    before = file.stat().st_mtime_ns
    assert pair.learn_from(engine, data, file, rows=3).stat().st_mtime_ns == before  # written only once


@pytest.mark.slow
def test_the_pair_is_created_and_measured(data: Path, tmp_path: Path) -> None:
    draft = pair.draft_of(NANO, data, tmp_path / "draft", Distillation(layers=1, steps=2, batch_size=2, length=64), rows=8)
    assert 0 < pair.acceptance(draft) < 1
    target = widen(NANO, tmp_path / "wide", Size(hidden=256, layers=6, heads=8, kv_heads=4, inner=512, vocabulary=1100))
    wide = widen(draft, tmp_path / "wide-draft", Size(hidden=256, layers=2, heads=8, kv_heads=4, inner=512, vocabulary=1100))
    engine = load_engine(NANO, "fp32")
    rows = pair.prompts(engine, data, 2, held=True, length=16)
    case = SpeculationCase(
        size="tiny", kind="fp32", target=target, target_hf=target, wide=wide, small=draft, exit_at=4, rows=rows, new=12,
        temperatures=[0.0, 0.8], fixed=[2], threads=1,
    )  # fmt: skip
    measurement = measure(case)
    assert list(measurement) == ["0", "0.8"]
    ways = [
        "plain",
        "auto",
        "auto, kept",
        "auto, wide draft",
        "auto, small draft",
        "early exit",
        "lookup, always 2",
        "wide draft, always 2",
    ]
    for answers in measurement.values():
        assert list(answers) == ways and all(len(row) == 2 for row in answers.values())
        assert all(a.ratio == 1 and a.drafted == 0 for a in answers["plain"])
    assert all(a.same for row in measurement["0"].values() for a in row)  # greedy, float32
    assert all(a.same for a in measurement["0.8"]["lookup, always 2"])  # drafts do not change the text of a seed
    exits = measurement["0"]["early exit"]
    assert all(a.accepted == a.drafted for a in exits)
    small = load_engine(NANO, "fp32")
    for row, answer in zip(rows, measurement["0"]["plain"], strict=True):
        assert answer.tokens == len(list(Generation(small, row, max_new_tokens=12)))
    plot({"tiny": {"fp32": measurement}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000 and "2/2" in table({"fp32": measurement})


def answer(**changes: Any) -> Answer:
    return Answer(
        **{
            "tokens": 11,
            "seconds": 2.0,
            "passes": 5,
            "drafted": 8,
            "accepted": 6,
            "draft_seconds": 0.5,
            "ratio": 1.5,
            "same": True,
            **changes,
        }
    )


def test_the_table_by_hand() -> None:
    rows = [answer(ratio=r) for r in (1.0, 2.0, 3.0, 4.0)]
    assert quartiles(rows) == (1.75, 2.5, 3.25)
    assert quartiles([*rows, answer(tokens=1, ratio=99.0)]) == (1.75, 2.5, 3.25)  # an answer of one token is not counted
    plain = [answer(drafted=0, accepted=0, passes=10, ratio=1.0)] * 4
    shown = table(
        {"int8": {"0": {"plain": plain, "auto": [*rows[:3], answer(ratio=4.0, same=False)]}, "0.8": {"plain": plain, "auto": rows}}}
    )
    assert shown.splitlines()[0].split(" | ")[2:6] == ["× plain, greedy", "tokens per pass", "accepted", "same"]
    # 4 answers of 10 tokens after the first in 5 passes each; 6 of 8 guesses stay; plain takes 2 s for 10 tokens
    assert "| int8 | plain | 5.0 tok/s | 1.00 | – | 4/4 | 5.0 tok/s | 1.00 | – |" in shown
    assert "| int8 | auto | 2.50 (1.75–3.25) | 2.00 | 75 % | 3/4 | 2.50 (1.75–3.25) | 2.00 | 75 % |" in shown


def test_each_size_has_a_draft_of_a_tenth_of_its_size() -> None:
    def parameters(numbers: tuple[int, int, int, int, int]) -> int:
        hidden, layers, heads, kv_heads, inner = numbers
        return speculation.VOCABULARY * hidden + layers * (2 * hidden * hidden * (1 + kv_heads / heads) + 3 * hidden * inner)  # pyright: ignore

    for size in ("125m", "0.4b"):
        share = parameters(speculation.WIDE[size]) / parameters(speculation.SIZES[size])
        assert 1 / 15 < share < 1 / 9
