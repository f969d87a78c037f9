"""Which kinds of linear layers the native kernels run on this machine, and why torch runs the others."""

import torch

from fedtune.inference.engine.native.library import is_forced, kernels, why_not
from fedtune.inference.engine.native.pack import PACKED

__all__ = ["packing", "why_torch"]

_LAYOUT = 1  # increased when kernels.h changes the layout


def packing() -> list[str]:
    """The kinds that are packed for the native kernels, with the version of their layout."""
    return [f"{kind} {_LAYOUT}" for kind in PACKED if why_torch(kind) is None]


def why_torch(kind: str) -> str | None:
    """Why linears of a kind are torch's, as the end of a sentence; None if they are native."""
    if kind not in PACKED:
        return f"{kind} has no native kernel"
    if kernels() is None:
        return why_not()
    if is_forced() or kind == "int4":
        return None
    if torch.cpu._is_amx_tile_supported():
        return f"this CPU has AMX, which torch uses in {kind} and the native kernels do not"
    if kind == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no bfloat16 instructions, and torch decodes faster"
    return None
