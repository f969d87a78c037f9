"""Train a few entries of the frozen matrices instead of the attached LoRA adapter.

The optimizer gets one packed vector v = W0[mask] + δ per matrix, so that weight decay works as in full fine-tuning, the optimizer has no
dense state, and entries outside the mask cannot change. The frozen weights are never modified: each linear layer writes v into a temporary
copy of its matrix for one product.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState, random_mask
from fedtune.errors import ModelError
from fedtune.models.adapter import LiveAdapter

_PREFIX = "base_model.model."


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Canonical module name → LoRA layer; a module that several layers share (ALBERT) is listed once."""
    return {n.removeprefix(_PREFIX): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def frozen_linear(name: str, layer: LoraLayer) -> nn.Linear | Conv1D:
    """The frozen linear layer inside a LoRA layer.

    Raises:
        ModelError: The layer is not linear, or its weights are quantized.
    """
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
        raise ModelError(f"'{name}' ({type(base).__name__}) has no floating-point matrix to train: see model.precision and peft.targets")
    return base


class SparseSlot:
    """The live slot for states of method `sparse`, on a backbone with a LoRA adapter; same interface as `LiveAdapter`.

    A state contains the heads and, for each LoRA target, `<module>.sparse`: δ (nnz,) float32. If the mask is not drawn from a seed, it also
    contains `<module>.index` (nnz,) int32. Positions refer to the flattened (out, in) matrix, even if a layer stores it transposed.

    Args:
        live: The LoRA adapter, which is disabled between `load` and `release`; its head is trained.
        spec: The spec of the states to load.

    Attributes:
        model: The LoRA adapter's model.
        backbone: Its backbone.
        parameters: Canonical name → live parameter: v, not δ. Empty before the first `load`.
        names: Canonical name → the parameter's name in `model`.
        spec: The spec of the tensors; version 0.

    Raises:
        ModelError: The model has no LoRA adapter, or the adapted layers are not plain linear layers.
    """

    def __init__(self, live: LiveAdapter, spec: AdapterSpec) -> None:
        self.model, self.backbone = live.model, live.backbone
        self.spec = replace(spec, version=0, base=live.backbone.fingerprint)
        self.parameters: Mapping[str, nn.Parameter] = {}
        self.names: Mapping[str, str] = {}
        self._matrices = {n: _Matrix(layer, frozen_linear(n, layer)) for n, layer in lora_layers(self.model).items()}
        self._heads = {n: p for n, p in live.parameters.items() if not n.rpartition(".")[2].startswith("lora_")}
        if not self._matrices:
            raise ModelError("a sparse stage trains the matrices that LoRA adapts, but the model has no LoRA adapter: take peft=lora")

    def load(self, state: AdapterState) -> None:
        """Load a state and disable the LoRA adapter.

        Raises:
            ModelError: The state belongs to another backbone, has another mask, or its names, shapes or positions do not fit.
        """
        self._check(state)
        places = {module: self._positions(state, module) for module in self._matrices}
        with torch.no_grad():
            for module, matrix in self._matrices.items():
                matrix.put(places[module], state[f"{module}.sparse"])
            for name, head in self._heads.items():
                head.copy_(state[name])
        ours = {f"{n}.sparse": m.values for n, m in self._matrices.items()} | self._heads
        self.parameters = MappingProxyType({n: ours[n] for n in state.tensors if n in ours})
        known = {p: n for n, p in self.model.named_parameters()}
        self.names = MappingProxyType({n: known[p] for n, p in self.parameters.items()})

    def read(self, version: int) -> AdapterState:
        """A copy of δ = v − W0[mask] and of the heads on the CPU, with this version number."""
        found = {n: p.detach() for n, p in self.parameters.items()}
        found |= {n: found[n] - m.origin for n, m in ((f"{k}.sparse", m) for k, m in self._matrices.items()) if n in found}
        return AdapterState({n: t.to("cpu", copy=True) for n, t in found.items()}, self.spec).replace(version=version)

    def release(self) -> None:
        """Remove the sparse values from the model and enable the LoRA adapter, until the next `load`."""
        for matrix in self._matrices.values():
            matrix.remove()

    def _positions(self, state: AdapterState, module: str) -> Tensor:
        matrix, count = self._matrices[module], len(state[f"{module}.sparse"])
        if state.spec.mask:
            known = len(matrix.place) == count
            return matrix.place if known else random_mask(state.spec.mask, module, matrix.rows * matrix.columns, count)
        place = state[f"{module}.index"].long()
        entries = matrix.rows * matrix.columns
        if place.shape != (count,) or place[0] < 0 or place[-1] >= entries or not (place.diff() > 0).all():
            raise ModelError(f"the state's '{module}.index' must have {count} ascending positions in a matrix of {entries} entries")
        return place

    def _check(self, state: AdapterState) -> None:
        mine, theirs = self.spec, state.spec
        if theirs.method != "sparse" or theirs.mask != mine.mask:
            raise ModelError(f"the state is {theirs.method} with mask '{theirs.mask}', but this slot is sparse with mask '{mine.mask}'")
        if theirs.base and theirs.base != mine.base:
            raise ModelError(f"the state belongs to the backbone {theirs.base}, but {mine.base} is loaded: load the same checkpoint")
        kinds = ("sparse",) if mine.mask else ("index", "sparse")
        wanted = {f"{m}.{k}" for m in self._matrices for k in kinds} | set(self._heads)
        if odd := sorted(wanted.symmetric_difference(state.tensors)):
            verb = "lacks" if odd[0] in wanted else "has"
            raise ModelError(f"the sparse state {verb} '{odd[0]}' ({len(odd)} such), unlike the model: see peft.targets and the task")
        for module, matrix in self._matrices.items():
            delta, entries = state[f"{module}.sparse"], matrix.rows * matrix.columns
            if delta.dim() != 1 or not 1 <= len(delta) <= entries:
                raise ModelError(f"the state's '{module}.sparse' is {tuple(delta.shape)}, but must be a vector of 1 to {entries} values")
        for name, head in self._heads.items():
            if state[name].shape != head.shape:
                raise ModelError(f"the state's '{name}' is {tuple(state[name].shape)}, but the model's is {tuple(head.shape)}")


class _Matrix:
    """One frozen matrix (rows = out, columns = in) and its trained entries.

    Attributes:
        place: Positions of the entries in the flattened (out, in) matrix, on the CPU.
        values: v.
        origin: W0 at the positions at the last `put`, float32.
    """

    def __init__(self, layer: LoraLayer, linear: nn.Linear | Conv1D) -> None:
        self._layer, self._linear, self._transposed = layer, linear, isinstance(linear, Conv1D)
        self.rows, self.columns = reversed(linear.weight.shape) if self._transposed else linear.weight.shape
        self.place = torch.empty(0, dtype=torch.int64)
        self.values, self.origin = nn.Parameter(torch.empty(0)), torch.empty(0)

    def put(self, place: Tensor, delta: Tensor) -> None:
        weight = self._linear.weight
        if place is not self.place and not torch.equal(place, self.place):
            self.place, self.values = place, nn.Parameter(torch.empty(len(place), device=weight.device))
        if self._linear._parameters.get("sparse") is not self.values:  # missing, or another slot's entries
            here = place.to(weight.device)
            self._stored = here % self.columns * self.rows + here // self.columns if self._transposed else here
            self._linear.register_parameter("sparse", self.values)
            # an instance attribute overrides the class's method; `remove` deletes it
            self._linear.forward = partial(_forward, self._linear, here, self._stored, self._transposed)  # pyright: ignore[reportAttributeAccessIssue]
            self._layer.enable_adapters(False)
        self.origin = weight.flatten()[self._stored].float()
        self.values.copy_(self.origin + delta.to(weight.device))

    def remove(self) -> None:
        if self._linear._parameters.get("sparse") is self.values:
            del self._linear.sparse, self._linear.forward
            self._layer.enable_adapters(True)


def _forward(linear: Any, place: Tensor, stored: Tensor, transposed: bool, x: Tensor) -> Tensor:
    return cast(Tensor, _SparseLinear.apply(x, linear.weight, linear.sparse, linear.bias, place, stored, transposed))


class _SparseLinear(torch.autograd.Function):
    """y = x Wᵀ + bias, where W is W0 with v on the mask; dv = (dyᵀ x)[mask]. W and its gradient exist only during one product."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, place: Tensor, stored: Tensor, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values, place, stored)
        ctx.transposed = transposed
        return F.linear(x, _filled(weight, values, stored, transposed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, values, place, stored = ctx.saved_tensors
        dx = dy @ _filled(weight, values, stored, ctx.transposed) if ctx.needs_input_grad[0] else None
        dv = None
        if ctx.needs_input_grad[2]:
            dv = (dy.flatten(0, -2).T @ x.flatten(0, -2)).flatten()[place].to(values.dtype)
        return dx, None, dv, None, None, None, None


def _filled(weight: Tensor, values: Tensor, stored: Tensor, transposed: bool) -> Tensor:
    """W (out, in)."""
    filled = weight.clone(memory_format=torch.contiguous_format)
    filled.view(-1).index_copy_(0, stored, values.to(weight.dtype))
    return filled.T if transposed else filled
