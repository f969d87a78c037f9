"""A PEFT method is one file: every export applies its `edits`, and nothing else lists methods."""

import ast
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtune.models.methods as methods
from fedtune.config import METHODS, PeftConfig
from fedtune.config.method_files import factored, inits_of, method_names, rank_power
from fedtune.errors import ModelError
from fedtune.export.edge import export_edge
from fedtune.export.gguf import export_gguf
from fedtune.export.huggingface import describe_folder, export_hf
from fedtune.inference.engine.package import read_package
from fedtune.inference.serve.adapters import factors
from fedtune.models import LiveAdapter
from fedtune.models.merge import merge
from tests.contributing import example
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.packages import engine_logits, open_model
from tests.models.build import checkpoint, hub, token_ids
from tests.syntax import nodes

ROOT = Path(__file__).parents[2]
Add = Callable[[str, str], None]

# W + u·vᵀ by a hook. It resembles no existing method: other tensor names, no ranks, nothing from PEFT
ATTACHED = """
import torch
from torch import nn
from fedtune.models.methods import Attached, Change
from fedtune.models.methods._own import Switch, untouched

def attach(model, peft, task):
    switch, parameters = Switch(), {}
    def hook(module, inputs, y):
        return y + (inputs[0] @ module.v)[..., None] * module.u if switch.on else y
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "down_proj", "c_attn", "c_proj")):
            out, width = (module.nf, module.nx) if hasattr(module, "nf") else module.weight.shape
            module.u, module.v = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.ones(width))
            module.register_forward_hook(hook)
            parameters |= {f"{name}.u": module.u, f"{name}.v": module.v}
    return Attached(model=model, parameters=parameters, names={n: n for n in parameters}, disabled=untouched({}, switch))

def initial(name, shape, peft, generator, std):
    return torch.zeros(shape) if name.endswith(".u") else torch.ones(shape)
"""
EDITS = """
def edits(state, sizes):
    for name in [n.removesuffix(".u") for n in state.tensors if n.endswith(".u")]:
        u, v = state[f"{name}.u"].double(), state[f"{name}.v"].double()
        def edit(rows, first, last, u=u, v=v):
            return rows + torch.outer(u[first:last], v)
        yield Change(name=f"{name}.weight", shape=(len(u), len(v)), edit=edit, linear=True)
"""
FACTORS = """
def factors(state):
    return {n[:-2]: (1.0, state[n[:-1] + "v"][None], state[n][:, None]) for n in state.tensors if n.endswith(".u")}
"""
WHY_UNMERGEABLE = '\nwhy_unmergeable = "it lives in a hook"\n'


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Make Python import another method's file as part of the folder of methods."""
    folder, added = tmp_path / "methods", list[str]()
    folder.mkdir()
    choices = next(f for f in dataclasses.fields(PeftConfig) if f.name == "method")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])

    def write(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        added.append(name)
        monkeypatch.setattr(choices, "metadata", {**choices.metadata, "choices": (*METHODS, *method_names(folder))})

    yield write
    for name in added:
        sys.modules.pop(f"{methods.__name__}.{name}", None)
        if hasattr(methods, name):
            delattr(methods, name)


def logits(live: LiveAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with and without the adapter."""
    with torch.no_grad():
        result = live.model(token_ids(1)).logits
        with live.disabled():
            return result, live.model(token_ids(1)).logits


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", "streamed"), ("gpt2", "streamed"), ("gpt2", "in memory"), ("llama", "as CONTRIBUTING.md prints it")]
)
def test_a_new_method_is_in_the_weights_of_a_hugging_face_folder(
    tmp_path: Path, add: Add, kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.export.merged_tensor._BLOCK", 100)  # some rows, or columns, at a time
    add("outer", example("fedtune/models/methods/outer.py") if "CONTRIBUTING" in how else ATTACHED + EDITS)
    model = hub(checkpoint(tmp_path / "m", kind), init="random" if how == "in memory" else "pretrained")
    run, live = make_run(tmp_path / "run", model, CAUSAL, method="outer")
    wanted, bare = logits(live)
    out = export_hf(run, run / "merged")
    assert ("in memory" in describe_folder(out)) == (how == "in memory")
    with torch.no_grad():
        torch.testing.assert_close(open_model(out)(token_ids(1)).logits, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, bare, atol=1e-2)


def test_a_new_method_is_in_the_weights_of_an_edge_package(tmp_path: Path, add: Add) -> None:
    add("outer", ATTACHED + EDITS)
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="outer")
    wanted, bare = logits(live)
    torch.testing.assert_close(engine_logits(export_edge(run, run / "edge"), token_ids(1)[0]), wanted[0], rtol=0, atol=1e-4)
    assert not torch.allclose(wanted, bare, atol=1e-2)
    with pytest.raises(ModelError, match="leave out --separate"):
        export_edge(run, run / "apart", separate=True)


def test_a_new_method_with_factors_can_stay_separate(tmp_path: Path, add: Add) -> None:
    add("outer", ATTACHED + EDITS + FACTORS)
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="outer")
    wanted, bare = logits(live)
    out, ids = export_edge(run, run / "apart", separate=True), token_ids(1)[0]
    torch.testing.assert_close(engine_logits(out, ids, "run"), wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(engine_logits(out, ids), bare[0], rtol=0, atol=1e-4)
    served = factors(run / "adapter", read_package(out).shape)
    for m, (a, b) in served.items():
        assert torch.equal(torch.from_numpy(b @ a), live.parameters[f"{m}.u"][:, None] * live.parameters[f"{m}.v"])


def test_a_new_method_is_in_the_weights_of_a_gguf_file(tmp_path: Path, add: Add) -> None:
    gguf = pytest.importorskip("gguf")
    from tests.export.test_gguf import shaped_checkpoint

    add("outer", ATTACHED + EDITS)
    run, live = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", "llama")), CAUSAL, method="outer")
    reader = gguf.GGUFReader(export_gguf(run, run / "m.gguf"))
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    own, module = live.backbone.model, "model.layers.1.mlp.down_proj"
    weight, u, v = (own.get_parameter(f"{module}.{x}").detach() for x in ("weight", "u", "v"))
    torch.testing.assert_close(tensors["blk.1.ffn_down.weight"], weight + u[:, None] * v, rtol=2**-10, atol=1e-5)
    assert not torch.allclose(tensors["blk.1.ffn_down.weight"], weight, atol=1e-3)


def test_a_method_that_cannot_edit_weights_is_never_merged(tmp_path: Path, add: Add) -> None:
    add("hooked", ATTACHED + WHY_UNMERGEABLE)
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="hooked")
    with pytest.raises(ModelError, match="^peft.method=hooked cannot be merged into weights: it lives in a hook$"):
        merge(live.backbone.model, live.read(1))
    with pytest.raises(ModelError, match="the engine cannot run peft.method=hooked: it lives in a hook; use --to hf"):
        export_edge(run, run / "edge")
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match="the engine cannot run peft.method=hooked"):
        export_gguf(run, run / "m.gguf")
    # a Hugging Face folder has the adapter beside the weights, with a note; without the run's settings this is refused too
    out = export_hf(run, run / "merged")
    assert (out / "adapter" / "fedtune.safetensors").is_file()
    assert "peft.method=hooked cannot be merged into weights" in describe_folder(out)
    shutil.copytree(run / "adapter", tmp_path / "bare")
    peft_config = {"base_model_name_or_path": str(tmp_path / "m"), "task_type": "CAUSAL_LM"}
    (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps(peft_config))
    with pytest.raises(ModelError, match="peft.method=hooked cannot be merged into weights, and without its run"):
        export_hf(tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (run / "edge").exists()


@pytest.mark.parametrize(("text", "word"), [(ATTACHED, "neither"), (ATTACHED + EDITS + WHY_UNMERGEABLE, "both")])
def test_a_method_without_edits_or_why_unmergeable_is_refused(tmp_path: Path, add: Add, text: str, word: str) -> None:
    add("outer", ATTACHED + EDITS)
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="outer")
    state = live.read(1)
    del sys.modules["fedtune.models.methods.outer"]
    add("outer", text + "\n#" * 40)  # of another length, so that no cached bytecode is taken
    writes: list[Callable[[], Any]] = [
        lambda: export_hf(run, run / "hf"), lambda: export_edge(run, run / "edge"), lambda: merge(live.backbone.model, state),
        lambda: make_run(tmp_path / "other", hub(tmp_path / "m"), CAUSAL, method="outer"),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(ModelError, match=rf"outer.py must define either `edits`.*: it defines {word}$"):
            write()
    assert not (run / "hf").exists() and not (run / "edge").exists()


def test_a_missing_method_gives_a_one_sentence_error() -> None:
    for name in ("nothing", "_own", "lora.x", "../lora", ""):
        with pytest.raises(ModelError, match="unknown PEFT method"):
            methods.method(name)


# -- the methods are the files of the folder ----------------------------------------------------------------------------------------------


def test_the_methods_are_the_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("mine.py", "_shared.py", "notes.txt", "__init__.py"):
        (tmp_path / name).touch()
    assert method_names(tmp_path) == ("mine",)
    files = {f.stem for f in (ROOT / "fedtune" / "models" / "methods").glob("*.py") if f.name[0] != "_"}
    assert files == set(METHODS) == {f.stem for f in (ROOT / "conf" / "peft").glob("*.yaml")}
    assert next(f for f in dataclasses.fields(PeftConfig) if f.name == "method").metadata["choices"] == METHODS


def test_a_method_names_its_initializations(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text('1 / 0\ninits = ("default", "loftq")\n')  # the file is parsed, not executed
    assert inits_of("mine", tmp_path) == ("default", "loftq")
    assert {name for name in METHODS if "loftq" in inits_of(name)} == {"lora", "rslora"}
    assert inits_of("dora") == ("default",)


def test_a_method_names_its_product(tmp_path: Path) -> None:
    """Strategies for LoRA's factors ask for these constants, so a new method with factors needs no edit elsewhere."""
    (tmp_path / "mine.py").write_text('1 / 0\nproduct = "whole"\nrank_power = 0.5\n')
    (tmp_path / "other.py").write_text("")
    assert factored(exactly=True, folder=tmp_path) == ("mine",) and rank_power("mine", tmp_path) == 0.5
    assert factored(exactly=True) == ("lora", "rslora") and factored(exactly=False) == ("dora", "lora", "rslora")
    assert {name: rank_power(name) for name in factored(exactly=False)} == {"dora": 1.0, "lora": 1.0, "rslora": 0.5}


def lists_of_methods(code: Iterable[ast.AST]) -> list[int]:
    """Lines with a collection of methods' names, or a comparison with one."""
    results = list[int]()
    for node in (n for n in code if isinstance(n, ast.expr)):
        items = node.keys if isinstance(node, ast.Dict) else node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else []
        names = [i.value for i in items if isinstance(i, ast.Constant) and i.value in METHODS]
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(s, ast.Attribute) and s.attr == "method" for s in sides):
                names += [s.value for s in sides if isinstance(s, ast.Constant) and s.value in METHODS] * 2
        if len(names) > 1:
            results.append(node.lineno)
    return results


def test_no_file_outside_the_folder_lists_methods() -> None:
    """FedPepTAO and RAVAN name the one method that each is made for; studies and benchmarks list those that they compare."""
    looked, results = 0, []
    for folder in ("fedtune", "clients", "simulations", "strategies"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if {"methods", "studies", "benchmarks", "fedpeptao.py", "ravan.py"} & set(file.parts):
                continue
            looked += 1
            results += [f"{file.relative_to(ROOT)}:{line}" for line in lists_of_methods(nodes(file))]
    assert looked > 150 and not results
    code = ast.parse('x = ("lora", "dora")\nif c.peft.method == "ia3": pass\ny = {"full": 1, "prompt": 2}')
    assert lists_of_methods(ast.walk(code)) == [1, 2, 3]


@pytest.mark.slow
def test_edits_of_methods_need_neither_peft_nor_transformers() -> None:
    code = (
        "import sys, fedtune.models.edits; from fedtune.config import METHODS; from fedtune.models.methods import method; "
        "[method(name) for name in METHODS]; print(sorted({'transformers', 'peft', 'flwr', 'datasets'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
