"""Calibration text: the texts of each kind of file, and the held-out part."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from fedtune.config import Config, DataConfig, PartitionConfig, TaskConfig, to_dict
from fedtune.errors import DataError
from fedtune.export.calibrate import make_calibration, read_calibration_texts
from tests.export.test_capitals import chatml


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split()]


def counting(tokens: int, text: int = 10) -> list[str]:
    """Texts of `text` tokens that count up."""
    return [" ".join(map(str, range(a, min(a + text, tokens)))) for a in range(0, tokens, text)]


def test_the_last_eighth_is_held_out_and_samples_are_from_the_rest() -> None:
    calibration = make_calibration(counting(803), numbers, length=10, count=20)
    # 803 tokens are 80 pieces and a rest of 3 tokens; the last 10 pieces, tokens 700 to 799, are held out
    assert calibration.held.tolist() == list(range(700, 800))
    assert len(calibration.sequences) == 20 and all(len(s) == 10 for s in calibration.sequences)
    starts = [int(s[0]) for s in calibration.sequences]
    assert (
        starts == sorted(set(starts))
        and max(starts) < 700
        and all(s.tolist() == list(range(s[0], s[0] + 10)) for s in calibration.sequences)
    )
    again, other = (make_calibration(counting(803), numbers, length=10, count=20, seed=s) for s in (0, 1))
    assert [int(s[0]) for s in again.sequences] == starts != [int(s[0]) for s in other.sequences]
    assert torch.equal(other.held, calibration.held)


def test_short_text_is_used_completely() -> None:
    calibration = make_calibration(counting(9), numbers, length=256)
    assert [s.tolist() for s in calibration.sequences] == [[0, 1, 2, 3]] and calibration.held.tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match="has 3 tokens"):
        make_calibration(["1 2 3"], numbers)
    with pytest.raises(DataError, match="has 0 tokens"):
        make_calibration([" "], numbers)


def test_a_library_is_not_read_to_its_end() -> None:
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return numbers(text)

    make_calibration(counting(100_000), encode, length=10, count=4, held=40)
    assert len(seen) == 16 * 80 / 10


def test_calibration_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\nthree\n")
    assert read_calibration_texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    rows = [{"text": "t", "other": "o"}, {"prompt": "p", "n": 3, "answer": "a"}, {"text": " "}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_calibration_texts(tmp_path / "b.jsonl.gz") == ["t", "p\na"]
    turns = [{"from": "human", "value": "Peru?"}, {"from": "gpt", "value": "Lima."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"client": "c1", "conversations": turns}))
    assert read_calibration_texts(tmp_path / "chat.jsonl") == ["Peru?\nLima."]
    tokenizer = AutoTokenizer.from_pretrained(chatml(tmp_path / "model").name)
    wanted = "<|im_start|>user\nPeru?<|im_end|>\n<|im_start|>assistant\nLima.<|im_end|>"
    assert read_calibration_texts(tmp_path / "chat.jsonl", tokenizer) == [wanted]
    (tmp_path / "c").mkdir()
    for name in ("2.txt", "1.txt"):
        (tmp_path / "c" / name).write_text(name)
    assert read_calibration_texts(tmp_path / "c") == ["1.txt", "2.txt"]


@pytest.mark.parametrize("kind", ["instruction", "causal_lm"])
def test_the_training_rows_of_a_run(tmp_path: Path, kind: str) -> None:
    own = {"text": "row {}"} if kind == "causal_lm" else {"prompt": "ask {}: ", "answer": "say {}"}
    rows = [json.dumps({k: v.format(i) for k, v in own.items()}) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = Config(
        task=TaskConfig(kind=kind),  # pyright: ignore[reportArgumentType]
        data=DataConfig(source="local", path=str(tmp_path / "rows.jsonl"), test_fraction=0.2),
        partition=PartitionConfig(kind="iid", clients=3),
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    texts = read_calibration_texts(tmp_path)
    every = [f"row {i}" if kind == "causal_lm" else f"ask {i}: say {i}" for i in range(30)]
    assert 12 <= len(texts) <= 24 and set(texts) < set(every) and len(set(texts)) == len(texts)  # neither test nor held-out rows


def test_calibration_on_a_server_without_training_rows_is_refused(tmp_path: Path) -> None:
    config = Config(name="homes", data=DataConfig(source="local", test_path="t.jsonl"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(DataError, match=r"the training rows of 'homes' are not on this machine: give a .txt or .jsonl file instead$"):
        read_calibration_texts(tmp_path)


def test_unreadable_text_gives_a_one_sentence_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_calibration_texts(tmp_path / "none.txt")
    (tmp_path / "n.jsonl").write_text('{"n": 3}')
    with pytest.raises(DataError, match="holds no calibration text"):
        read_calibration_texts(tmp_path / "n.jsonl")
    (tmp_path / "config.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="give calibration text instead of the run"):
        read_calibration_texts(tmp_path)
