"""One live adapter slot on a shared frozen backbone.

A simulation loads and reads adapters hundreds of times a round, so the exchange copies raw tensors (0.1 ms) and never goes through PEFT's
own state dicts (3-6 ms, and they lose parts of some methods). PEFT's formats are for the hand-off only.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.backbone import Backbone, build_config, draw, empty_model, head_names, initializer_range, quiet
from fedtune.models.checkpoint import find_folder, stored_tensors
from fedtune.seeds import derive_seed
from fedtune.state import AdapterSpec, AdapterState

_PREFIX, _SLOT = "base_model.model.", "default"


class LiveAdapter:
    """The backbone with its one adapter, ready to train.

    Args:
        backbone: Wrapped in place; it can carry one adapter only.
        peft: Method, rank, targets.
        task: A classifier's head is trained with the adapter.

    Attributes:
        model: The wrapped model: backbone, adapter and head.
        parameters: Canonical name → live trainable parameter (float32), in the order of the model.
        spec: What the tensors mean; version 0.

    Raises:
        ModelError: The targets match nothing, or the backbone carries an adapter already.
    """

    def __init__(self, backbone: Backbone, peft: PeftConfig, task: TaskConfig) -> None:
        if hasattr(backbone.model, "peft_config"):
            raise ModelError("this backbone carries an adapter already: load the backbone again, or use the adapter that it has")
        self.model: PeftModel = _attach(backbone.model, peft, task, base=backbone.name)
        self.backbone = backbone
        self.parameters: Mapping[str, nn.Parameter] = MappingProxyType(_trainable(self.model))
        self.spec = _spec(self.parameters, peft, backbone.fingerprint)

    def load(self, state: AdapterState) -> None:
        """Copy a state into the live parameters.

        Raises:
            ModelError: It belongs to another backbone, or its method, names, ranks, scaling or shapes are not this adapter's.
        """
        self._check(state)
        with torch.no_grad():
            torch._foreach_copy_(list(self.parameters.values()), [state[n] for n in self.parameters])  # pyright: ignore[reportPrivateImportUsage]

    def read(self, version: int) -> AdapterState:
        """A copy of the live parameters, on the CPU, as the given version."""
        tensors = {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
        return AdapterState(tensors, self.spec).replace(version=version)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model is the untouched backbone; a classifier has the head that it was loaded with."""
        flags = [(p, p.requires_grad) for p in self.parameters.values()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags:  # PEFT turns every gradient on again, also those that a plan had turned off
                parameter.requires_grad_(flag)

    def save_peft(self, folder: Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` opens on the untouched backbone."""
        with quiet():
            self.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    def _check(self, state: AdapterState) -> None:
        mine, theirs = self.spec, state.spec
        if theirs.base and theirs.base != mine.base:
            raise ModelError(f"the adapter belongs to the backbone {theirs.base}, the one loaded is {mine.base}: load the same checkpoint")
        if theirs.method != mine.method:
            raise ModelError(f"the adapter's method is '{theirs.method}', the model has '{mine.method}': see peft.method")
        if missing := [n for n in self.parameters if n not in state.tensors]:
            raise ModelError(f"the adapter lacks '{missing[0]}' ({len(missing)} such) that the model trains: see peft.targets and the task")
        if surplus := [n for n in state.tensors if n not in self.parameters]:
            raise ModelError(f"the adapter has '{surplus[0]}' ({len(surplus)} such), unknown to the model: see peft.targets and the task")
        for what, ours, its in (("rank", mine.ranks, theirs.ranks), ("scaling", mine.scaling, theirs.scaling)):
            for module, value in ours.items():
                if its.get(module) != value:
                    other = its.get(module, "not given")
                    raise ModelError(f"the adapter's {what} at '{module}' is {other}, the model has {value}: see peft.rank and peft.alpha")
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                shape = tuple(state[name].shape)
                raise ModelError(f"the adapter's '{name}' has the shape {shape}, the model wants {tuple(parameter.shape)}")


def initial_adapter(model: ModelConfig, task: TaskConfig, peft: PeftConfig, *, num_labels: int, seed: int) -> AdapterState:
    """The adapter of version 0, from config.json alone: a server needs no backbone.

    A ~ kaiming_uniform(a=√5), B = 0 (so that it changes nothing yet); a head as `load_backbone` with this seed has it: read from the
    checkpoint where its weights are at hand and hold one that fits, drawn otherwise. `spec.base` is "": the caller knows the fingerprint.

    Raises:
        ModelError: As `load_backbone` and `LiveAdapter`, as far as config.json shows it.
    """
    folder = find_folder(model, weights=False)
    hf_config = build_config(model, task, num_labels=num_labels, folder=folder)
    bare = _attach(empty_model(hf_config, task, trust_remote_code=model.trust_remote_code), peft, task, base="")
    shapes = {n: tuple(p.shape) for n, p in _trainable(bare).items()}
    heads = {n: s for n, s in shapes.items() if not n.endswith((".lora_A", ".lora_B"))}
    stored = _stored_head(folder, heads) if heads and model.init == "pretrained" else {}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".lora_A"):
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
            tensors[name] = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
        elif name.endswith(".lora_B"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = stored.get(name, draw(name, shape, initializer_range(hf_config), seed))
    return AdapterState(tensors, _spec(tensors, peft, ""))


def linear_modules(model: nn.Module) -> list[str]:
    """Modules that LoRA can adapt: linear layers but for the output layer and a classifier's head."""
    heads = head_names(model)  # of a causal LM: its output layer
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n.split(".")[0] not in heads]


def _attach(model: PreTrainedModel, peft: PeftConfig, task: TaskConfig, *, base: str) -> PeftModel:
    classify = task.kind == "classification"
    heads = [h for h in head_names(model) if h not in ("classifier", "score")]  # PEFT adds these two by itself
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
        r=peft.rank,
        lora_alpha=cast(int, peft.alpha),  # PEFT's annotation says int; it only divides
        lora_dropout=peft.dropout,
        target_modules=_targets(model, peft.targets),
        modules_to_save=heads if classify else None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2 stores its weights transposed
    )
    with quiet(), torch.random.fork_rng():  # PEFT draws from the global generator; a state is loaded over it anyhow
        torch.manual_seed(0)
        wrapped = cast(PeftModel, get_peft_model(model, config))
    config.base_model_name_or_path = base or None
    config.target_modules = sorted(config.target_modules or [])  # PEFT makes it a set, whose order in the file would vary
    return wrapped


def _targets(model: PreTrainedModel, wanted: Any) -> list[str]:
    """Full names of the modules to adapt; a wanted name matches a module's name or its last parts, such as `q_proj` or `mlp.up_proj`."""
    known = linear_modules(model)
    if wanted == "all-linear":
        return known
    names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, (list, tuple)) else []
    if not names or not all(isinstance(n, str) and n for n in names):
        raise ModelError(f"peft.targets={wanted!r} must be all-linear, a module's name or a list of names")
    for name in names:
        if not any(k == name or k.endswith("." + name) for k in known):
            short = ", ".join(dict.fromkeys(k.rsplit(".", 1)[-1] for k in known))
            raise ModelError(f"peft.targets: no linear module of the backbone is called '{name}'; there are {short}")
    return [k for k in known if any(k == n or k.endswith("." + n) for n in names)]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_canonical(n): p for n, p in model.named_parameters() if p.requires_grad}


def _canonical(name: str) -> str:
    """`base_model.model.m.lora_A.default.weight` → `m.lora_A`; `base_model.model.score.modules_to_save.default.weight` → `score.weight`."""
    name = name.removeprefix(_PREFIX)
    for factor in ("lora_A", "lora_B"):
        name = name.replace(f".{factor}.{_SLOT}.weight", f".{factor}")
    return name.replace(f".modules_to_save.{_SLOT}.", ".")


def _spec(tensors: Mapping[str, Tensor], peft: PeftConfig, base: str) -> AdapterSpec:
    modules = [n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")]
    return AdapterSpec(
        method=peft.method, base=base, ranks=dict.fromkeys(modules, peft.rank), scaling=dict.fromkeys(modules, peft.alpha / peft.rank)
    )


def _stored_head(folder: Path, heads: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The checkpoint's own head, where all of it is there and fits."""
    if not any((folder / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json")):
        return {}
    found = {t.name: t for t in stored_tensors(folder) if t.name in heads}
    if any(n not in found or found[n].shape != shape for n, shape in heads.items()):
        return {}
    out = {}
    for name, tensor in found.items():
        with safe_open(tensor.file, "pt") as f:
            out[name] = f.get_tensor(name).float()
    return out
