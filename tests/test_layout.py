"""Who may import whom, and under which name."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedtune

ROOT = Path(__file__).parents[1]
CONTRACTS = {
    "__version__",
    "bounds",
    "checkpoint_files",
    "combinations",
    "config",
    "errors",
    "files",
    "hello",
    "ids",
    "method_files",
    "parsing",
    "plan",
    "promise",
    "registry",
    "reading",
    "run_config",
    "scores",
    "seeds",
    "state",
    "strategy",
    "task",
    "wire",
}
DOORS = {"sim", "server", "client", "cli", "app_flower", "library"}
MAY_IMPORT = {
    "models": CONTRACTS | {"data"},  # a task encodes rows and scores examples
    "data": CONTRACTS,
    "privacy": CONTRACTS | {"models"},
    "traffic": CONTRACTS,
    "exchange": CONTRACTS | {"privacy"},
    "inference": CONTRACTS | {"models"},
    "report": CONTRACTS,
    "network": CONTRACTS | {"flower"},
    "strategies": CONTRACTS | {"traffic"},
    "clients": CONTRACTS | {"models", "data", "privacy", "traffic"},
}
EXCEPTIONS = {  # file → what it imports against the table, and why
    "fedtune/post.py": {"traffic"},  # what travels is encoded and decoded between bridge and wire,
    "fedtune/bridge.py": {"exchange"},  # the round loop plays the exchange that it is given,
    "fedtune/round.py": {"exchange"},  # and is its channel
    "fedtune/reply.py": {"traffic", "privacy"},  # so that no strategy sees it encoded; and it is held to what it promised
    # what was spent is in the ledgers, also where no record tells of it; and the backbone says how it is loaded
    "fedtune/report/card.py": {"privacy", "models"},
    "fedtune/report/snippet.py": {"models"},  # models knows which methods weights can express
    "fedtune/network/worker.py": {"clients"},  # the process that is the client
    "fedtune/watch.py": {"report"},  # the bridge's watcher tells the report's writers
    "fedtune/status.py": {"report"},  # it shows of a run what the report shows, for the terminal
    "fedtune/inference/quantise/calibrate.py": {"data"},  # text of any file that a run could read, or of the run itself
    "fedtune/inference/edge.py": {"data"},  # the perplexity of what is exported is that of the run's own test
    "fedtune/inference/personal.py": {"clients"},  # a personal model is the global adapter with what a client's store keeps
    "fedtune/inference/export.py": {"data"},  # the demo's prompt goes into the exported folder
}
BARE = ("strategies", "clients", "simulations", "conf")


def files() -> Iterator[tuple[str, Path]]:
    """(room, file): the room is the sub-package, or the module's own name for the root files."""
    for folder in ("fedtune", *BARE):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder)
            yield (inner.parts[0].removesuffix(".py") if folder == "fedtune" else folder), file


def imported(file: Path) -> set[str]:
    """The fedtune modules that a file imports anywhere, by the name after `fedtune.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively: write fedtune.…"
            names = [f"fedtune.{a.name}" for a in node.names] if node.module == "fedtune" else [node.module or ""]
        else:
            continue
        assert not {n.partition(".")[0] for n in names} & set(BARE), f"{file}:{node.lineno} imports a bare sub-package name"
        found |= {n.split(".")[1] for n in names if n.startswith("fedtune.")}
    return found


@pytest.mark.parametrize(("room", "file"), list(files()), ids=lambda v: str(v.relative_to(ROOT)) if isinstance(v, Path) else "")
def test_a_file_imports_only_what_its_room_may(room: str, file: Path) -> None:
    if room in CONTRACTS:
        allowed = CONTRACTS
    elif room == "simulations":
        assert not imported(file) & DOORS
        return
    elif room in MAY_IMPORT:
        allowed = MAY_IMPORT[room] | {room}
    elif room in DOORS | {"app", "__init__"}:
        return  # doors import everything
    else:  # bridge, run, compose, flower: the machinery between contracts and doors knows no room
        allowed = CONTRACTS | {f.stem for f in (ROOT / "fedtune").glob("*.py")} - DOORS - {"app"} | {"runs"}
    excess = imported(file) - allowed
    assert excess == EXCEPTIONS.get(str(file.relative_to(ROOT)), set())  # an exception that is no longer needed goes


def test_the_rule_sees_what_it_forbids(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import fedtune.data.demo\ndef f():\n    from fedtune import clients, models\n")
    assert imported(tmp_path / "x.py") == {"clients", "data", "models"}


@pytest.mark.parametrize("name", BARE)
def test_a_bare_name_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"import this package as fedtune.{name}"):
        importlib.import_module(name)
    assert importlib.import_module(f"fedtune.{name}").__name__ == f"fedtune.{name}"


def test_the_root() -> None:
    assert fedtune.__version__.count(".") == 2
    assert {f.name for f in (ROOT / "typings" / "fedtune").iterdir()} == set(BARE)


def test_only_one_module_parses_json_and_yaml() -> None:
    """Python's parsers raise what their callers do not expect; `fedtune.parsing` gives a ValueError with a short reason."""
    own = {"parsing.py", "page.py"}
    looked, found = 0, []
    for _, file in files():
        if file.name in own or file.name.startswith(("bench_", "study_")) or "bench_inference" in file.parts:
            continue
        looked += 1
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load", "yaml.safe_load", "yaml.load"):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert looked > 100 and not found, f"use fedtune.parsing: {found}"


def renames(node: ast.AST) -> bool:
    """Whether this puts a file in the place of another, flushes one, or makes up a name beside one."""
    if isinstance(node, ast.Attribute):
        whole = ast.unparse(node)
        return node.attr in ("rename", "renames", "fsync") or whole in ("os.replace", "shutil.move", "tempfile.mkdtemp", "tempfile.mkstemp")
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.endswith(".tmp") and not node.value.startswith(".config")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dataclasses.replace":
        return False
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace" and len(node.args) == 1:
        where = ast.unparse(node.args[0]) + " " + ast.unparse(node.func.value)
        return bool(re.search(r"path|place\b|target|file|folder|beside|temporary|tmp| / ", where, re.IGNORECASE))
    return False


def test_only_one_module_writes_beside_and_renames() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for _, file in files()
        if file != ROOT / "fedtune" / "files.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if renames(node)
    ]
    assert not found, f"use fedtune.files: {found}"


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
def test_that_rule_sees_what_it_forbids(text: str, forbidden: bool) -> None:
    assert any(renames(node) for node in ast.walk(ast.parse(text))) == forbidden


def test_only_one_module_judges_bounds() -> None:
    sentence = "is out of range: it must be|is not known: choose one of"
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for _, file in files()
        if file != ROOT / "fedtune" / "bounds.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(sentence, node.value)
    ]
    assert not found, f"use fedtune.bounds.require: {found}"
