"""The advice about architectures, precisions and tasks that do not go together."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from fedtune.config import Config, DataConfig, ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import task_of
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import checkpoint_activations
from fedtune.models.methods import ptuning_v2
from fedtune.models.probe import probe
from fedtune.models.sparse import SparseSlot
from tests.advised.backbones import ASKS, CAUSAL, CLASSES, LORA, attach_error, choices_in
from tests.advised.rows import Place, error_of, follows
from tests.models import test_architectures as models
from tests.models.build import checkpoint, hub
from tests.models.test_sparse import first_state
from tests.test_trust import add_code


def probe_error(folder: Path, task: TaskConfig, peft: PeftConfig = LORA) -> str:
    return error_of(lambda: probe(LiveAdapter(load_backbone(hub(folder), task, num_labels=3), peft, task), task))


def quantize_error(place: Place, folder: Path, precision: str, **more: Any) -> str:
    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    return attach_error(folder, precision=precision, compute="fp32", **more)


def wide(place: Place, **changes: Any) -> Path:
    from tests.models.test_quantize import wide

    return wide(place.folder / "wide", **changes)


@follows("{} contains its own code: read it, then allow it with model.trust_remote_code=true", slow=True)
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place.folder / "modules"))
    place.patch.setattr(sys, "path", [*sys.path])
    model = checkpoint(place.folder / "m")
    add_code(model, place.folder / "ran")
    error = attach_error(model)
    yield error
    ((name, value),) = re.findall(r"model\.(\w+)=(\w+)", error)
    allowed: Any = {name: {"true": True}[value]}
    yield attach_error(model, **allowed)
    assert (place.folder / "ran").exists()


@follows("the architecture '{}' does not support it: set it to false")
def _(place: Place) -> Iterator[str]:
    model = load_backbone(hub(checkpoint(place.folder / "m")), CAUSAL).model
    place.patch.setattr(type(model), "supports_gradient_checkpointing", False)
    yield error_of(lambda: checkpoint_activations(model))
    yield attach_error(place.folder / "m", checkpointing=False)


@follows("model.precision=nf4 and int8 need bitsandbytes ({}): install it, or take bf16", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    model = wide(place)
    with place.patch.context() as patch:
        patch.setitem(sys.modules, "fedtune.models.quantize", None)
        yield quantize_error(place, model, "nf4")
        yield quantize_error(place, model, "bf16")
    yield quantize_error(place, model, "int8")  # bitsandbytes is installed again


@follows("none of the adapted layers is quantized with model.precision={}: take peft.init=default", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    model = wide(place, intermediate_size=172)
    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    for init in ("loftq", "default"):
        peft = PeftConfig(targets="down_proj", init=init)
        config = hub(model, precision="nf4", compute="fp32")
        yield error_of(lambda peft=peft, config=config: initial_adapter(config, CAUSAL, peft, num_labels=0, seed=5))


@follows("has none of that name and shape: take peft.init=default", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    config = hub(wide(place), precision="nf4", compute="fp32")
    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    place.patch.setattr("fedtune.models.loftq._stored", lambda *_: None)  # as for an architecture that renames its weights
    for init in ("loftq", "default"):
        yield error_of(lambda init=init: initial_adapter(config, CAUSAL, PeftConfig(init=init), num_labels=0, seed=5))


@follows("does not fit the architecture '{}': {}: name other layers in peft.targets, or take another peft.method", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.mamba())
    yield attach_error(model)
    yield attach_error(model, peft=PeftConfig(rank=2, targets=["in_proj", "x_proj"]))
    yield attach_error(model, peft=PeftConfig(method="full"))


@follows("but PEFT {} '{}' ({} such): set peft.targets=[{}]", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.qwen3_moe())
    error = attach_error(model)
    yield error
    yield attach_error(model, peft=PeftConfig(rank=2, targets=error.partition("peft.targets=[")[2].removesuffix("]").split(",")))


@follows("have no known names: set peft.targets to a list of them", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.mamba())
    for targets in ("all-linear", ["in_proj", "x_proj"]):
        yield attach_error(model, peft=PeftConfig(method="ia3", targets=targets))


@follows("works with sdpa or eager attention, but the model has '{}': take peft=prefix", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    live = LiveAdapter(load_backbone(hub(model), CAUSAL), PeftConfig(method="ptuning_v2", tokens=3), CAUSAL)
    live.backbone.model.config._attn_implementation = "flash_attention_2"
    q = torch.zeros(1, 4, 2, 4)
    yield error_of(lambda: ptuning_v2._attend(live.backbone.model.get_submodule("model.layers.0.self_attn"), q, q, q, None))
    yield attach_error(model, peft=PeftConfig(method="prefix", tokens=3))


@follows("cannot do a training step: {}: name other layers in peft.targets, or take another peft.method", slow=True)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.llama4())

    def step_error(peft: PeftConfig) -> str:
        live = LiveAdapter(load_backbone(hub(model), CAUSAL), peft, CAUSAL)
        if any("o_proj" in name for name in live.parameters):  # as if the model's code did not take an adapter there

            def fail(*_: Any) -> Any:
                raise KeyError("no such key")

            live.backbone.model.register_forward_pre_hook(fail)
        return error_of(lambda: probe(live, CAUSAL))

    yield step_error(LORA)
    yield step_error(PeftConfig(rank=2, targets=["q_proj", "v_proj"]))
    yield step_error(PeftConfig(method="prompt", tokens=3))


@follows("so the model is not causal: take another backbone", slow=True)
def _(place: Place) -> Iterator[str]:
    for name, config in (("m", models.xlnet()), ("other", models.mixtral())):
        yield probe_error(checkpoint(place.folder / name, config=config), CAUSAL)


@follows("would learn from padding: take another backbone{}another task.kind{}", slow=True)
def _(place: Place) -> Iterator[str]:
    model = models.composite(place.folder / "m", models.gemma3())
    error = probe_error(model, models.WRITES, PeftConfig(method="prompt", tokens=3))
    yield error
    assert error.endswith("take another backbone, another task.kind or peft=lora")
    yield probe_error(checkpoint(place.folder / "other", config=models.mixtral()), models.WRITES, PeftConfig(method="prompt", tokens=3))
    yield probe_error(model, CAUSAL, PeftConfig(method="prompt", tokens=3))
    yield probe_error(model, models.WRITES)


@follows("bitsandbytes has no working kernel for this machine's {} ({}); take model.precision={}", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("fedtune.models.quantize._why_not", lambda precision, *_: "no symbol" if precision == "nf4" else "")
    model = wide(place)
    error = quantize_error(place, model, "nf4")
    yield error
    for precision in error.rpartition("model.precision=")[2].split(" or "):
        yield quantize_error(place, model, precision)


@follows(
    "no layer of this backbone has a row length that is a multiple of {} ('{}': {}): take int8 or bf16", slow=True, library="bitsandbytes"
)
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    error = quantize_error(place, model, "nf4")
    yield error
    for precision in choices_in(error):
        yield quantize_error(place, model, precision)


@follows("cannot be read back ({}): take model.precision=bf16 or fp32, or check the disk", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.llama4())
    error = quantize_error(place, model, "int8")
    yield error
    for precision in re.findall(r"precision=(\w+) or (\w+),", error)[0]:
        yield quantize_error(place, model, precision)


@follows("has no floating-point matrix to train: see model.precision and peft.targets", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    model = wide(place, intermediate_size=172)
    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    state = first_state(model, CAUSAL)
    for precision, targets in (("nf4", "all-linear"), ("bf16", "all-linear"), ("nf4", "down_proj")):
        peft = PeftConfig(rank=3, targets=targets)
        live = LiveAdapter(load_backbone(hub(model, precision=precision, compute="fp32"), CAUSAL), peft, CAUSAL)
        yield error_of(lambda live=live: SparseSlot(live, state.spec))


@follows("does not fit data=demo, take task=instruction or classification")
def _(place: Place) -> Iterator[str]:
    def check_error(kind: str) -> str:
        task = dataclasses.replace(ASKS, kind=kind)
        return error_of(lambda: task_of(task).check(Config(task=task, data=DataConfig(source="demo"), model=ModelConfig())))

    error = check_error("causal_lm")
    yield error
    for kind in error.rpartition("task=")[2].split(" or "):
        yield check_error(kind)


@follows("a classifier needs at least 2 classes, but the data has {}: see data.columns.label")
def _(place: Place) -> Iterator[str]:
    for labels in (1, 2):  # numbers of classes
        yield attach_error(checkpoint(place.folder / "m"), CLASSES, labels=labels)


@follows("the tokenizer has no end token, so the row has no target: remove such rows")
def _(place: Place) -> Iterator[str]:
    tokens = transformers.AutoTokenizer.from_pretrained(checkpoint(place.folder / "m"))
    tokens.eos_token = None
    rows = [{"prompt": "turn on", "answer": "light"}, {"prompt": "turn", "answer": ""}]
    for kept in (rows, rows[:1]):
        table = RowSet({name: [row[name] for row in kept] for name in kept[0]})
        yield error_of(lambda table=table: task_of(ASKS).encode(table, tokens, encoder_decoder=False, keep_short=False))


@follows("is stored as (experts, in, out), which is not supported: leave it out")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=models.gpt_oss())
    for names in (["experts.down_proj"], []):
        yield attach_error(model, peft=PeftConfig(rank=2, targets=["q_proj"], target_parameters=names))
