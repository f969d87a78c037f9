"""Which modules may import which, and under which names."""

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedtune
from tests.syntax import nodes

ROOT = Path(__file__).parents[1]
BARE = ("strategies", "clients", "simulations", "conf")
# Package → the packages that it may import, besides those of LOW. A package is a folder, or a module at the root of fedtune/.
LOW = ("version", "errors", "storage", "config", "contracts")  # each may import those before it; every other package may import all of them
MAY_IMPORT = {
    "traffic": set[str](),
    "templates": set[str](),
    "data": set[str](),
    "models": {"data", "templates"},  # a task encodes rows and scores examples
    "privacy": {"models"},
    "exchange": {"privacy"},
    "strategies": set[str](),
    "clients": {"models", "data", "privacy", "traffic"},
    "inference": {"models", "templates"},
    "export": {"models", "data", "inference", "clients"},  # a personal model is the global adapter with the client's stored tensors
    "delivery": {"models", "clients", "export", "inference"},  # a device installs and serves the model with the best score on its own rows
    "runs": {"models", "privacy"},  # an adapter's card states how to load it, and the clients' privacy costs
    "rounds": {"exchange", "traffic", "privacy", "runs"},
    "network": {"delivery"},  # the worker process is the client
    "simulations.engines": {"clients", "models", "data", "privacy"},
    "warm_start": {"models", "data", "clients", "runs"},
    "experiment": {"rounds", "exchange", "clients", "models", "export", "runs", "simulations.engines", "warm_start"},
    "library": {"experiment", "clients", "runs", "models", "export"},
    "cli": {"experiment", "rounds", "runs", "network", "delivery", "clients", "data", "export", "inference"},
    "sim": {"cli"},
    "simulations.studies": {"experiment", "runs", "clients", "data", "export", "inference"},
    "simulations.benchmarks": {
        "experiment", "rounds", "runs", "clients", "models", "data", "export", "inference", "strategies", "simulations.engines",
        "simulations.studies",
    },
    "simulations": set[str](),
}  # fmt: skip


def files() -> Iterator[tuple[str, Path]]:
    """(module, file) of the product, except the root's __init__, which lists the public names."""
    for folder in ("fedtune", *BARE):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / "fedtune" if folder == "fedtune" else ROOT).with_suffix("").parts
            if name := ".".join(part for part in parts if part != "__init__"):
                yield name, file


MODULES = {name for name, _ in files()}


def package_of(module: str) -> str:
    """The package of a module: a folder or a root module; each folder of simulations/ is one."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "simulations" else parts[0]


@functools.cache
def imports_of(file: Path) -> frozenset[str]:
    """The fedtune modules that a file imports, named after `fedtune.`: at the top, in functions, and for type checkers."""
    found: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively: write fedtune.…"
            whole = [f"{node.module}.{a.name}" for a in node.names]
            names = [n if n.removeprefix("fedtune.") in MODULES else node.module or "" for n in whole]
        else:
            continue
        assert not {n.partition(".")[0] for n in names} & set(BARE), f"{file}:{node.lineno} imports a bare sub-package name"
        found |= {n.removeprefix("fedtune.") for n in names if n.partition(".")[0] == "fedtune" and n != "fedtune"}
        assert "fedtune" not in names or file.parent.parent == ROOT, f"{file}:{node.lineno} imports the root package: name the module"
    return frozenset(found)


def allowed_packages(of: str) -> set[str]:
    """The packages that a package may import."""
    return set(LOW[: LOW.index(of) + 1]) if of in LOW else {of, *LOW, *MAY_IMPORT[of]}


@pytest.mark.parametrize(("module", "file"), list(files()), ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else "")
def test_a_file_imports_only_what_its_package_may(module: str, file: Path) -> None:
    excess = {name for name in imports_of(file) if package_of(name) not in allowed_packages(package_of(module))}
    assert not excess, f"{file.relative_to(ROOT)} imports {excess}: a package imports only the packages below it"


def test_the_package_order_has_no_cycle() -> None:
    tuple(TopologicalSorter({of: allowed_packages(of) - {of} for of in (*LOW, *MAY_IMPORT)}).static_order())
    used = {(package_of(module), package_of(name)) for module, file in files() for name in imports_of(file)}
    unused = {(of, other) for of, others in MAY_IMPORT.items() for other in others} - used
    assert not unused, f"the table allows what nobody needs: {unused}"


def test_the_import_graph_has_no_cycle() -> None:
    assert cycle({module: imports_of(file) - {module} for module, file in files()}) is None


def cycle(graph: Mapping[str, Set[str]]) -> list[str] | None:
    """One cycle of the graph, if it has any."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as bad:
        return bad.args[1]
    return None


def test_the_import_rules_detect_violations(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import fedtune.data.demo\ndef f():\n    from fedtune import clients, models\n    import fedtune.plan")
    assert imports_of(tmp_path / "x.py") == {"data.demo", "clients", "models", "plan"}
    (tmp_path / "y.py").write_text("if TYPE_CHECKING:\n    from fedtune.data import local\n    from fedtune.data.hub import read_hub")
    assert imports_of(tmp_path / "y.py") == {"data.local", "data.hub"}
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None and cycle({"a": {"b", "c"}, "b": {"c"}}) is None


@pytest.mark.parametrize("name", BARE)
def test_a_bare_name_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"import this package as fedtune.{name}"):
        importlib.import_module(name)
    assert importlib.import_module(f"fedtune.{name}").__name__ == f"fedtune.{name}"


def test_the_version_and_the_typing_links() -> None:
    assert fedtune.__version__.count(".") == 2
    assert {f.name for f in (ROOT / "typings" / "fedtune").iterdir()} == set(BARE)


def test_only_one_module_parses_json_and_yaml() -> None:
    """Python's parsers raise unexpected exceptions; `fedtune.storage.parsing` gives a ValueError with a short reason."""
    own = {"parsing.py", "page.py"}
    looked, results = 0, []
    for _, file in files():
        if file.name in own or {"benchmarks", "studies"} & set(file.parts):
            continue
        looked += 1
        for node in nodes(file):
            if not isinstance(node, ast.Attribute) or node.attr not in ("load", "loads", "safe_load"):
                continue
            if ast.unparse(node) in ("json.loads", "json.load", "yaml.safe_load", "yaml.load"):
                results.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert looked > 100 and not results, f"use fedtune.storage.parsing: {results}"


def renames(node: ast.AST) -> bool:
    """Whether this call replaces a file, flushes one, or creates a temporary name next to one."""
    if isinstance(node, ast.Attribute):
        if node.attr in ("rename", "renames", "fsync"):
            return True
        places = ("os.replace", "shutil.move", "tempfile.mkdtemp", "tempfile.mkstemp")
        return node.attr in ("replace", "move", "mkdtemp", "mkstemp") and ast.unparse(node) in places
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.endswith(".tmp") and not node.value.startswith((".config", ".start"))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace" and len(node.args) == 1:
        if ast.unparse(node.func) == "dataclasses.replace":
            return False
        where = ast.unparse(node.args[0]) + " " + ast.unparse(node.func.value)
        return bool(re.search(r"path|place\b|target|file|folder|beside|temporary|tmp| / ", where, re.IGNORECASE))
    return False


def test_only_one_module_writes_atomically() -> None:
    violations = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for _, file in files()
        if file != ROOT / "fedtune" / "storage" / "atomic.py"
        for node in nodes(file)
        if renames(node)
    ]
    assert not violations, f"use fedtune.storage.atomic: {violations}"


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("os.replace(a, b)", True),
        ("os.rename(a, b)", True),
        ("a.rename(b)", True),
        ("beside.replace(kept)", True),
        ("x.replace(self.path)", True),
        ("x.replace(folder / 'a')", True),
        ("shutil.move(a, b)", True),
        ("f'.{name}.tmp'", True),
        ("os.fsync(f.fileno())", True),
        ("state.adapter.replace(tensors)", False),
        ("text.replace('a', 'b')", False),
        ("dataclasses.replace(config, out=out)", False),
    ],
)
def test_the_write_rule_detects_violations(text: str, forbidden: bool) -> None:
    assert any(renames(node) for node in ast.walk(ast.parse(text))) == forbidden


def test_only_one_module_checks_ranges() -> None:
    sentence = "is out of range: it must be|is not known: choose one of"
    violations = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for _, file in files()
        if file != ROOT / "fedtune" / "config" / "bounds.py"
        for node in nodes(file)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(sentence, node.value)
    ]
    assert not violations, f"use fedtune.config.bounds.require: {violations}"
