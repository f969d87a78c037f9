"""The examples of CONTRIBUTING.md, which tests run as they are printed."""

import re
import sys
import types
from pathlib import Path

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def example(file: str) -> str:
    """The code block that follows the first mention of the file at the end of a paragraph."""
    (matches,) = re.findall(rf"`{re.escape(file)}`[^`\n]*:\n\n```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return matches


def module(file: str, name: str) -> types.ModuleType:
    """The example as a module of this dotted name; the caller must remove it from sys.modules."""
    new_module = types.ModuleType(name)
    sys.modules[name] = new_module  # dataclasses look there for annotations
    exec(compile(example(file), f"{PAGE.name}: {file}", "exec"), vars(new_module))
    return new_module
