"""Import transformers and PEFT without the parts that fedtune never uses: 150 MB and two seconds less for a process that trains.

    scipy                           losses of object detection
    PIL                             images in chat templates
    torch.distributed.tensor        models that are spread over processes
    torch._dynamo, torch._inductor  `torch.compile`; torch loads the first whenever it creates an optimizer
    sympy                           sizes that are not known yet; torch loads it when it creates a model on the meta device

Use it only in a process that fedtune starts, such as a device's worker, because the libraries remember which parts they did not find.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import torch

__all__ = ["import_models"]

_MODELS = ("transformers.modeling_utils", "transformers.generation.utils", "peft", "bitsandbytes")
_UNUSED = ("scipy", "PIL")
_COMPILER = "torch._dynamo"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
_MASKS = f"{_COMPILER}._trace_wrapped_higher_order_op"  # transformers' masks import a class from it
_LOG = logging.getLogger(__name__)


def import_models() -> None:
    """Import transformers, PEFT and, if it is installed, bitsandbytes. Does nothing if transformers' models are imported already.

    If a version of the libraries needs one of the parts, they are imported whole.
    """
    if _MODELS[0] in sys.modules:
        return
    before = set(sys.modules)
    for name, values in _LATE.items():
        if name not in before:
            _Late(name, values)
    try:
        with _without_unused_parts():
            for name in _MODELS:
                if importlib.util.find_spec(name.partition(".")[0]) is not None:
                    importlib.import_module(name)
    except (ImportError, AttributeError) as bad:
        _LOG.warning("transformers is imported with all its parts, because it needs one of them: %s", bad)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("transformers", "peft"):
                del sys.modules[name]


class _Late(ModuleType):
    """A stand-in for a module of which a process needs few names: `values` has them. Access to any other name imports the module itself."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = spec = importlib.util.find_spec(name)
        self.__file__ = spec and spec.origin
        vars(self).update(values)
        sys.modules[name] = self
        if self._parent is not None:
            setattr(*self._parent, self)

    @property
    def _parent(self) -> tuple[ModuleType, str] | None:
        """The package that has this module as an attribute, and the attribute's name."""
        parent, _, own = self.__name__.rpartition(".")
        return (sys.modules[parent], own) if parent else None

    def __getattr__(self, name: str) -> Any:
        package = self.__spec__ is not None and self.__spec__.submodule_search_locations is not None
        if name.startswith("__") and not (package and name == "__path__"):  # `inspect` asks for them; importing a submodule, for the path
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
            if self._parent is not None:
                delattr(*self._parent)
        return getattr(importlib.import_module(self.__name__), name)


def _unchanged(function: Any = None, *args: Any, **settings: Any) -> Any:
    """A decorator, with or without settings, that returns the function."""
    return _unchanged if function is None else function


def _of_known(name: str, value: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's `symbolic_shapes`: `value` if the numbers and conditions are known, the module's own for symbolic ones."""

    def function(*known: Any, **settings: Any) -> Any:
        if _is_known(known):
            return value(*known)
        late: Any = sys.modules[_SHAPES]
        return (_Late.__getattr__(late, name) if isinstance(late, _Late) else getattr(late, name))(*known, **settings)

    return function


def _is_known(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, (list, tuple)) and all(map(_is_known, value)))


_KNOWN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), lambda known, skip=0: known),
    **dict.fromkeys(("guarding_hint_or_throw", "statically_known_true"), lambda known: known),
    "has_guarding_hint": lambda known: True,
    "is_nested_int": lambda known: False,
    "sym_and": lambda *known: all(known),
    "sym_eq": lambda a, b: [*a] == [*b] if isinstance(a, (list, tuple)) else a == b,
    "sym_or": lambda *known: any(known),
}
_LATE: dict[str, dict[str, Any]] = {
    _COMPILER: dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable", "graph_break"), _unchanged),
    _SHAPES: {name: _of_known(name, value) for name, value in _KNOWN.items()},
    "sympy": {"Basic": type("Basic", (), {})},  # torch asks whether a number is one of sympy's
}


@contextlib.contextmanager
def _without_unused_parts() -> Iterator[None]:
    """A context in which the parts look as if they were not installed, and functions that would be compiled stay as they are."""
    hidden: dict[str, Any] = {name: None for name in _UNUSED if name not in sys.modules}
    if _MASKS not in sys.modules:
        hidden[_MASKS] = ModuleType(_MASKS)
        hidden[_MASKS].TransformGetItemToIndex = lambda: importlib.import_module(_MASKS).TransformGetItemToIndex()
    with (
        _replaced(sys.modules, hidden),
        _replaced(torch.__dict__, {"compile": _unchanged}),
        _replaced(torch.distributed.__dict__, {"is_available": lambda: False}),
    ):
        yield


@contextlib.contextmanager
def _replaced(names: MutableMapping[str, Any], values: dict[str, Any]) -> Iterator[None]:
    kept = {name: names[name] for name in values if name in names}
    names.update(values)
    try:
        yield
    finally:
        for name in values:
            names.pop(name, None)
        names.update(kept)
