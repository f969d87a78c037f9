"""The engine needs only numpy, torch, safetensors, tokenizers and few other libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedtune.inference.engine as engine

ROOT = Path(str(engine.__file__)).parent
FILES = sorted(ROOT.rglob("*.py"))
LIBRARIES = {"numpy", "torch", "safetensors", "tokenizers"}
LIGHT = ("errors", "storage", "config.bounds", "contracts.seeds", "templates")  # they load the standard library alone
OURS = (*(f"fedtune.{name}" for name in LIGHT), "fedtune.inference.engine")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_engine_modules_import_only_these_libraries(file: Path) -> None:
    allowed = sys.stdlib_module_names | LIBRARIES
    for name in _imported(ast.parse(file.read_text()).body):
        assert name.startswith(OURS) if name.split(".")[0] == "fedtune" else name.split(".")[0] in allowed, f"{file.name} imports {name}"


def _imported(body: list[ast.stmt]) -> list[str]:
    """Modules that a module imports at its top level, except under TYPE_CHECKING."""
    results = []
    for node in body:
        if isinstance(node, ast.Import):
            results += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            results.append(node.module or "")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test) or isinstance(node, ast.Try):
            results += _imported(node.body)
    return results


@pytest.mark.slow
def test_importing_the_engine_loads_neither_transformers_nor_peft_nor_flower() -> None:
    modules = [".".join(("fedtune.inference.engine", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for f in FILES]
    lines = [
        "import sys, numpy, torch, safetensors, tokenizers",
        "before = set(sys.modules)",
        f"for name in {modules!r}: __import__(name)",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "print(sorted(new - set(sys.stdlib_module_names) - {'numpy', 'torch', 'safetensors', 'tokenizers', 'fedtune'}))",
        "print(sorted({'transformers', 'peft', 'flwr', 'datasets', 'bitsandbytes', 'jinja2', 'fastapi'} & set(sys.modules)))",
    ]
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=ROOT.parents[2])
    assert process.stdout.split("\n")[:2] == ["[]", "[]"]
