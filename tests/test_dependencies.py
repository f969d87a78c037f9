"""A device that only runs inference needs no training library; if one is missing, a sentence says what to install."""

import ast
import functools
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

import fedtune
from fedtune.cli import flower_app
from fedtune.config import Config
from fedtune.errors import _OF_TRAINING, ConfigError, user_message
from fedtune.export.edge import export_edge
from fedtune.inference.engine.package import read_package
from fedtune.runs.directory import RunDirectory
from tests.models.build import checkpoint
from tests.quick import quick
from tests.syntax import nodes
from tests.test_layout import files
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
NOT_ON_A_DEVICE = {"torch", "flwr", "peft", "transformers", "opacus", "datasets", "bitsandbytes", "ray", "hydra-core"}
ADVICE = "pip install 'fedtune[train]'"


def closure(wanted: Iterable[str]) -> set[str]:
    """Names of all distributions that these requirements install, from the metadata of those installed here."""
    open_, seen = [Requirement(line) for line in wanted], set[tuple[str, str]]()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                lines = (Requirement(line) for line in _requires(name, extra))
                open_ += [r for r in lines if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def _requires(name: str, extra: str) -> list[str]:
    if name == "fedtune":  # from the file, because this environment may be older
        return EXTRAS[extra] if extra else BASE
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # for example of an extra that is not installed here
        return []


def names_in(lines: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


@functools.cache
def modules() -> dict[str, set[str]]:
    """Import name → the distributions that provide it."""
    return {name: {canonicalize_name(d) for d in found} for name, found in metadata.packages_distributions().items()}


def missing() -> list[str]:
    """The import names that are missing in an environment with only the base dependencies."""
    base = closure(BASE)
    return sorted(name for name, found in modules().items() if not found & base and name.isidentifier() and name != "fedtune")


# -- pyproject.toml -----------------------------------------------------------------------------------------------------------------------


def test_a_device_installs_no_training_library() -> None:
    assert not closure(BASE) & NOT_ON_A_DEVICE and closure(["fedtune[edge]"]) == closure(BASE) | {"fedtune"}
    assert closure(["fedtune[train]", "fedtune[ray]"]) >= NOT_ON_A_DEVICE  # so the names are spelled correctly
    assert {"flwr", "transformers", "torch"} <= set(missing()) and not {"numpy", "tokenizers", "safetensors"} & set(missing())


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"edge", "train"}))
def test_every_other_extra_installs_the_training_libraries(extra: str) -> None:
    assert closure([f"fedtune[{extra}]"]) >= names_in(EXTRAS["train"])


OF_TRAINING = {
    "config.compose": {"hydra", "omegaconf"},
    "inference.bench": {"matplotlib"},
    "contracts": {"torch", "flwr"},
    "inference.engine.reference": {"torch"},  # where the native kernels do not run
    "inference.engine.gptq_awq": {"torch"},
    "inference.engine.package_writer": {"torch"},  # of exports
    "inference.quantize": {"torch"},
    "inference.generate_transformers": {"torch"},
}
# all packages that a device runs, besides a few modules of models/
DEVICE_PACKAGES = ("errors", "storage", "config", "contracts", "templates", "inference")
OTHERS = {"llama_cpp", "openvino", "optimum", "gguf", "ray"}  # other programs' that a benchmark measures, and extras of their own


def third_party(file: Path) -> Iterator[str]:
    """Top-level names of the third-party modules that a file imports anywhere."""
    for node in nodes(file):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"fedtune"}


def test_every_imported_library_is_declared() -> None:
    looked, base, everything = 0, names_in(BASE), names_in([*BASE, *EXTRAS["train"]])
    for module, file in files():
        for name in set(third_party(file)) - OTHERS:
            distributions = {"protobuf"} if name == "google" else modules()[name]
            late = next((names for at, names in OF_TRAINING.items() if f"{module}.".startswith(f"{at}.")), set[str]())
            wanted = base if module.startswith(DEVICE_PACKAGES) and name not in late else everything
            assert distributions & wanted, (
                f"{module} imports {name}, and pyproject.toml does not ask for {distributions} where a device needs it"
            )
            looked += 1
    assert looked > 300


def test_the_sentence_covers_every_training_library() -> None:
    assert {canonicalize_name(d) for d in _OF_TRAINING.values()} == names_in(EXTRAS["train"])
    for name, distribution in _OF_TRAINING.items():
        assert canonicalize_name(distribution) in modules()[name.partition(".")[0]]


def test_another_missing_library_is_an_error() -> None:
    for name in ("fedtune.nothing", "flwr.nothing", "nothing", None):
        with pytest.raises(ModuleNotFoundError):
            user_message(ModuleNotFoundError("no", name=name))


# -- an environment without them ----------------------------------------------------------------------------------------------------------

WITHOUT = """
import json, os, signal, sys, threading, time, urllib.request
from pathlib import Path

class Installed:
    "Finds what was found before, but for the blocked names."
    def __init__(self, finders, blocked):
        self.finders, self.blocked = finders, blocked
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.blocked:
            return next((s for f in self.finders if (s := f.find_spec(name, path, target))), None)

sys.meta_path[:] = [Installed(list(sys.meta_path), set(json.loads(sys.argv.pop())))]
"""


def run_without(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with only the base dependencies importable."""
    command = [sys.executable, "-c", WITHOUT + code, *args, json.dumps(missing())]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


STARTS = {"python -m fedtune.sim": ("fedtune", "import runpy; sys.argv[0] = 'sim'; runpy.run_module('fedtune.sim', run_name='__main__')")}
STARTS |= {
    name: (name, f"from {place.partition(':')[0]} import {place.partition(':')[2]} as main; sys.exit(main())")
    for name, place in PROJECT["scripts"].items()
    if name != "fedtune"
}


@pytest.mark.parametrize("name", quick(STARTS, "python -m fedtune.sim"))
def test_a_program_that_trains_says_what_to_install(name: str) -> None:
    program, code = STARTS[name]
    process = run_without(code, "--help")
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert process.stderr.startswith(f"{program}: this needs ") and process.stderr.endswith(f", which is not installed: {ADVICE}\n")
    assert process.stderr.count("\n") == 1


def test_an_app_of_flower_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedtune.config.compose", raising=False)
    monkeypatch.setitem(sys.modules, "hydra", None)
    with pytest.raises(ConfigError, match=r"this needs hydra-core, which is not installed: pip install 'fedtune\[train\]'"):
        flower_app._config("heterogeneous", "")


DEVICE = """
from io import StringIO
from fedtune.cli.main import main
import fedtune

place = Path(sys.argv[1])
results = {}

def run(name, *words):
    sys.stdout, sys.stderr = StringIO(), StringIO()
    try:
        code = main([str(w) for w in words])
    finally:
        out, err, sys.stdout, sys.stderr = sys.stdout.getvalue(), sys.stderr.getvalue(), sys.__stdout__, sys.__stderr__
    results[name] = [code, out, err]

def ask():
    while "http://" not in (line := getattr(sys.stdout, "getvalue", str)()):  # until the command below has begun, and listens
        time.sleep(0.05)
    body = {"model": "apart", "prompt": "set lamp", "max_tokens": 3, "temperature": 0}
    asked = urllib.request.Request(line.strip() + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        results["request"] = json.load(urllib.request.urlopen(asked, timeout=60))
    finally:
        os.kill(os.getpid(), signal.SIGINT)

run("generate", "generate", place / "edge", "set lamp", "--max-new-tokens", 3)
run("folder", "generate", place / "model", "set lamp", "--max-new-tokens", 3)
run("adapter", "generate", place / "edge", "set lamp", "--max-new-tokens", 3, "--adapter", "apart")
sys.stdin = StringIO("set lamp\\nset door\\n")
run("chat", "chat", place / "edge", "--max-new-tokens", 3)
run("bench", "bench", place / "edge", "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
threading.Thread(target=ask, daemon=True).start()
run("serve", "serve", place / "edge", "--port", 0)
run("status", "status", place / "run")
for name in sorted(set(sys.argv[2:])):
    run(name, *(w.replace("PLACE", str(place)) for w in name.split()))
for name in fedtune.__all__:
    try:
        results["fedtune." + name] = getattr(fedtune, name).__name__
    except ImportError as bad:
        results["fedtune." + name] = str(bad)
try:
    fedtune.generate_text(place / "other", "lamp")
except fedtune.FedtuneError as bad:
    results["fallback"] = str(bad)
print(json.dumps(results))
"""
REFUSED = (
    "export PLACE/model", "export PLACE/model --to edge --out PLACE/x", "export PLACE/model --to gguf", "draft PLACE/model --steps 1",
    "keys --out PLACE/keys --server-name h --clients a", "compare PLACE/run --out PLACE/compared", "bench PLACE/edge --out PLACE/bench",
    "generate PLACE/other lamp", "chat PLACE/other", "serve PLACE/other --port 0",
)  # fmt: skip


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the commands with only the base dependencies: name → exit code, stdout, stderr."""
    place = tmp_path_factory.mktemp("device")
    model = tiny_llama(place / "model")
    export_edge(model, place / "edge")
    (place / "edge" / "adapters").mkdir()
    module, generator = "model.layers.1.mlp.down_proj", torch.Generator().manual_seed(0)
    factors = {f"{module}.lora_A": torch.randn(2, 40, generator=generator), f"{module}.lora_B": torch.randn(24, 2, generator=generator)}
    base = {"fedtune": json.dumps({"base": read_package(place / "edge").card["base"]})}
    save_file(factors, place / "edge" / "adapters" / "apart.safetensors", base)
    checkpoint(place / "other", "gpt2")
    RunDirectory.create(Config(), place / "run").close()
    process = run_without(DEVICE, place, *REFUSED)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_inference_commands_run_on_a_device(device: dict[str, Any]) -> None:
    for name in ("generate", "folder", "adapter", "chat", "bench", "serve"):
        assert device[name][0] == 0, device[name]
    assert device["generate"][1] == device["folder"][1] != device["adapter"][1]
    assert len(device["chat"][1].splitlines()) == 2 and len(json.loads(device["bench"][1])["decode_tok_per_s"]) == 1
    assert device["request"]["choices"][0]["text"].strip() == device["adapter"][1].strip()
    assert device["status"][0] == 0 and "run is stopped after 0 of 10 rounds" in device["status"][1]


@pytest.mark.parametrize("command", REFUSED)
def test_a_command_that_needs_more_says_what_to_install(command: str, device: dict[str, Any]) -> None:
    code, out, err = device[command]
    assert (code, out) == (2, "") and err.startswith("fedtune: ") and err.count("\n") == 1 and err.endswith(f"{ADVICE}\n"), err


def test_a_public_name_that_needs_more_says_what_to_install(device: dict[str, Any]) -> None:
    whole = {"Config", "FedtuneError", "generate_text", "load_engine"}
    for name in fedtune.__all__:
        output = device[f"fedtune.{name}"]
        assert output == name if name in whole else output.startswith(f"fedtune.{name}: this needs ") and output.endswith(ADVICE)
    assert "needs transformers, which is not installed" in device["fallback"] and device["fallback"].endswith(ADVICE)
