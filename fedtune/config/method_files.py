"""What the files of PEFT methods say before anything is loaded: their names, and with which values of peft.init they can begin."""

import ast
from pathlib import Path

__all__ = ["METHODS", "inits_of", "method_names"]

_FOLDER = Path(__file__).parents[1] / "models" / "methods"


def method_names(folder: Path) -> tuple[str, ...]:
    """The methods whose files are in this folder; files that methods share begin with `_`."""
    return tuple(sorted(file.stem for file in folder.glob("[a-z]*.py")))


METHODS = method_names(_FOLDER)


def inits_of(method: str, folder: Path = _FOLDER) -> tuple[str, ...]:
    """Values of peft.init that a method can begin with: the constant `inits` of its file, ("default",) where it has none.

    The file is read and not run, because running it would load torch.
    """
    for node in ast.parse((folder / f"{method}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["inits"]:
            return tuple(ast.literal_eval(node.value))
    return ("default",)
