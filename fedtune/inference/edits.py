"""What an adapter does to each tensor of its backbone, so that a model can be merged without being in memory.

The arithmetic is that of `fedtune.models.methods.*.merge`, on some rows (outputs) of a weight at a time, in float64.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.merged_tensor import Edit

if TYPE_CHECKING:
    from fedtune.state import AdapterState

__all__ = ["LORA", "edits_of"]

LORA = ("lora", "rslora", "dora")


def edits_of(
    state: "AdapterState",
    shifts: "Collection[AdapterState]",
    heads: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, ...]],
    transposed: Collection[str] = (),
) -> dict[str, list[Edit]]:
    """Tensor → what is done to it, in order: the head is put in, shifts are added, then the adapter; of a method that no weights can
    express, nothing.

    Args:
        state: The adapter without its head.
        shifts: What was merged into the frozen weights besides.
        heads: What replaces a tensor of the backbone.
        sizes: Tensor of the backbone → its shape there.
        transposed: Those that are kept as (in, out); their edits are for rows of (out, in) all the same.

    Raises:
        ModelError: The adapter's tensors do not fit.
    """
    out, sizes = dict[str, list[Edit]](), {n: size[::-1] if n in transposed else size for n, size in sizes.items()}

    def add(name: str, found: tuple[int, ...], edit: Edit) -> None:
        if name not in sizes:
            raise ModelError(f"the adapter changes '{name}', which the backbone has not: it belongs to another one")
        if found != sizes[name]:
            raise ModelError(f"the adapter's '{name}' is {found}, the backbone's {sizes[name]}: it belongs to another backbone")
        out.setdefault(name, []).append(edit)

    for name, tensor in heads.items():
        add(name, tuple(tensor.shape), _replaced(tensor))
    for some in (*shifts, *([state] if state.spec.method in LORA else [])):
        for module in [n.removesuffix(".lora_A") for n in some.tensors if n.endswith(".lora_A")]:
            a, b = some[f"{module}.lora_A"], some[f"{module}.lora_B"]
            magnitude = some.tensors.get(f"{module}.lora_magnitude")
            add(f"{module}.weight", (len(b), a.shape[1]), _low_rank(a, b, some.spec.scaling[module], magnitude))
        odd = [n for n in some.tensors if not n.endswith((".lora_A", ".lora_B", ".lora_magnitude"))]
        if odd:
            raise ModelError(f"the adapter's '{odd[0]}' is neither a LoRA factor nor in the backbone: it belongs to another one")
    if state.spec.method == "ia3":
        for name, factor in state.tensors.items():
            weight, bias = f"{name.removesuffix('.ia3')}.weight", f"{name.removesuffix('.ia3')}.bias"
            size = sizes.get(weight, ())
            if len(size) != 2 or tuple(factor.shape) not in ((size[0], 1), (1, size[1])):
                raise ModelError(f"the adapter's '{name}' is {tuple(factor.shape)}, the backbone's layer {size}: it belongs to another")
            add(weight, size, _scaled(factor))
            if factor.shape[1] == 1 and bias in sizes:
                add(bias, sizes[bias], _scaled(factor[:, 0]))
    if state.spec.method in ("bitfit", "full"):
        for name, delta in state.tensors.items():
            delta = delta.T if name in transposed else delta
            add(name, tuple(delta.shape), _added(delta))
    return out


def _replaced(tensor: Tensor) -> Edit:
    return lambda rows, first, last: tensor[first:last].double()


def _added(delta: Tensor) -> Edit:
    return lambda rows, first, last: rows + delta[first:last].double()


def _scaled(factor: Tensor) -> Edit:
    """A factor a row, (out, 1) or (out,), or a factor a column, (1, in)."""
    by_row = factor.dim() == 1 or factor.shape[1] == 1
    return lambda rows, first, last: rows * (factor[first:last] if by_row else factor).double()


def _low_rank(a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None) -> Edit:
    """W + s·B·A; with a magnitude (DoRA), its rows rescaled to ‖W‖ + magnitude."""

    def edit(rows: Tensor, first: int, last: int) -> Tensor:
        changed = rows + scaling * (b[first:last].double() @ a.double())
        if magnitude is None:
            return changed
        return changed * ((rows.norm(dim=1) + magnitude[first:last].double()) / changed.norm(dim=1))[:, None]

    return edit
