"""Makes the linears of this machine: by the native kernels if they run a kind here, else by torch."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array, as_float32
from fedtune.inference.engine.linear import GROUPS, KINDS, Linear, Native
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.native.library import VARIABLE, kernels
from fedtune.inference.engine.native.pack import pack

__all__ = ["describe_path", "linear_from_parts", "linear_from_tensors"]


def linear_from_parts(kind: str, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> Linear:
    """Make a linear from packed parts, which may be mapped from disk; `packing()` must not have changed since they were packed."""
    run = kernels()
    if "codes" in parts and run is not None:
        return Native(kind, parts, run, n_in=n_in, n_out=n_out, group=group)
    return _torch_linears(kind).CLASSES[kind](parts, n_in=n_in, n_out=n_out, group=group)


def _torch_linears(kind: str) -> Any:
    """The module of torch's linears; it loads torch."""
    try:
        from fedtune.inference.engine.reference import linears
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        why = why_torch(kind) or ""
        if why.startswith(VARIABLE):
            raise ModelError(f"{why} needs torch, which is not installed: leave it out, or pip install torch") from None
        raise ModelError(f"{kind} linear layers run by torch here ({why}), which is not installed: pip install torch") from None
    return linears


def describe_path(linears: Iterable[Linear]) -> str:
    """One sentence: which kernels run these linears; if torch's do, why."""
    paths = dict.fromkeys(
        f"{x.kind} by native kernels ({x.kernels.instructions})" if isinstance(x, Native) else f"{x.kind} by torch ({why_torch(x.kind)})"
        for x in linears
    )
    return ", ".join(paths)


def linear_from_tensors(kind: str, tensors: Mapping[str, Array], *, n_in: int, group: int = 32, name: str = "a linear") -> Linear:
    """Pack portable tensors for this machine.

    Args:
        kind: One of `KINDS`.
        tensors: As in the table above.
        n_in: K.
        group: Columns per int4 scale; 0 for int8, which has one scale per row.
        name: The linear's name, for error sentences.

    Raises:
        ModelError: The kind or group is not supported, or the tensors do not match the kind.
    """
    parts = {"fp32": ("weight",), "bf16": ("weight",), "int8": ("packed", "scale"), "int4": ("packed", "scale", "zero")}.get(kind)
    if parts is None:
        raise ModelError(f"{name} is of kind {kind!r}: the engine supports {', '.join(KINDS)}")
    if missing := [p for p in parts if p not in tensors]:
        raise ModelError(f"{name} lacks its {missing[0]}, which {kind} needs: export the model again")
    if kind == "int4" and group not in GROUPS:
        raise ModelError(f"{name} has int4 groups of {group} columns: the engine supports {', '.join(map(str, GROUPS))}; export it again")
    n_out = tensors[parts[0]].shape[0]
    groups = math.ceil(n_in / group) if group else 0
    sizes = {
        "weight": (n_out, n_in),
        "packed": (n_out, n_in if kind == "int8" else math.ceil(n_in / 2)),
        "scale": (n_out,) if kind == "int8" else (n_out, groups),
        "zero": (n_out, groups),
        "bias": (n_out,),
    }
    for part, tensor in tensors.items():
        if tensor.shape != sizes.get(part):
            raise ModelError(f"{name} has a {part} of shape {tensor.shape}, {kind} needs {sizes.get(part)}: export the model again")
    if "bias" in tensors:
        tensors = {**tensors, "bias": as_float32(tensors["bias"])}
    packed = (_torch_linears(kind).pack if why_torch(kind) else pack)(kind, tensors, n_in, group)
    return linear_from_parts(kind, packed, n_in=n_in, n_out=n_out, group=group if kind == "int4" else 0)
