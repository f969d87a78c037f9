"""The live adapter: one adapter's trainable parameters on a shared frozen backbone.

A simulation loads and reads adapters hundreds of times per round. So `load` and `read` copy raw tensors (0.1 ms) instead of PEFT's state
dicts (3-6 ms, incomplete for some methods). PEFT's formats are only for saved adapters.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ModelError
from fedtune.models.backbone import Backbone, build_config, draw, empty_model, initializer_range
from fedtune.models.checkpoint import find_folder, read_config, stored_tensors
from fedtune.models.methods import Attached, attach, method
from fedtune.models.methods._heads import trained_heads
from fedtune.models.parts import other_weights
from fedtune.storage.checkpoint_files import has_weights

_FACTORS = (".lora_A", ".lora_B")
_LOG = logging.getLogger(__name__)


class LiveAdapter:
    """A backbone with its adapter, ready to train.

    Args:
        backbone: Wrapped in place; it can have only one adapter.
        peft: The method and its settings.
        task: The task; a classifier's head is trained with the adapter.

    Attributes:
        model: The model to call: backbone, adapter and head.
        parameters: Canonical name → live trainable parameter (float32), in the order of the model.
        names: Canonical name → the parameter's name in `model`.
        origin: Canonical name → the value that the state's tensor is relative to (see `Attached`).
        spec: The spec of the loaded tensors; version 0.

    Raises:
        ModelError: The method does not fit the architecture, no target matches, or the backbone already has an adapter.
    """

    def __init__(self, backbone: Backbone, peft: PeftConfig, task: TaskConfig) -> None:
        if getattr(backbone.model, "_carries_adapter", False):
            raise ModelError("this backbone already has an adapter: load the backbone again, or use its adapter")
        untrained = other_weights(backbone.model)
        self._attached = attached = attach(backbone.model, peft, task)
        if attached.ranks and peft.targets == "all-linear" and not peft.target_parameters:
            _report_untrained(*untrained)
        cast(Any, backbone.model)._carries_adapter = True
        self.model = cast(Any, attached.model)
        for config in getattr(self.model, "peft_config", {}).values():
            config.base_model_name_or_path = backbone.name
        self.backbone = backbone
        self.parameters: Mapping[str, nn.Parameter] = MappingProxyType(dict(attached.parameters))
        self.names: Mapping[str, str] = MappingProxyType(dict(attached.names))
        self.origin: Mapping[str, Tensor] = attached.origin
        self.spec = _spec(attached, peft, backbone.fingerprint, seed=0)
        if attached.draw is not None:
            attached.draw(self.spec.basis)
        self._origins = [attached.origin[n] for n in self.parameters if n in attached.origin]
        self._relative: list[Tensor] = [p for n, p in self.parameters.items() if n in attached.origin]
        self._layers = {m: self.model.get_submodule(self.names[f"{m}.lora_A"].split(".lora_A.")[0]) for m in attached.ranks}

    def load(self, state: AdapterState) -> None:
        """Copy a state into the live parameters.

        A LoRA state may have smaller ranks than the live adapter: the rest of A and B is then zero, gets no gradient and stays zero. The
        model uses the state's scaling.

        Raises:
            ModelError: The state belongs to another backbone, or its method, names, ranks or shapes are not this adapter's.
        """
        self._check(state)
        spec = state.spec
        with torch.no_grad():
            if spec.ranks == self._attached.ranks:
                torch._foreach_copy_(list(self.parameters.values()), [state[n] for n in self.parameters])  # pyright: ignore[reportPrivateImportUsage]
            else:
                for name, parameter in self.parameters.items():
                    tensor = state[name]
                    if tensor.shape != parameter.shape:
                        parameter.zero_()
                    parameter[tuple(map(slice, tensor.shape))].copy_(tensor)
            if self._origins:
                torch._foreach_add_(self._relative, self._origins)  # pyright: ignore[reportPrivateImportUsage]
        if spec.ranks != self.spec.ranks or spec.scaling != self.spec.scaling:
            for module, layer in self._layers.items():
                layer.scaling["default"] = spec.scaling[module]
            self.spec = dataclasses.replace(self.spec, ranks=dict(spec.ranks), scaling=dict(spec.scaling))
        if self._attached.draw is not None and spec.basis != self.spec.basis:
            self._attached.draw(spec.basis)
            self.spec = dataclasses.replace(self.spec, basis=spec.basis)

    def read(self, version: int) -> AdapterState:
        """A copy of the live tensors on the CPU, with this version number and the ranks and scaling of the loaded state."""
        origin, smaller = self._attached.origin, self.spec.ranks != self._attached.ranks
        tensors = {}
        for name, parameter in self.parameters.items():
            live = parameter.detach()
            if name in origin:
                live = live - origin[name]
            elif smaller and name.endswith(_FACTORS):
                rank = self.spec.ranks[name.rpartition(".")[0]]
                live = live[:rank] if name.endswith(".lora_A") else live[:, :rank]
            tensors[name] = live.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return AdapterState(tensors, self.spec).replace(version=version)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the original backbone; a classifier has the head that it was loaded with."""
        flags = [(p, p.requires_grad) for p in self.parameters.values()]
        try:
            with self._attached.disabled():
                yield
        finally:
            for parameter, flag in flags:  # PEFT enables all gradients again, including those that the plan disabled
                parameter.requires_grad_(flag)

    def save_peft(self, folder: Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` opens on the original backbone; an empty folder if PEFT lacks the method."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._attached.save is not None:
            self._attached.save(folder)

    def _check(self, state: AdapterState) -> None:
        mine, theirs = self.spec, state.spec
        if theirs.base and theirs.base != mine.base:
            raise ModelError(f"the adapter belongs to the backbone {theirs.base}, but {mine.base} is loaded: load the same checkpoint")
        if theirs.method != mine.method:
            raise ModelError(f"the adapter's method is '{theirs.method}', but the model's is '{mine.method}': see peft.method")
        if missing := [n for n in self.parameters if n not in state.tensors]:
            raise ModelError(f"the adapter lacks '{missing[0]}' ({len(missing)} such) of the model: see peft.targets and the task")
        if surplus := [n for n in state.tensors if n not in self.parameters]:
            raise ModelError(f"the adapter has '{surplus[0]}' ({len(surplus)} such), unknown to the model: see peft.targets and the task")
        if bool(theirs.basis) != (self._attached.draw is not None):
            raise ModelError(f"the adapter's basis is '{theirs.basis}', which does not fit peft.method={mine.method}: the state is damaged")
        for module, largest in self._attached.ranks.items():
            if not 1 <= theirs.ranks.get(module, 0) <= largest:
                rank = theirs.ranks.get(module, "missing")
                raise ModelError(f"the adapter's rank at '{module}' is {rank}, but the model allows 1 to {largest}: see peft.rank")
            if module not in theirs.scaling:
                raise ModelError(f"the adapter's scaling at '{module}' is missing: the state is damaged")
        for name, parameter in self.parameters.items():
            if (shape := state[name].shape) == parameter.shape and theirs.ranks == self._attached.ranks:
                continue
            wanted = list(parameter.shape)
            if name.endswith(_FACTORS):
                wanted[0 if name.endswith(".lora_A") else 1] = theirs.ranks[name.rpartition(".")[0]]
            if list(shape) != wanted:
                raise ModelError(f"the adapter's '{name}' is {tuple(shape)}, but the model's is {tuple(wanted)}: see peft.targets")


def initial_adapter(model: ModelConfig, task: TaskConfig, peft: PeftConfig, *, num_labels: int, seed: int) -> AdapterState:
    """The adapter of version 0, from config.json alone, so that a server needs no backbone.

    The method's `initial` gives the tensors; those with an origin are zero. A head equals that of `load_backbone` with this seed: it is
    read from the checkpoint if the weights are available and include a matching head, or else drawn. `spec.base` is "", because the caller
    knows the fingerprint. Only peft.init=loftq also reads the weights, one layer at a time.

    Raises:
        ModelError: The errors of `load_backbone` and `LiveAdapter` that follow from config.json.
    """
    folder = find_folder(model, weights=False)
    hf_config = build_config(model, task, num_labels=num_labels, folder=folder)
    bare = empty_model(hf_config, task, trust_remote_code=model.trust_remote_code)
    bare.requires_grad_(False)
    heads, how, std = trained_heads(bare, task), method(peft.method), initializer_range(hf_config)
    attached = attach(bare, peft, task)
    shapes = {n: tuple(p.shape) for n, p in attached.parameters.items()}
    head = {n: s for n, s in shapes.items() if n.split(".")[0] in heads}
    stored = _stored_head(folder, head) if head and model.init == "pretrained" else {}
    tensors = {}
    for name, shape in shapes.items():
        if name in head:
            tensors[name] = stored.get(name, draw(name, shape, std, seed))
        elif name in attached.origin:
            tensors[name] = torch.zeros(shape)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
            tensors[name] = how.initial(name, shape, peft, generator, std)
    state = AdapterState(tensors, _spec(attached, peft, "", seed))
    if peft.init == "default":
        return state
    from fedtune.models.loftq import make_up  # imported late, because it needs bitsandbytes

    return make_up(state, model, task, num_labels=num_labels, seed=seed)


def _report_untrained(share: float, name: str) -> None:
    """Log the share of weights that all-linear does not adapt, because they are not linear layers."""
    if name:
        _LOG.warning(
            "peft.targets=all-linear adapts linear layers only: %.0f %% of the weights, such as '%s', are none and stay frozen",
            100 * share, name,
        )  # fmt: skip


def _spec(attached: Attached, peft: PeftConfig, base: str, seed: int) -> AdapterSpec:
    basis = "" if attached.draw is None else str(seed)
    return AdapterSpec(method=peft.method, base=base, ranks=dict(attached.ranks), scaling=dict(attached.scaling), basis=basis)


def _stored_head(folder: Path, heads: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The checkpoint's head if it is complete and its shapes match, or else empty."""
    if not has_weights(folder, read_config(folder)):
        return {}
    found = {t.name: t for t in stored_tensors(folder) if t.name in heads}
    if any(n not in found or found[n].shape != shape for n, shape in heads.items()):
        return {}
    out = {}
    for name, tensor in found.items():
        with safe_open(tensor.file, "pt") as f:
            out[name] = f.get_tensor(name).float()
    return out
