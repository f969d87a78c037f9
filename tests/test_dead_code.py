"""The product has no code only for tests."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fedtune import __all__ as PUBLIC

ROOT = Path(__file__).parents[1]
FOUND_BY_NAME = ("strategies", "clients/turns", "fedtune/models/tasks", "fedtune/models/methods")  # by registries
CALLED_BY_OTHERS = {
    "fedtune/library.py personal_adapter": "a notebook, on a Result",
    "fedtune/network/fleet.py intercept": "Flower, before each call",
    "fedtune/models/tasks/_answers.py tokenize": "rouge_score, for each text",
}


def definitions(tree: ast.Module, own: set[str]) -> Iterator[tuple[str, ast.stmt, bool]]:
    """(name, statement, whether it belongs to a module) of each function, class, method, field and constant.

    Members of classes with a base that is not of the product are left out: the library that defines the base uses them.
    """
    for node in tree.body:
        yield from ((name, node, True) for name in names_of(node))
        if isinstance(node, ast.ClassDef) and node.name in own:
            yield from ((name, member, False) for member in node.body for name in names_of(member))


def own_classes(trees: Mapping[str, ast.Module]) -> set[str]:
    """Names of classes whose bases, direct and indirect, are all in the product."""
    bases: dict[str, set[str]] = {}
    for tree in trees.values():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("fedtune")]
        foreign = {alias.asname or alias.name for node in imports for alias in node.names} - {"ABC", "Protocol"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = {ast.unparse(base).partition("[")[0] for base in node.bases} - {"abc.ABC", "ABC", "Protocol", "Exception"}
                bases[node.name] = bases.get(node.name, set()) | {f"a library's {name}" if name in foreign else name for name in names}
    own = set(bases)
    while others := {name for name in own if not bases[name] <= own}:
        own -= others
    return own


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


class Uses:
    """Counts of the uses of each name in a piece of code.

    Attributes:
        bare: As a variable.
        dotted: As an attribute, a keyword argument, or a string that is nothing but the name, as getattr takes it.
        imported: (module, name) of `from module import name`.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.bare, self.dotted, self.imported = Counter[str](), Counter[str](), set[tuple[str, str]]()
        public = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        listed = {id(n) for node in public for n in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.bare[node.id] += 1
            elif isinstance(node, ast.Attribute):
                self.dotted[node.attr] += 1
            elif isinstance(node, ast.ImportFrom):
                self.imported |= {(node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.keyword) and node.arg:
                self.dotted[node.arg] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in listed:
                words = re.fullmatch(r"[A-Za-z_][\w.:]*", node.value)
                self.dotted.update(re.split(r"[.:]", node.value) if words else ())
                self.bare.update([node.value] if words else ())  # an annotation in quotes


def find_unused(trees: Mapping[str, ast.Module], outside: Counter[str]) -> list[str]:
    """`file name` of each definition that is used only within itself.

    Args:
        trees: Path below the root → the module.
        outside: Names that settings, entry points and the public library use.
    """
    own = own_classes(trees)
    uses = {file: Uses(tree) for file, tree in trees.items()}
    dotted = sum((u.dotted for u in uses.values()), outside)
    imported = {name for u in uses.values() for name in u.imported}
    results = []
    for file, tree in trees.items():
        path = file.removesuffix(".py").removesuffix("/__init__").removeprefix("fedtune/")
        module = "fedtune" if path == "fedtune/__init__" else f"fedtune.{path.replace('/', '.')}"
        packages = {module, module.rpartition(".")[0]}  # a package exports definitions of its modules
        for name, node, of_module in definitions(tree, own):
            itself = Uses(node)
            used = dotted[name] > itself.dotted[name]
            if of_module:
                used |= uses[file].bare[name] > itself.bare[name] or any((place, name) in imported for place in packages)
                used |= isinstance(node, ast.ClassDef) and str(Path(file).parent) in FOUND_BY_NAME
            else:
                used |= uses[file].bare[name] > itself.bare[name]
            if not used and not re.fullmatch(r"__\w+__", name):
                results.append(f"{file} {name}")
    return results


@pytest.mark.slow
def test_the_product_has_no_code_only_for_tests() -> None:
    folders = ("fedtune", "strategies", "clients", "simulations")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    outside = Counter(PUBLIC)
    for file in (*(ROOT / "conf").rglob("*.yaml"), ROOT / "pyproject.toml"):
        outside.update(re.findall(r"[A-Za-z_]\w*", file.read_text(encoding="utf-8")))
    assert len(trees) > 200
    assert sorted(find_unused(trees, outside)) == sorted(CALLED_BY_OTHERS)


def test_the_search_detects_dead_code() -> None:
    code = """
import abc, lib
KEPT, GONE = 1, 2
LOST = KEPT
def again(n): return again(n - 1)
def called(): return used
class Base(abc.ABC):
    field: int = 0
    def method(self): return self.field
    def nobody(self): return self.nobody()
class Theirs(lib.Base):
    def hook(self): ...
class Derived(Theirs):
    def hook(self): ...
def start(x: "Base"): return called(), Derived().method
"""
    trees = {"fedtune/a.py": ast.parse(code), "fedtune/b.py": ast.parse("from fedtune.a import start\nfrom fedtune.c import LOST\nstart")}
    assert find_unused(trees, Counter()) == ["fedtune/a.py LOST", "fedtune/a.py again", "fedtune/a.py nobody"]
    assert find_unused(trees, Counter(["again", "nobody", "LOST"])) == []
