"""The advice of the native kernels."""

import shutil
import sys
from collections.abc import Iterator
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.inference.engine import reference
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.linear import Linear, portable
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.make_linear import describe_path, linear_from_tensors
from fedtune.inference.engine.native import build, library
from fedtune.inference.engine.native.library import SETS, Kernels
from fedtune.inference.engine.native.pack import pack, weights_of
from fedtune.inference.engine.reference import linears
from tests.advised.rows import Place, error_of, follows
from tests.inference.engine.tiny import tiny_model


def linear() -> Linear:
    return linear_from_tensors("int4", portable("int4", np.ones((8, 64), np.float32)), n_in=64)


def choice_error(place: Place, choice: str) -> str:
    """The error with a value of FEDTUNE_NATIVE; "" leaves it out."""
    place.patch.setenv("FEDTUNE_NATIVE", choice)
    library._chosen.cache_clear()
    return error_of(linear)


def with_sets(place: Place, *sets: str) -> None:
    """A CPU that has these instruction sets."""
    place.patch.setattr(library, "_opened", lambda: SimpleNamespace(fedtune_supports=lambda number: SETS[number] in sets))
    library._chosen.cache_clear()


@follows("{}={} is unknown: set it to off, {}, or leave it out")
def _(place: Place) -> Iterator[str]:
    with_sets(place, *SETS)
    yield choice_error(place, "sse9")
    for choice in ("off", *SETS, ""):
        yield choice_error(place, choice)
    library._chosen.cache_clear()


def without_torch(place: Place) -> str:
    with place.patch.context() as without:
        without.delitem(sys.modules, linears.__name__)
        without.delattr(reference, "linears")
        without.setitem(sys.modules, "torch", None)
        return error_of(linear)


@follows("{} linear layers run by torch here ({}), which is not installed: pip install torch")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(library, "_opened", lambda: "they are not built")
    library._chosen.cache_clear()
    yield without_torch(place)
    yield error_of(linear)  # installed
    library._chosen.cache_clear()


@follows("{} needs torch, which is not installed: leave it out, or pip install torch")
def _(place: Place) -> Iterator[str]:
    place.patch.setenv("FEDTUNE_NATIVE", "off")
    yield without_torch(place)
    yield error_of(linear)  # installed
    place.patch.delenv("FEDTUNE_NATIVE")
    yield without_torch(place)


@follows("{}={} needs a CPU with {}, and this one has {}: set one of these or leave it out")
def _(place: Place) -> Iterator[str]:
    with_sets(place, "portable", "avx2")
    yield choice_error(place, "avx512")
    for choice in ("portable", "avx2", ""):
        yield choice_error(place, choice)
    library._chosen.cache_clear()


@follows(build.COMMAND, slow=True)
def _(place: Place) -> Iterator[str]:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")
    place.patch.delenv("FEDTUNE_NATIVE", raising=False)
    place.patch.setattr(build, "LIBRARY", place.folder / "kernels.so")
    place.patch.setattr(build.build, "__defaults__", (build.LIBRARY, (), ""))
    for remembered in (library._chosen, library._opened):
        remembered.cache_clear()
    yield describe_path([linear()])
    assert not build.main()
    for remembered in (library._chosen, library._opened):
        remembered.cache_clear()
    sentence = describe_path([linear()])
    yield sentence if build.COMMAND in sentence else ""
    for remembered in (library._chosen, library._opened):
        remembered.cache_clear()


def product_error(code: int) -> str:
    """The error of a product for which the library returns this code."""
    parts = pack("int4", portable("int4", np.ones((8, 64), np.float32)), 64, 32)
    run = Kernels(SimpleNamespace(fedtune_multiply=lambda *_: code), "portable")
    return error_of(lambda: run.multiply(weights_of(parts, "int4", 64, 8), 1, 1, (0, 0), (0, 0)))


@follows("there is no memory for {} rows of {} activations: use a shorter prompt")
def _(place: Place) -> Iterator[str]:
    yield product_error(2)
    yield product_error(0)


@follows("a linear of {} x {} weights has parts of other sizes: export the model again")
def _(place: Place) -> Iterator[str]:
    yield product_error(1)
    yield product_error(0)


def pass_error(place: Place, code: int) -> str:
    """The error of a pass of a model, for which the library, if it is called, returns this code."""
    if isinstance(library._opened(), str):
        pytest.skip(f"run `{build.COMMAND}`")
    tiny_model("llama", place.folder / "llama")
    place.patch.setattr(Kernels, "run", partialmethod(_fake_run, code=code))
    decoder = load_engine(place.folder / "llama", "int8", keep=False).decoder
    return error_of(lambda: decoder.forward(range(9), [Span(FullCache(decoder.shape, 9), 9)]))


def _fake_run(self: Kernels, decoder: Any, part: Any, threads: int, *, code: int) -> None:
    _RUN(Kernels(SimpleNamespace(fedtune_run=lambda *_: code), "portable"), decoder, part, threads)


_RUN = Kernels.run


@follows("there is no memory for a pass of {} tokens: use a shorter prompt")
def _(place: Place) -> Iterator[str]:
    place.patch.setenv("FEDTUNE_NATIVE", "portable")
    yield pass_error(place, 2)
    yield pass_error(place, 0)


@follows("the native pass has parts that do not fit each other: set FEDTUNE_NATIVE=off if torch is installed, and report this")
def _(place: Place) -> Iterator[str]:
    place.patch.setenv("FEDTUNE_NATIVE", "portable")
    yield pass_error(place, 1)
    place.patch.setenv("FEDTUNE_NATIVE", "off")
    yield pass_error(place, 1)
