"""What adapters do to each tensor of their backbone, on some rows at a time: what merges and exports of every format are made of.

The arithmetic is each method's own, `edits` in its file in `fedtune.models.methods`; this module orders it and checks it against the
backbone.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.models.methods import Change, Edit, method

if TYPE_CHECKING:
    from fedtune.contracts.adapter_state import AdapterState

__all__ = ["edits_of"]


def edits_of(
    states: "Collection[AdapterState]",
    heads: Mapping[str, Tensor],
    sizes: Mapping[str, tuple[int, ...]],
    transposed: Collection[str] = (),
    check_linear: Callable[[str], object] = lambda module: None,
) -> dict[str, list[Edit]]:
    """Tensor → what is done to it, in order: the head is put in, then each state has its effect.

    Args:
        states: Shifts and adapters, the oldest first, without a head.
        heads: What replaces a tensor of the backbone.
        sizes: Tensor of the backbone → its shape there.
        transposed: Those that are kept as (in, out); their edits are for rows of (out, in) all the same.
        check_linear: Raises ModelError for a module that is no linear layer with a weight of its own.

    Raises:
        ModelError: No weights can express the method of a state, or a state's tensors do not fit the backbone.
    """
    sizes = {n: size[::-1] if n in transposed else size for n, size in sizes.items()}
    changes = [Change(name=n, shape=tuple(t.shape), edit=_replaced(t)) for n, t in heads.items()]
    for state in states:
        how = method(state.spec.method)
        if how.edits is None:
            raise ModelError(f"peft.method={state.spec.method} cannot be merged into weights: {how.beside}")
        turned = state.replace({n: t.T if n in transposed else t for n, t in state.tensors.items()})
        changes += how.edits(turned, sizes)
    out = dict[str, list[Edit]]()
    for change in changes:
        if change.linear:
            check_linear(change.name.removesuffix(".weight"))
        if change.name not in sizes:
            raise ModelError(f"the adapter's '{change.name}' {change.shape} is not a tensor of the backbone: it belongs to another one")
        if change.shape != sizes[change.name]:
            raise ModelError(
                f"the adapter's '{change.name}' is {change.shape}, the backbone's {sizes[change.name]}: it belongs to another backbone"
            )
        out.setdefault(change.name, []).append(change.edit)
    return out


def _replaced(tensor: Tensor) -> Edit:
    return lambda rows, first, last: tensor[first:last].double()
