"""The card of an adapter says how to load it so that it means what was trained."""

import dataclasses
from pathlib import Path

import pytest

from fedtune.config import Config, ModelConfig, PeftConfig, PrivacyConfig, to_dict
from fedtune.report import write_card


def card(folder: Path, **peft: str) -> str:
    (folder / "adapter").mkdir()
    config = dataclasses.replace(Config(), model=ModelConfig(precision="nf4"), peft=PeftConfig(**peft))  # type: ignore[arg-type]
    write_card(folder, to_dict(config), {"base": "abc"}, None, [], [])
    return (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_an_adapter_is_loaded_over_the_checkpoint(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "base = AutoModelForCausalLM.from_pretrained(" in text and 'PeftModel.from_pretrained(base, "path/to/this/folder")' in text


def test_what_began_as_what_quantisation_took_is_not(tmp_path: Path) -> None:
    text = card(tmp_path, init="loftq")
    assert "PeftModel" not in text and "fedtune export path/to/this/run --out merged" in text
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in text and "trained over the backbone's nf4 weights" in text


@pytest.mark.parametrize("init", ["default", "loftq"])
def test_every_fence_is_closed(tmp_path: Path, init: str) -> None:
    assert card(tmp_path, init=init).count("```") % 2 == 0


NOT_COVERED = {
    ("record", "server"): ["held-out rows", "when a reply arrives", "whether and why a turn fails"],
    ("user", "client"): ["held-out rows", "when a reply arrives", "whether and why a turn fails"],
    ("user", "server"): ["held-out rows", "losses, device, memory, time"],
}


@pytest.mark.parametrize(("kind", "where"), NOT_COVERED)
def test_the_card_lists_what_privacy_does_not_cover(tmp_path: Path, kind: str, where: str) -> None:
    (tmp_path / "adapter").mkdir()
    config = dataclasses.replace(Config(), privacy=PrivacyConfig(kind=kind, where=where, epsilon=8.0))
    write_card(tmp_path, to_dict(config), {"base": "abc"}, None, [], [])
    (line,) = [x for x in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8").splitlines() if "not covered" in x]
    assert [x for x in NOT_COVERED[kind, where] if x not in line] == []
