"""The imports of a device's worker before it loads a model and during a turn."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.fx.experimental import symbolic_shapes

from fedtune.models import light
from tests.tiny import texts, write_rows

ROOT = Path(__file__).parents[2]
UNUSED = {
    "datasets", "pandas", "pyarrow", "opacus", "scipy", "sklearn", "matplotlib", "tensorboard", "hydra", "omegaconf", "ray", "fastapi",
    "pydantic", "requests", "PIL", "networkx", "torch._inductor", "torch.distributed.tensor",
    "torch._dynamo.utils", "sympy.core",  # `torch._dynamo` and sympy are stand-ins
}  # fmt: skip
MARGIN = 110  # MB above torch alone; measured: 91 for transformers, PEFT, bitsandbytes, Flower and fedtune

RESIDENT = """
import json, sys
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6
"""
READY = """
import fedtune.network.worker as worker
from fedtune.delivery.device import make_app
app = make_app(json.loads(sys.argv[1]))
print(json.dumps([sorted(sys.modules), resident()]))
"""
TURN = """
import dataclasses
from flwr.app import ConfigRecord, Message, RecordDict
from fedtune.config import Config, to_dict
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import MessageWriter
from fedtune.models import initial_adapter

def ask(content, kind):
    reply = worker.answer_message(app, Message(content, 7, kind))
    assert reply.has_content() and "declined" not in reply.content.config_records, reply
    return reply.content

worker.TaskIdentity.run_id = worker.TaskIdentity.task_id = worker.TaskIdentity.node_id = 1
config = Config()
config = dataclasses.replace(config, task=dataclasses.replace(config.task, kind="causal_lm", max_length=16))
config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="local", held_out=0.25))
hello = json.dumps({"config": to_dict(config), "run": "r", "labels": []})
ask(RecordDict({"hello": ConfigRecord({"json": hello})}), "query")
state = initial_adapter(config.model, config.task, config.peft, num_labels=0, seed=config.seed)
plan = Plan(round=1, client="a", base_version=0, steps=2, batch_size=4, lr=1e-3, lr_last=1e-3, seed=0)
trained = ask(MessageWriter(1, []).write(state, held=(), plan=plan), "train")
ask(MessageWriter(1, []).write(state, held=(), next_plan=plan), "evaluate")
print(json.dumps([sorted(sys.modules), resident()]))
"""


def run(code: str, *args: str) -> list[str]:
    process = subprocess.run([sys.executable, "-c", RESIDENT + code, *args], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def worker(folder: Path, code: str) -> list[tuple[set[str], float]]:
    """(modules, resident MB) when the worker is ready, and at the end of `code`."""
    write_rows(folder / "rows.jsonl", texts(16))
    settings = json.dumps({"client": "a", "state": str(folder), "data": str(folder / "rows.jsonl"), "device": "auto"})
    return [(set(modules), mb) for modules, mb in map(json.loads, run(READY + code, settings))]


def unused_modules(modules: set[str]) -> set[str]:
    return {name for name in UNUSED if name in modules}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ready_worker_has_imported_the_models_and_little_else(tmp_path: Path) -> None:
    ((modules, mb),) = worker(tmp_path, "")
    assert not unused_modules(modules) and {"torch", "transformers.modeling_utils", "peft", "fedtune.clients.trainer"} <= modules
    (bare,) = run("import torch\nprint(resident())")
    assert mb < float(bare) + MARGIN


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_turn_imports_nothing_more(tmp_path: Path) -> None:
    _, (modules, _) = worker(tmp_path, TURN)
    assert not unused_modules(modules) and "transformers.models.llama.modeling_llama" in modules


# -- fedtune.models.light -----------------------------------------------------------------------------------------------------------------

LATE = """
import importlib, logging, torch
from fedtune.models import light
light.import_models()
assert "torch._dynamo.utils" not in sys.modules
import scipy.optimize
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    assert torch.arange(3)[torch.tensor(1)] == 1
assert torch._dynamo.utils and torch.distributed.is_available() and sys.modules["torch._dynamo"] is torch._dynamo
assert torch.compile(torch.sin, backend="eager")(torch.zeros(1)) == 0
assert torch.fx.experimental.symbolic_shapes.ShapeEnv()
import sympy
assert sympy.Symbol("x").is_symbol and sympy.Basic.__module__.startswith("sympy")
"""
SUBMODULES = """
from fedtune.models import light
light.import_models()
import torch._dynamo.config as config
import sympy.core.numbers as numbers
import sympy, torch
assert config is torch._dynamo.config is torch._dynamo.eval_frame.config and config.__spec__.loader is not None
assert numbers is sympy.core.numbers and sympy.Integer is numbers.Integer and type(numbers.__spec__.loader).__module__ != light.__name__
from torch._dynamo.exc import Unsupported
from torch._dynamo import convert_frame
assert convert_frame.Unsupported is Unsupported
assert torch.compile(lambda x: x + 1, backend="eager", dynamic=True)(torch.zeros(3)).sum() == 3
"""
THREADS = """
import threading, torch
from fedtune.models import light
light.import_models()
wrong = []
def use():
    try:
        torch.fx.experimental.symbolic_shapes.ShapeEnv, torch._dynamo.utils
    except Exception as bad:
        wrong.append(bad)
threads = [threading.Thread(target=use) for _ in range(16)]
[t.start() for t in threads], [t.join() for t in threads]
assert not wrong, wrong
"""
WHOLE = """
from fedtune.models import light
light._UNUSED += ("regex",)  # as if transformers needed one of the parts
light.import_models()
from transformers import LlamaForCausalLM
import peft
assert "regex" in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [LATE, SUBMODULES, THREADS, WHOLE], ids=["late", "submodules", "threads", "whole"])
def test_a_part_that_is_needed_is_loaded(code: str) -> None:
    run(code)


@pytest.mark.parametrize("name", light._KNOWN)
def test_known_sizes_give_what_torch_gives(name: str) -> None:
    real, ours = getattr(symbolic_shapes, name), light._LATE[light._SHAPES][name]
    pairs: dict[str, list[tuple[Any, ...]]] = {"sym_and": [(True, False), (True, True)], "sym_or": [(False, False), (True, False)]}
    pairs["sym_eq"] = [(2, 2), (2, 3), ((2, 3), (2, 3)), ((2, 3), [2, 3]), ((2,), (2, 3))]
    numbers = [(2,)] if name in ("guarding_hint_or_throw", "has_guarding_hint", "is_nested_int") else []
    for known in pairs.get(name, [(True,), (False,), *numbers]):
        assert ours(*known) == real(*known)
