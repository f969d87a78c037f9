"""Classes found by name: each in the module of that name in one folder, or registered from elsewhere, such as a notebook."""

import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Collection, Iterator
from typing import Any


class Registry(Collection[str]):
    """Finds the classes of one kind. As a collection, it holds their names.

    Args:
        package: Dotted name of the folder. Modules whose names begin with an underscore are shared code, not classes to find.
        base: Dotted name of the base class. It is imported with the first class that is found, because settings know names only.
    """

    def __init__(self, package: str, base: str) -> None:
        self._package, self._base = package, base
        self._registered: dict[str, type] = {}
        self._found: dict[str, type] = {}

    def names(self) -> tuple[str, ...]:
        """All names, sorted. Imports no module."""
        return tuple(sorted(self.own() | self._registered.keys()))

    def own(self) -> frozenset[str]:
        """Names of the folder's own modules."""
        spec = importlib.util.find_spec(self._package)
        places = (spec.submodule_search_locations if spec else None) or ()
        return _modules(tuple((place, os.stat(place).st_mtime_ns) for place in places))

    def __contains__(self, name: object) -> bool:
        return name in self._found or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def register(self, name: str, kind: type) -> None:
        """Register a class from elsewhere, such as a notebook, in this process."""
        self._registered[name] = kind

    def remove(self, name: str) -> None:
        """Remove a registered class."""
        del self._registered[name]

    def find(self, name: str) -> Any:
        """The class of this name, one of `names`.

        Raises:
            KeyError: The name is unknown.
            TypeError: The module does not define exactly one subclass of the base.
        """
        home, _, kind_name = self._base.rpartition(".")
        base: type = getattr(importlib.import_module(home), kind_name)
        kind = self._registered.get(name) or self._found.get(name)
        if kind is None:
            if name not in self:
                raise KeyError(name)
            dotted = f"{self._package}.{name}"
            module = importlib.import_module(dotted)
            own = [k for k in vars(module).values() if isinstance(k, type) and k.__module__ == dotted]
            kinds = [k for k in own if issubclass(k, base) and not k.__name__.startswith("_")]
            if len(kinds) != 1:
                raise TypeError(f"{dotted} defines {len(kinds)} subclasses of {base.__name__}: define exactly one")
            kind = self._found[name] = kinds[0]
        if not issubclass(kind, base):
            raise TypeError(f"{kind.__name__}, registered as '{name}', is not a subclass of {base.__name__}")
        return kind


@functools.lru_cache(maxsize=16)
def _modules(places: tuple[tuple[str, int], ...]) -> frozenset[str]:
    """Names of the modules in these folders, each with the time of its last change: a round asks for names many times."""
    return frozenset(m.name for m in pkgutil.iter_modules([place for place, _ in places]) if not m.name.startswith("_"))


TASKS = Registry("fedtune.models.tasks", "fedtune.contracts.task.Task")
