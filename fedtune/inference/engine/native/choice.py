"""Which kinds of linear layers the native kernels run on this machine, and why torch runs the others."""

from functools import cache
from pathlib import Path

from fedtune.inference.engine.native.library import has_torch, is_forced, kernels, why_not
from fedtune.inference.engine.native.pack import PACKED

__all__ = ["cpu_features", "packing", "why_torch"]

_LAYOUT = 1  # increased when kernels.h changes the layout


def packing() -> list[str]:
    """The kinds that are packed for the native kernels, with the version of their layout."""
    return [f"{kind} {_LAYOUT}" for kind in PACKED if why_torch(kind) is None]


def why_torch(kind: str) -> str | None:
    """Why linears of a kind are torch's, as the end of a sentence; None if they are native."""
    if kernels() is None:
        return why_not()
    if is_forced() or kind in ("int4", "fp32") or not has_torch():
        return None
    if "amx_tile" in cpu_features():
        return f"this CPU has AMX, which torch uses in {kind} and the native kernels do not"
    if kind == "bf16" and "avx512_bf16" not in cpu_features():
        return "this CPU has no bfloat16 instructions that the native kernels use, and torch decodes faster"
    return None


@cache
def cpu_features() -> frozenset[str]:
    """The CPU's flags as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())
