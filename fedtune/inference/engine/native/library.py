"""Opens the compiled kernels, and chooses the instruction set: the best of this CPU, or that of the environment variable FEDTUNE_NATIVE."""

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.native import build
from fedtune.inference.engine.native.structures import DecoderStructure, DraftStructure, PassStructure, Weights

__all__ = ["KINDS", "SETS", "Kernels", "has_torch", "is_forced", "kernels", "why_not"]

VARIABLE = "FEDTUNE_NATIVE"
SETS = ("portable", "avx2", "avxvnni", "avx512", "dotprod", "i8mm")  # in the order of the numbers in kernels.h
KINDS = ("int4", "int4 wide", "int8", "bf16", "fp32")  # likewise
# the best of a CPU first; the portable kernels run on request, and where torch is not installed
_FASTER_THAN_TORCH = ("avx512", "avxvnni", "avx2", "i8mm", "dotprod")


@dataclass(frozen=True)
class Kernels:
    """The library with an instruction set.

    Attributes:
        library: The open library.
        instructions: One of `SETS`.
    """

    library: Any
    instructions: str

    def multiply(self, weights: Weights, threads: int, rows: int, x: tuple[int, int], y: tuple[int, int]) -> None:
        """y [rows, N] = x [rows, K] Wᵀ + b, in float32.

        Args:
            weights: A packed linear.
            threads: Threads to use at most, with this one.
            rows: Number of rows, at least 1.
            x, y: Address and bytes of contiguous memory.

        Raises:
            ModelError: Sizes do not match, or there is no memory.
        """
        failed = self.library.fedtune_multiply(ctypes.byref(weights), SETS.index(self.instructions), threads, rows, *x, *y)
        if failed == 2:
            raise ModelError(f"there is no memory for {rows} rows of {weights.n_in} activations: use a shorter prompt")
        if failed:
            raise ModelError(f"a linear of {weights.n_out} x {weights.n_in} weights has parts of other sizes: export the model again")

    def run(self, decoder: DecoderStructure, part: PassStructure, threads: int) -> None:
        """Run layers on hidden states in place, and compute logits if they are asked for.

        Args:
            decoder: The decoder.
            part: The pass; all memory that it points to is alive.
            threads: Threads to use at most, with this one.

        Raises:
            ModelError: There is no memory, or sizes do not match.
        """
        self._check(self.library.fedtune_run(ctypes.byref(decoder), ctypes.byref(part), SETS.index(self.instructions), threads), part)

    def draft(self, decoder: DecoderStructure, part: PassStructure, draft: DraftStructure, threads: int) -> None:
        """As `run`, then draft tokens."""
        instructions = SETS.index(self.instructions)
        self._check(self.library.fedtune_guess(ctypes.byref(decoder), ctypes.byref(part), ctypes.byref(draft), instructions, threads), part)

    def best(self, logits: Any, sharpness: float, tokens: Any, chances: Any) -> None:
        """Write the two most likely tokens of contiguous logits [n, V >= 2], [n, 2] int64, and their chances, [n, 2] float32."""
        rows, width = logits.shape
        out = tokens.ctypes.data, chances.ctypes.data
        if self.library.fedtune_best(SETS.index(self.instructions), logits.ctypes.data, rows, width, sharpness, *out):
            raise ModelError(f"speculation needs a vocabulary of at least two tokens, and this one has {width}")

    @staticmethod
    def _check(failed: int, part: PassStructure) -> None:
        if failed == 2:
            raise ModelError(f"there is no memory for a pass of {part.rows} tokens: use a shorter prompt")
        if failed:
            raise ModelError(
                "the native pass has parts that do not fit each other: set FEDTUNE_NATIVE=off if torch is installed, and report this"
            )


def kernels() -> Kernels | None:
    """The kernels to use; None if torch's linears are used, for the reason that `why_not` gives.

    Raises:
        ConfigError: FEDTUNE_NATIVE is unknown, or names kernels that cannot run here.
    """
    found = _chosen(os.environ.get(VARIABLE, ""))
    return found if isinstance(found, Kernels) else None


@cache
def has_torch() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def is_forced() -> bool:
    """Whether FEDTUNE_NATIVE names the kernels to use."""
    return os.environ.get(VARIABLE, "") in SETS


def why_not() -> str:
    """Why `kernels` is None, as the end of a sentence; "" if it is not."""
    found = _chosen(os.environ.get(VARIABLE, ""))
    return found if isinstance(found, str) else ""


@cache
def _chosen(wanted: str) -> Kernels | str:
    """The kernels for a value of FEDTUNE_NATIVE, or why there are none."""
    if wanted == "off":
        return f"{VARIABLE}=off"
    if wanted not in ("", *SETS):
        raise ConfigError(f"{VARIABLE}={wanted:.40} is unknown: set it to off, {', '.join(SETS)}, or leave it out")
    library = _opened()
    if isinstance(library, str):
        if wanted:
            raise ConfigError(f"{VARIABLE}={wanted} needs the native kernels, but {library}")
        return library
    here = [name for name in SETS if library.fedtune_supports(SETS.index(name))]
    if wanted and wanted not in here:
        raise ConfigError(
            f"{VARIABLE}={wanted} needs a CPU with {wanted}, and this one has {', '.join(here)}: set one of these or leave it out"
        )
    best = wanted or next((name for name in _FASTER_THAN_TORCH if name in here), None if has_torch() else "portable")
    return Kernels(library, best) if best else "this CPU has neither AVX2 nor NEON's dot product"


@cache
def _opened() -> Any:
    """The library, or why it cannot be used."""
    advice = f"`{build.COMMAND}` builds them with a C compiler"
    if not build.LIBRARY.is_file():
        return f"they are not built: {advice}"
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
        library.fedtune_sources.restype = ctypes.c_char_p
        library.fedtune_multiply.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
        ]  # fmt: skip
        library.fedtune_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        library.fedtune_guess.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        library.fedtune_best.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p
        ]  # fmt: skip
        made_from = library.fedtune_sources().decode()
    except (OSError, AttributeError):
        return f"{build.LIBRARY} is not for this system: {advice}"
    return library if made_from == build.digest() else f"they were built from other sources: {advice}"
