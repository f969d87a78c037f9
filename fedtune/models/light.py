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
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
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
_lock = threading.Lock()


def import_models() -> None:
    """Import transformers, PEFT and, if it is installed, bitsandbytes. Does nothing if transformers' models are imported already.

    If a version of the libraries needs one of the parts, they are imported whole.
    """
    if _MODELS[0] in sys.modules:
        return
    before = set(sys.modules)
    sys.meta_path.insert(0, _Imported())
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
    """Stands for a module of which a process needs few names, which have the given values. Any other name imports the module itself, which
    then takes this one's place and answers for all names."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = spec = importlib.util.find_spec(name)
        self.__file__ = spec and spec.origin
        self._values = list(values)
        vars(self).update(values)
        sys.modules[name] = self
        if name.rpartition(".")[0]:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], self)

    def __getattr__(self, name: str) -> Any:
        package = self.__spec__ is not None and self.__spec__.submodule_search_locations is not None
        if name.startswith("__") and not (package and name == "__path__"):  # asked by `inspect`; the path by imports of a submodule
            raise AttributeError(name)
        with _lock:  # not during the import: importlib has its own locks, and the imported modules may ask this one for names
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        for value in self._values:  # for modules that refer to this one
            vars(self).pop(value, None)
        return getattr(module, name)


class _Imported(MetaPathFinder, Loader):
    """Finds submodules that an import of their package has imported already.

    importlib imports the package of `import package.module` first, and then looks whether that has imported the module. But it finds a
    `_Late` package imported, whose `__path__` imports the package only afterward, and would execute the module a second time.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        module = sys.modules.get(fullname) if fullname.startswith(tuple(f"{name}." for name in _LATE)) else None
        if module is None or isinstance(module, _Late):
            return None
        spec = spec_from_loader(fullname, self)
        if spec is not None:
            spec.loader_state = module.__spec__
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # importlib sets it, if the module lets it
            module.__spec__ = spec.loader_state


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
