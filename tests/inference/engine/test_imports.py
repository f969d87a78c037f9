"""The engine needs only numpy, safetensors, tokenizers and few other libraries: torch is for the reference and for exports."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedtune.inference.engine as engine
from fedtune.inference.engine.native.library import kernels
from tests.inference.engine.engines import build
from tests.inference.engine.test_load import write_package_of

ROOT = Path(str(engine.__file__)).parent
FILES = sorted(ROOT.rglob("*.py"))
LIBRARIES = {"numpy", "safetensors", "tokenizers"}
LIGHT = ("errors", "storage", "config.bounds", "contracts.seeds", "templates")  # these load only the standard library
OURS = (*(f"fedtune.{name}" for name in LIGHT), "fedtune.inference.engine")
WITH_TORCH = ("reference", "gptq_awq.py", "package_writer.py")
TORCHS = tuple(f"fedtune.inference.engine.{name.removesuffix('.py')}" for name in WITH_TORCH)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_engine_modules_import_only_these_libraries(file: Path) -> None:
    torchs = file.relative_to(ROOT).parts[0] in WITH_TORCH
    allowed = sys.stdlib_module_names | LIBRARIES | ({"torch"} if torchs else set[str]())
    for name in _imported(ast.parse(file.read_text()).body):
        if name.split(".")[0] == "fedtune":
            assert name.startswith(OURS) and (torchs or not name.startswith(TORCHS)), f"{file.name} imports {name}"
        else:
            assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def _imported(body: list[ast.stmt]) -> list[str]:
    """Modules that a module imports at its top level, except under TYPE_CHECKING."""
    results = []
    for node in body:
        if isinstance(node, ast.Import):
            results += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            results += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test) or isinstance(node, ast.Try):
            results += _imported(node.body)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("torchs", [False, True])
def test_importing_the_engine_loads_neither_transformers_nor_peft_nor_flower(torchs: bool) -> None:
    files = [f for f in FILES if torchs or f.relative_to(ROOT).parts[0] not in WITH_TORCH]
    modules = [".".join(("fedtune.inference.engine", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for f in files]
    lines = [
        f"import sys, numpy, numpy.random, safetensors, tokenizers{', torch' if torchs else ''}",
        "before = set(sys.modules)",
        f"for name in {modules!r}: __import__(name)",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "print(sorted(new - set(sys.stdlib_module_names) - {'numpy', 'safetensors', 'tokenizers', 'fedtune'}))",
        "print(sorted({'transformers', 'peft', 'flwr', 'datasets', 'bitsandbytes', 'jinja2', 'fastapi'} & set(sys.modules)))",
        "print('torch' in sys.modules)",
    ]
    process = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=ROOT.parents[2])
    assert process.stdout.split("\n")[:3] == ["[]", "[]", str(torchs)]


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else PathFinder.find_spec(name, path, target)
sys.meta_path = [Others if finder is PathFinder else finder for finder in sys.meta_path]
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("torch is found")
"""

# prints the tokens of a package and of a folder for every way of generating, and the number of ways in fp32
ANSWERS = """
import json, sys
from fedtune.inference.engine import ready
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.decoder import describe_passes
from fedtune.inference.engine.generate import Generation, Speculation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate.adapt import Adapt
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.speculate.lookup import Lookup
ready.LEAST = 0
def answers(engine):
    caches = [lambda: KiviCache(engine.shape, 64, 4, residual=8, group=4, undo=6), lambda: WindowCache(engine.shape, 64, 10, 2, undo=6)]
    ways = [{}, {"sampling": Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3), "logprobs": 2}]
    ways += [{"speculation": Speculation(make(), Adapt(fixed=4))} for make in (Lookup, lambda: EarlyExit(1))]
    ways += [{"context": Context(engine, make)} for make in caches]
    ids = [2 + i % 7 for i in range(30)]
    return [describe_passes(engine.decoder), *([p.token for p in Generation(engine, ids, max_new_tokens=20, **way)] for way in ways)]
found = [answers(load_engine(folder, kind)) for folder, kind in json.loads(sys.argv[1])]
print(json.dumps([*found, len(answers(load_engine(json.loads(sys.argv[1])[1][0], "fp32")))]))
print("torch" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(kernels() is None, reason="needs the native kernels")
def test_the_engine_generates_the_same_tokens_where_torch_is_not_installed(tmp_path: Path) -> None:
    build(tmp_path / "hf", "qwen3_biases", seed=0)
    (tmp_path / "edge").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "edge" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    write_package_of(tmp_path / "edge", "llama")
    models = json.dumps([[str(tmp_path / "edge"), None], [str(tmp_path / "hf"), "int4"]])
    best = kernels()
    assert best is not None

    def run(script: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / f"cache{len(script)}"), **more}
        command = [sys.executable, "-c", script + ANSWERS, models]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT.parents[2], env=environment)

    # the best set, because torch may be faster in int8
    without, normal = run(WITHOUT_TORCH), run("import torch\n", FEDTUNE_NATIVE=best.instructions)
    assert without.returncode == 0, without.stderr
    assert normal.returncode == 0, normal.stderr
    assert len(list(tmp_path.glob("cache*/fedtune/ready/*/weights.bin"))) == 4  # both models were packed and mapped
    (*found, count), (*wanted, ways) = (json.loads(process.stdout.splitlines()[0]) for process in (without, normal))
    assert found == wanted and ways == 7 and [model[0] for model in found] == ["in native code"] * 2
    assert all(len(tokens) > 5 for model in found for tokens in model[1:])
    assert count == ways
    off = run(WITHOUT_TORCH, FEDTUNE_NATIVE="off")
    sentence = "FEDTUNE_NATIVE=off needs torch, which is not installed: leave it out, or pip install torch"
    assert off.stderr.splitlines()[-1] == f"fedtune.errors.ModelError: {sentence}"
    assert [process.stdout.splitlines()[1] for process in (without, normal)] == ["False", "True"]
