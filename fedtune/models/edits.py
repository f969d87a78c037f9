"""The edits (changes) that adapters make to each tensor of a backbone, on blocks of rows. Merges and exports of all formats apply them.

Each method's file in `fedtune.models.methods` defines the arithmetic in `edits`. This module orders the edits and checks that they fit the
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
    """Tensor → its edits in order: the head's replacement, then the edits of each state.

    Args:
        states: Shifts and adapters without a head, oldest first.
        heads: Tensor of the backbone → its replacement.
        sizes: Tensor of the backbone → its shape.
        transposed: Tensors stored as (in, out); their edits still use rows of (out, in).
        check_linear: Raises ModelError for a module that is not a linear layer with an untied weight.

    Raises:
        ModelError: A state's method cannot be merged, or a state's tensors do not fit the backbone.
    """
    sizes = {n: size[::-1] if n in transposed else size for n, size in sizes.items()}
    changes = [Change(name=n, shape=tuple(t.shape), edit=_replaced(t)) for n, t in heads.items()]
    for state in states:
        how = method(state.spec.method)
        if how.edits is None:
            raise ModelError(f"peft.method={state.spec.method} cannot be merged into weights: {how.why_unmergeable}")
        turned = state.replace({n: t.T if n in transposed else t for n, t in state.tensors.items()})
        changes += how.edits(turned, sizes)
    out = dict[str, list[Edit]]()
    for change in changes:
        if change.linear:
            check_linear(change.name.removesuffix(".weight"))
        if change.name not in sizes:
            raise ModelError(f"the adapter's '{change.name}' {change.shape} is not in the backbone: it belongs to another backbone")
        if change.shape != sizes[change.name]:
            raise ModelError(
                f"the adapter's '{change.name}' is {change.shape}, the backbone's {sizes[change.name]}: it belongs to another backbone"
            )
        out.setdefault(change.name, []).append(change.edit)
    return out


def _replaced(tensor: Tensor) -> Edit:
    return lambda rows, first, last: tensor[first:last].double()
