"""The card of an adapter says how to load the trained model."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedtune.cli.main import main
from fedtune.config import METHODS, Config, ModelConfig, PeftConfig, PrivacyConfig, TaskConfig, from_dict, to_dict
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import NANO
from fedtune.runs.report import write_card
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.models.build import checkpoint, hub, token_ids
from tests.quick import quick


def card(folder: Path, **peft: str) -> str:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    config = dataclasses.replace(Config(), model=ModelConfig(precision="nf4"), peft=PeftConfig(**peft))  # type: ignore[arg-type]
    write_card(folder, to_dict(config), {"base": "abc"}, None, [], [], load_backbone(ModelConfig(device="cpu"), CAUSAL))
    return (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_the_card_loads_an_adapter_with_peft(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "base = AutoModelForCausalLM.from_pretrained(" in text and 'PeftModel.from_pretrained(base, "path/to/this/folder")' in text


def test_the_card_of_a_loftq_adapter_does_not_load_it_with_peft(tmp_path: Path) -> None:
    text = card(tmp_path, init="loftq")
    assert "PeftModel" not in text and "fedtune export path/to/this/run --out merged" in text
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in text and "the quantization error of the backbone's nf4 weights" in text


# -- the instructions of a card ------------------------------------------------------------------------------------------------------------


def run_card(text: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the card's commands and code with the paths filled in. Returns the `model` that they create."""
    monkeypatch.chdir(run.parent)
    namespace: dict[str, Any] = {}
    fences = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert fences[-1][0] == "python"
    for language, code in fences:
        paths = {"path/to/this/folder": run / "adapter", "path/to/this/run": run, "path/to/fedtune/models/nano": NANO}
        for written, path in paths.items():
            code = code.replace(written, str(path))
        if language == "sh":
            for line in code.strip().splitlines():
                program, *words = shlex.split(line)
                assert program == "fedtune" and main(words) == 0
        else:
            with quiet():
                exec(code, namespace)
    return namespace["model"]


def logits(model: Any, task: TaskConfig) -> torch.Tensor:
    ids, more = token_ids(), {}
    if model.config.is_encoder_decoder and task is CLASSES:
        ids[:, -1] = 1  # T5 classifies at its end token
    elif model.config.is_encoder_decoder:
        more = {"decoder_input_ids": token_ids(columns=4, seed=2)}
    with torch.no_grad():
        return model(ids, **more).logits[:, -4:]  # some models give logits for the prompt's virtual tokens too


def check_card(run: Path, live: LiveAdapter, task: TaskConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the run's card and follow it: the loaded model gives the logits of the trained one."""
    config = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    labels = ["low", "mid", "high"] if task is CLASSES else []
    write_card(run, to_dict(config), {"base": live.backbone.fingerprint}, None, labels, [], live.backbone)
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    expected = logits(live.model, task)
    with live.disabled():
        assert not torch.allclose(logits(live.model, task), expected, atol=1e-2)
    actual = logits(run_card(text, run, monkeypatch), task)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    return text


IMPOSSIBLE = {  # such a run is refused at its start, so no card of it is ever written
    ("llama", "bitfit"), ("t5", "bitfit"), ("t5 classes", "bitfit"), ("bert", "prefix"), ("roberta", "prefix"),
    ("t5 classes", "prompt"), ("t5 classes", "prefix"),
}  # fmt: skip
BACKBONES = {
    "llama": ("llama", ASK),
    "gpt2": ("gpt2", CAUSAL),
    "t5": ("t5", ASK),
    "bert": ("bert", CLASSES),
    "roberta": ("roberta", CLASSES),
    "gpt2 classes": ("gpt2", CLASSES),
    "t5 classes": ("t5", CLASSES),
}


@pytest.mark.parametrize(
    ("name", "method"),
    quick(
        [(n, m) for n in BACKBONES for m in METHODS],
        *(("gpt2 classes", m) for m in METHODS), *((n, "lora") for n in BACKBONES), ("bert", "prefix"),
    ),
)  # fmt: skip
def test_a_card_loads_the_trained_model(tmp_path: Path, name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, task = BACKBONES[name]
    backbone = hub(checkpoint(tmp_path / "m", kind))
    if (name, method) in IMPOSSIBLE:
        with pytest.raises(ModelError):
            make_run(tmp_path / "run", backbone, task, method=method)
        return
    run, live = make_run(tmp_path / "run", backbone, task, method=method, std=0.5)
    check_card(run, live, task, monkeypatch)


@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_the_card_of_a_random_backbone_loads_that_backbone(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m"), init="random"), CAUSAL, method=method, std=0.5)
    assert "random backbone" in check_card(run, live, CAUSAL, monkeypatch)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_the_card_of_a_checkpoint_without_pooler_loads_the_completed_model(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", "bert")
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if "pooler" not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    run, live = make_run(tmp_path / "run", hub(folder), CLASSES, method=method, std=0.5)
    assert "the checkpoint lacks" in check_card(run, live, CLASSES, monkeypatch)


def test_the_card_of_the_embedded_backbone_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, live = make_run(tmp_path / "run", ModelConfig(device="cpu"), ASK)
    check_card(run, live, ASK, monkeypatch)


@pytest.mark.parametrize("init", ["default", "loftq"])
def test_every_code_block_is_closed(tmp_path: Path, init: str) -> None:
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
    write_card(tmp_path, to_dict(config), {"base": "abc"}, None, [], [], load_backbone(ModelConfig(device="cpu"), CAUSAL))
    (line,) = [x for x in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8").splitlines() if "not covered" in x]
    assert [x for x in NOT_COVERED[kind, where] if x not in line] == []
