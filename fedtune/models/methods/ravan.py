"""RAVAN: several heads, each a small trained core between two frozen bases. `fedsb.py` is the case of one head.

    W = W0 + Σ_i s_i·B_i·H_i·A_i        A_i (r, in) and B_i (out, r) frozen, H_i (r, r) = 0 and s_i = 1 at the start, both trained

The bases are drawn from the run's seed on server and clients and are never sent. As all clients share them, the mean of s_i·H_i is the mean
of the weights' changes; `strategies/ravan.py` sends that product. The rank of a change is h·r for h·r² trained entries.

Rows of A and columns of B are orthonormal: across all heads as far as h·r fits into the layer, else within groups of heads. In a layer with
fewer than r inputs or outputs, the cores have that size.

Source: Raje et al. 2025, RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025, arXiv:2506.05568.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ModelError
from fedtune.models.methods import Attached, Change
from fedtune.models.methods._own import Switch, fill, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

targeted = True


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """`<module>.core` (h, r, r) and `<module>.core_scale` (h,) at peft.targets, with h = peft.heads and r = peft.core."""
    return attach_cores(model, peft, task, peft.heads, scaled=True)


def attach_cores(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig, heads: int, *, scaled: bool) -> Attached:
    """Cores, in float32, and their bases, in the backbone's compute dtype.

    Args:
        model: The model, changed in place.
        peft: The settings.
        task: The run's task.
        heads: h.
        scaled: Whether each head has a trained s_i; without it s_i = 1, and there is no `core_scale`.
    """
    from fedtune.models.methods._heads import train_head  # imported late, because they load transformers
    from fedtune.models.methods._wrapped import targets

    switch, parameters, layers, width = Switch(), dict[str, nn.Parameter](), dict[str, tuple[Any, int, int]](), 0
    for name in targets(model, peft.targets):
        module: Any = model.get_submodule(name)
        out, into = (module.nf, module.nx) if hasattr(module, "nf") else (module.out_features, module.in_features)  # GPT-2's Conv1D
        rank, device = min(peft.core, out, into), module.weight.device
        module.core = parameters[f"{name}.core"] = nn.Parameter(torch.empty(heads, rank, rank, device=device, dtype=torch.float32))
        if scaled:
            module.core_scale = parameters[f"{name}.core_scale"] = nn.Parameter(torch.empty(heads, device=device, dtype=torch.float32))
        for side, size in (("core_A", into), ("core_B", out)):  # A and Bᵀ
            module.register_buffer(side, torch.zeros(heads * rank, size, dtype=model.dtype, device=device), persistent=False)
        module.register_forward_hook(partial(_add, switch))
        layers[name], width = (module, out, into), width + heads * rank
    fill(parameters, initial, peft, 0.0)

    def draw(basis: str) -> None:
        for name, (module, out, into) in layers.items():
            for buffer, drawn in zip((module.core_A, module.core_B), bases(basis, name, module.core.shape, out, into), strict=True):
                buffer.copy_(drawn)

    trained = train_head(model, task)
    return Attached(
        model=model,
        parameters=parameters | trained,
        names={n: n for n in parameters | trained},
        disabled=untouched({p: p.detach().clone() for p in trained.values()}, switch),
        draw=draw,
        drawn=sum(m.core_A.numel() + m.core_B.numel() for m, _, _ in layers.values()),
        keeps_width=width,
    )


def _add(switch: Switch, module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """The forward hook: y + Σ s_i·B_i·H_i·A_i·x. It reads the parameters at each call, so that `torch.func` can replace them."""
    if not switch.on:
        return y
    core = module.core if "core_scale" not in module._parameters else module.core_scale[:, None, None] * module.core
    x = F.linear(inputs[0].to(module.core_A.dtype), module.core_A).unflatten(-1, core.shape[:2])
    x = torch.einsum("...hi,hoi->...ho", x, core.to(x.dtype)).flatten(-2)
    return y + (x @ module.core_B).to(y.dtype)


def bases(basis: str, module: str, core: tuple[int, ...], out: int, into: int) -> tuple[Tensor, Tensor]:
    """A (h·r, in) and Bᵀ (h·r, out) of a module, float32, from `AdapterSpec.basis`."""
    heads, rank = core[:2]
    name = module.replace("language_model.", "")  # the decoder of a composite model has the same bases on its own
    sides = []
    for side, size in (("A", into), ("B", out)):
        generator = torch.Generator().manual_seed(derive_seed(basis, "basis", name, side))
        group = rank * max(1, size // rank)  # rows that can be orthonormal
        drawn = torch.randn(heads * rank, size, generator=generator, dtype=torch.float64).split(group)
        sides.append(torch.cat([_orthonormal(rows) for rows in drawn]).float())
    return sides[0], sides[1]


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows (k, n), k ≤ n, as an orthonormal basis of their span. A positive diagonal of R determines the signs."""
    q, r = torch.linalg.qr(rows.T)
    return (q * r.diagonal().sign()).T


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """H = 0 and s = 1, which change nothing."""
    return torch.ones(shape) if name.endswith(".core_scale") else torch.zeros(shape)


def edits(state: "AdapterState", sizes: Mapping[str, tuple[int, ...]]) -> Iterator[Change]:
    """W ← W + Σ s_i·B_i·H_i·A_i."""

    @lru_cache(maxsize=1)  # all rows of one weight come in sequence, and the bases of all weights may not fit into memory
    def factors(module: str) -> tuple[Tensor, Tensor]:
        core, scale = state[f"{module}.core"].double(), state.tensors.get(f"{module}.core_scale")
        a, b = (side.double() for side in bases(state.spec.basis, module, tuple(core.shape), *sizes[f"{module}.weight"]))
        core = core if scale is None else scale.double()[:, None, None] * core
        return b, (core @ a.view(*core.shape[:2], -1)).flatten(0, 1)

    def edit(module: str, rows: Tensor, first: int, last: int) -> Tensor:
        b, a = factors(module)
        return rows + b[:, first:last].T @ a

    if not state.spec.basis:
        raise ModelError("the adapter lacks the seed of its bases: the file is damaged")
    for name, core in state.tensors.items():
        module, kind = name.rpartition(".")[::2]
        size = sizes.get(f"{module}.weight", (0, 0))  # for a missing weight, the caller rejects the change below
        if kind not in ("core", "core_scale") or (
            f"{module}.weight" in sizes and (len(size) != 2 or max(core.shape[1:], default=0) > min(size))
        ):
            raise ModelError(
                f"the adapter's '{name}' {tuple(core.shape)} does not fit the backbone: the adapter belongs to another backbone"
            )
        if kind == "core":
            yield Change(name=f"{module}.weight", shape=size, edit=partial(edit, module), linear=True)


def is_noop(state: "AdapterState") -> bool:
    """Whether every core is zero."""
    return not any(t.any() for n, t in state.tensors.items() if n.endswith(".core"))
