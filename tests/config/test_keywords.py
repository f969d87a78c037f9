"""`peft.from` is a config key like every other, although `from` is a Python keyword."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config, PeftConfig, from_dict, reference, to_dict
from fedtune.config.compose import compose
from fedtune.config.keywords import keyword_keys
from fedtune.errors import ConfigError


def test_users_write_and_read_the_key_as_from(tmp_path: Path) -> None:
    (config,) = (job.config for job in compose(["conf=base", "data=local", "data.path=x.txt", "task=causal_lm", "peft.from=some/run"]))
    assert config.peft.from_ == "some/run" and to_dict(config)["peft"]["from"] == "some/run" and "from_" not in to_dict(config)["peft"]
    assert from_dict(to_dict(config)) == config
    (tmp_path / "mine.yaml").write_text("defaults: [heterogeneous, _self_]\npeft: {from: another/run}\n")
    assert compose([f"conf={tmp_path / 'mine.yaml'}"])[0].config.peft.from_ == "another/run"
    assert "peft.from" in [key for key, _, _ in reference()]


def test_a_run_of_an_earlier_version_has_no_such_key() -> None:
    values = to_dict(Config())
    del values["peft"]["from"]
    assert from_dict(values) == Config() and Config().peft.from_ is None


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("peft.from_=x", r"unknown config key peft.from_: did you mean peft\.from\?"),
        ("peft.from=''", "peft.from is empty: give the directory"),
    ],
)
def test_other_spellings_are_refused(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        compose([setting])


def test_the_class_is_an_ordinary_dataclass() -> None:
    one = PeftConfig(from_="a", rank=3)
    assert dataclasses.replace(one, rank=4) == PeftConfig(from_="a", rank=4) != PeftConfig(rank=4)
    by_key: dict[str, Any] = {"from": "b"}
    assert dataclasses.replace(one, from_="b").from_ == PeftConfig(**by_key).from_ == "b"
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    setattr(one, "from", "c")  # OmegaConf sets fields by their key
    assert one.from_ == "c"


def test_only_keywords_are_renamed() -> None:
    @keyword_keys
    @dataclasses.dataclass(kw_only=True)
    class Node:
        import_: int = 1
        plain_: int = 2

    assert dataclasses.asdict(Node(plain_=3)) == {"import": 1, "plain_": 3}
