"""Facts about PEFT methods that need no import: the methods' names, and the values of peft.init that each supports."""

import ast
from pathlib import Path

__all__ = ["METHODS", "inits_of", "method_names"]

_FOLDER = Path(__file__).parents[1] / "models" / "methods"


def method_names(folder: Path) -> tuple[str, ...]:
    """Names of the methods in this folder; names of shared files begin with `_`."""
    return tuple(sorted(file.stem for file in folder.glob("[a-z]*.py")))


METHODS = method_names(_FOLDER)


def inits_of(method: str, folder: Path = _FOLDER) -> tuple[str, ...]:
    """Values of peft.init that a method supports: the constant `inits` in its file, or ("default",) without one.

    The file is parsed, not imported, because importing it would load torch.
    """
    for node in ast.parse((folder / f"{method}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["inits"]:
            return tuple(ast.literal_eval(node.value))
    return ("default",)
