"""Shared code of the methods that PEFT implements: wrapping, canonical names, the original backbone, the folder."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.models.backbone import head_names, quiet
from fedtune.models.methods import SLOT
from fedtune.models.parts import is_linear, text_prefix


def task_settings(model: PreTrainedModel, task: TaskConfig) -> dict[str, Any]:
    """PEFT's task type, and the modules of a classifier's head that PEFT does not train by default."""
    kind = task_of(task)
    settings: dict[str, Any] = {"task_type": TaskType[kind.peft_type(getattr(model.config, "is_encoder_decoder", False))]}
    if kind.head:
        settings["modules_to_save"] = [h for h in head_names(model) if h not in ("classifier", "score")]  # PEFT adds these two
    return settings


def wrap(model: PreTrainedModel, config: PeftConfig, modules: Collection[str] = ()) -> PeftModel:
    """The model wrapped by PEFT, with trainable tensors in float32. The global generator does not change.

    Args:
        model: The backbone.
        config: PEFT's settings.
        modules: Full names of the modules and of the stacked weights that PEFT must adapt.

    Raises:
        ModelError: PEFT adapted other modules: it renames targets for some architectures.
    """
    kind = model.config.model_type
    with quiet(), torch.random.fork_rng():  # PEFT draws values with the global generator; a state overwrites them
        torch.manual_seed(0)
        wrapped = cast(PeftModel, get_peft_model(model, config))
    adapted = {_adapted(n, m) for n, m in wrapped.named_modules() if isinstance(m, BaseTunerLayer)}
    if odd := sorted(adapted.symmetric_difference(modules), key=lambda n: (n in adapted, n)):
        did = "adapts" if odd[0] in adapted else "does not adapt"
        wanted = ",".join(dict.fromkeys(n.rpartition(".")[2] for n in modules if n in adapted))
        raise ModelError(
            f"peft.targets asks for {len(modules)} layers of the architecture '{kind}', but PEFT {did} '{odd[0]}' ({len(odd)} such):"
            f" set peft.targets=[{wanted}]"
        )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def named(wrapped: PeftModel, renamed: Mapping[str, str]) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Two mappings: canonical name → trainable parameter, and canonical name → name in the wrapped model.

    Args:
        wrapped: PEFT's model.
        renamed: Part of PEFT's name → its replacement in the canonical name, such as `.lora_A.default.weight` → `.lora_A`.
    """
    parameters, names = {}, {}
    for dotted, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            path, _, rest = dotted.partition(".lora_")
            if rest and isinstance(layer := wrapped.get_submodule(path), ParamWrapper):
                name = f"{_adapted(path, layer)}.lora_{rest}"
            else:
                name = dotted.removeprefix("base_model.model.").removeprefix("base_model.")
            for theirs, ours in {**renamed, f".modules_to_save.{SLOT}.": "."}.items():
                name = name.replace(theirs, ours)
            parameters[name], names[name] = parameter, dotted
    return parameters, names


def _adapted(name: str, layer: nn.Module | BaseTunerLayer) -> str:
    """The name in the backbone of what a layer of PEFT adapts: a module, or a parameter. Wrappers of several parameters are nested."""
    name = name.removeprefix("base_model.model.")
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def stacked_weights(model: PreTrainedModel, wanted: Sequence[str]) -> dict[str, int]:
    """Full name of each stacked weight (experts, out, in) to adapt → the number of experts. Names match as in `targets`.

    Raises:
        ModelError: A name matches no stacked weight, or the weights are stored as (experts, in, out).
    """
    if not wanted:
        return {}
    prefix, modules = text_prefix(model), dict(model.named_modules())
    known = {n: p.shape[0] for n, p in model.named_parameters() if p.ndim == 3 and n.startswith(prefix) and p.shape[0] > 1}
    short = ", ".join(dict.fromkeys(".".join(n.split(".")[-2:]) for n in known)) or "none"
    for name in wanted:
        if not any(matches(n, name) for n in known):
            raise ModelError(f"peft.target_parameters: no stacked weight of the backbone is called '{name}', it has: {short}")
    found = {n: experts for n, experts in known.items() if any(matches(n, name) for name in wanted)}
    for name in found:
        if getattr(modules[name.rpartition(".")[0]], "is_transposed", False):
            raise ModelError(f"peft.target_parameters: '{name}' is stored as (experts, in, out), which is not supported: leave it out")
    return found


def without(wrapped: PeftModel) -> AbstractContextManager[None]:
    """A context with the original backbone, for methods that change its modules."""
    return wrapped.disable_adapter()


def write(wrapped: PeftModel, folder: Path) -> None:
    with quiet():
        wrapped.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def linear_modules(model: nn.Module) -> list[str]:
    """Modules that can be adapted: linear layers of the text part except the output layer and a classifier's head."""
    heads, prefix = head_names(model), text_prefix(model)  # a causal LM's head is its output layer
    return [n for n, m in model.named_modules() if is_linear(m) and n.startswith(prefix) and n.split(".")[0] not in heads]


def targets(model: PreTrainedModel, wanted: Any) -> list[str]:
    """Full names of the modules to adapt. A target, such as `q_proj` or `mlp.up_proj`, matches a module's name or its last parts.

    Raises:
        ModelError: A target matches no linear module.
    """
    known = linear_modules(model)
    if wanted == "all-linear":
        return known
    names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, (list, tuple)) else []
    if not names or not all(isinstance(n, str) and n for n in names):
        raise ModelError(f"peft.targets={wanted!r} must be all-linear, a module's name or a list of names")
    for name in names:
        require("peft.targets", name, known)
    return [k for k in known if any(matches(k, n) for n in names)]


def matches(module: str, name: str) -> bool:
    """Whether `name` is the module's name or its last parts."""
    return module == name or module.endswith("." + name)


def require(key: str, name: str, known: list[str]) -> None:
    """Raises ModelError if `name` matches no module."""
    if not any(matches(k, name) for k in known):
        short = ", ".join(dict.fromkeys(k.rsplit(".", 1)[-1] for k in known))
        raise ModelError(f"{key}: no linear module of the backbone is called '{name}', choose from {short}")


def transposed(model: nn.Module) -> bool:
    """Whether the model's linear layers store W as (in, out), as GPT-2's do."""
    return any(isinstance(m, Conv1D) for m in model.modules())
