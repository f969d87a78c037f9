"""The syntax trees of the product's files, which many tests read."""

import ast
import functools
from pathlib import Path


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file, in the order of `ast.walk`. They are parsed once for all tests of a process: a test must not change them."""
    return tuple(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
