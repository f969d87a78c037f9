"""Facts about PEFT methods that need no import: the methods' names, and what settings and strategies each supports."""

import ast
import functools
from pathlib import Path
from typing import Any

__all__ = ["METHODS", "adapts_experts", "factored", "inits_of", "method_names", "rank_power"]

_FOLDER = Path(__file__).parents[1] / "models" / "methods"


def method_names(folder: Path) -> tuple[str, ...]:
    """Names of the methods in this folder; names of shared files begin with `_`."""
    return tuple(sorted(file.stem for file in folder.glob("[a-z]*.py")))


METHODS = method_names(_FOLDER)


def inits_of(method: str, folder: Path = _FOLDER) -> tuple[str, ...]:
    """Values of peft.init that a method supports: the constant `inits` in its file, or ("default",) without one."""
    return tuple(_constant(method, folder, "inits", ("default",)))


def adapts_experts(method: str, folder: Path = _FOLDER) -> bool:
    """Whether a method can adapt stacked experts (peft.target_parameters): the constant `experts` in its file."""
    return bool(_constant(method, folder, "experts", False))


def factored(*, exactly: bool, folder: Path = _FOLDER) -> tuple[str, ...]:
    """Names of the methods with LoRA's factors: those whose file has the constant `product`.

    Args:
        exactly: Only the methods whose change of a weight is exactly s·B·A: `product` is "whole", not "part".
        folder: The methods' files.
    """
    products = ("whole",) if exactly else ("whole", "part")
    return tuple(name for name in method_names(folder) if _constant(name, folder, "product", "") in products)


def rank_power(method: str, folder: Path = _FOLDER) -> float:
    """The power p in s = alpha / r^p of a method with LoRA's factors: the constant `rank_power` in its file, or 1 without one."""
    return _constant(method, folder, "rank_power", 1.0)


@functools.cache
def _constant(method: str, folder: Path, name: str, default: Any) -> Any:
    """A constant of a method's file. The file is parsed, not imported, because importing it would load torch."""
    for node in ast.parse((folder / f"{method}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return default
