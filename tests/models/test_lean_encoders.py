"""The lean step of encoders has the gradients of PEFT's modules."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, CamembertConfig, ElectraConfig, RobertaConfig, XLMRobertaConfig

from fedtune.config import TaskConfig
from fedtune.data import collate
from fedtune.data.examples import Example
from fedtune.models import LiveAdapter, lean, load_backbone
from fedtune.models.lean import functions
from tests.models.build import bert_config, checkpoint, hub
from tests.models.test_lean import LENGTHS, check_gradients, gradients, packed, ragged, rows, small_batches_leave_out_padding, with_adapter  # noqa: F401  a fixture
from tests.quick import quick

TASK = TaskConfig(kind="classification", max_length=32)
CLASSES = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "camembert": CamembertConfig,
    "electra": ElectraConfig,
    "xlm-roberta": XLMRobertaConfig,
}


def two_layers(kind: type, **changes: Any) -> Any:
    config = bert_config(kind)
    for name, value in {"num_hidden_layers": 2, **changes}.items():
        setattr(config, name, value)
    return config


def encoder(folder: Path, kind: str = "bert", *, model: dict[str, Any] | None = None, sizes: Any = None, **peft: Any) -> LiveAdapter:
    config = None if kind in ("distilbert", "albert") else two_layers(CLASSES[kind], **(sizes or {}))
    made = checkpoint(folder / "model", "roberta" if kind in CLASSES else kind, config=config)
    return with_adapter(load_backbone(hub(made, **(model or {})), TASK, num_labels=3), TASK, **peft)


def batches() -> list[Any]:
    """Ragged rows, which need a mask, and rows of one length, for which transformers makes none."""
    groups = rows(), rows()[:1], *map(ragged, LENGTHS.values())
    return [collate([Example(e.input_ids % 20 + 3, np.array([1])) for e in group], 0) for group in groups]


@pytest.mark.parametrize("kind", quick([*CLASSES, "distilbert"], "bert", "distilbert"))
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_gradients_of_every_encoder(kind: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = packed(monkeypatch)
    check_gradients(encoder(tmp_path, kind, model={"checkpointing": again}), batches(), task=TASK)
    assert [packs for packs, *_ in found] == [True, False, True, True, False, False]


SETTINGS: dict[str, dict[str, Any]] = {
    "query and value": {"targets": ["query", "value"]},
    "upper feed-forward": {"targets": ["layer.1.output.dense"]},
    "ranks": {"rank_pattern": {"query": 1, "layer.1.intermediate.dense": 5}},
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_gradients_of_every_adapter(setting: str, tmp_path: Path) -> None:
    check_gradients(encoder(tmp_path, **SETTINGS[setting]), batches(), 2e-5, task=TASK)  # small gradients, sums in another order


SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_gradients_of_quantized_backbones(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_gradients(encoder(tmp_path, model={"precision": precision, "compute": "fp32"}, sizes=SIZES), batches(), task=TASK)


def test_bf16_is_as_close_to_float32_as_with_pefts_modules(tmp_path: Path) -> None:
    whole, half = (encoder(tmp_path / p, model={"precision": p}, sizes=SIZES) for p in ("fp32", "bf16"))
    for batch in batches()[:2]:
        right, off = gradients(whole, batch, TASK), list[float]()
        for use in (lean.disable, lean.enable):
            use(half)
            found = gradients(half, batch, TASK)
            off.append(math.sqrt(sum(float((found[n] - right[n]).square().sum()) for n in right)))
        size = math.sqrt(sum(float(g.square().sum()) for g in right.values()))
        assert off[1] < 1.2 * off[0] < 0.12 * size


def test_gradients_of_long_rows_head_by_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "SCORES", 10)
    monkeypatch.setattr(functions, "_fused", lambda q, k, cap: False)
    check_gradients(encoder(tmp_path), batches(), task=TASK)


def test_an_encoder_without_a_lean_form_gives_the_reason(tmp_path: Path) -> None:
    assert lean.enable(encoder(tmp_path / "1", "albert")) == "the architecture 'albert' has no lean form"
    live = encoder(tmp_path / "2")
    live.backbone.model.config.is_decoder = True
    assert lean.enable(live) == "an encoder is used as a decoder"
