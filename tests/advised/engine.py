"""The advice of the engine: loading models, reading prompts and writing answers."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedtune.inference.engine.bfloat16 import Array
from fedtune.inference.engine.generate import Context, Generation
from fedtune.inference.engine.linear import portable
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.requests import GenerationRequest
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.inference.engine.text import read_text
from fedtune.inference.generate_transformers import load_model
from fedtune.storage.tensor_files import read_header
from fedtune.templates import render
from tests.advised.models import run_of
from tests.advised.rows import Place, error_of, follows
from tests.advised.serving import engine_of
from tests.export.test_huggingface import CAUSAL, CLASSES
from tests.inference.serve.servers import make_scheduler, tiny_model
from tests.models.build import checkpoint


def load_error(folder: Path, kind: str | None = None) -> str:
    return error_of(lambda: load_engine(folder, kind, keep=False))


def export_as_advised(place: Place, run: Path, *flags: str) -> Path:
    """The folder of the export that an error advises."""
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    assert not place.run("fedtune", "export", run, "--out", place.folder / "out", *flags)
    return place.folder / "out"


# -- folders ------------------------------------------------------------------------------------------------------------------------------


@follows("{} cannot be read ({}): give a model folder")
def _(place: Place) -> Iterator[str]:
    yield load_error(place.folder)
    yield load_error(run_of(place).parent / "m")


def _damage_row(says: str, name: str, content: str | int) -> None:
    """Add a row: a file of a model has this content, or ends at this byte; then the model is exported again."""

    def follow(place: Place) -> Iterator[str]:
        model = Path(shutil.copytree(run_of(place).parent / "m", place.folder / "m"))
        file = model / name
        file.write_bytes(content.encode() if isinstance(content, str) else file.read_bytes()[:content])
        yield load_error(model)
        yield load_error(export_as_advised(place, run_of(place)))

    follows(says)(follow)


_damage_row("{} is not JSON: export the model again", "config.json", "{")
_damage_row("{} does not hold a JSON object: export the model again", "config.json", "[]")
_damage_row("{} is not a valid safetensors file ({}): download or export it again", "model.safetensors", 900)


@follows("config.json's rope_parameters of rope_type={} give no finite rotations: export it again")
def _(place: Place) -> Iterator[str]:
    model = Path(shutil.copytree(run_of(place).parent / "m", place.folder / "m"))
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-320}
    (model / "config.json").write_text(json.dumps(config))
    yield load_error(model)
    yield load_error(export_as_advised(place, run_of(place)))


@follows("the model's tokenizer cannot encode this text ({}): export the model again")
def _(place: Place) -> Iterator[str]:
    out = export_as_advised(place, run_of(place))
    whole = (out / "tokenizer.json").read_text()
    document = json.loads(whole)
    document["model"] = {"type": "WordLevel", "vocab": {"on": 0}, "unk_token": "?"}  # damaged: it lacks the token for unknown words
    document["pre_tokenizer"] = document["normalizer"] = document["post_processor"] = document["decoder"] = None
    (out / "tokenizer.json").write_text(json.dumps(document | {"added_tokens": []}))
    yield error_of(lambda: read_text(out).encode("turn"))
    yield error_of(lambda: read_text(export_as_advised(place, run_of(place))).encode("turn"))


@follows("{} holds {} numbers, which the engine cannot read: export the model again")
def _(place: Place) -> Iterator[str]:
    file = place.folder / "x.safetensors"  # a GPTQ checkpoint: nothing before it checks its dtypes
    for dtype in (torch.uint32, torch.int32):
        save_file({"qweight": torch.ones(4, dtype=dtype)}, file)
        yield error_of(read_header(file)[0]["qweight"].read)


@follows("{} has no tensor {}: give a merged model, as written by `fedtune export`")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    weights = load_file(model / "model.safetensors")  # weights of the body without its head: their names lack the first part
    save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, model / "model.safetensors")
    yield load_error(model)
    yield load_error(export_as_advised(place, run_of(place)))


@follows("{} has an unmerged adapter: export it with `--to edge` for the engine")
def _(place: Place) -> Iterator[str]:
    run = run_of(place, CAUSAL, method="prompt")
    yield load_error(export_as_advised(place, run))
    yield load_error(export_as_advised(place, run, "--to", "edge"))


@follows("{} does not generate text: give a causal language model")
def _(place: Place) -> Iterator[str]:
    yield load_error(export_as_advised(place, run_of(place, CLASSES)))
    yield load_error(export_as_advised(place, run_of(place)))


@follows("the engine does not support quantization_config: give the merged model in 16 or 32 bits")
def _(place: Place) -> Iterator[str]:
    config = export_as_advised(place, run_of(place)) / "config.json"
    whole = json.loads(config.read_text())
    for changes in ({"quantization_config": {"quant_method": "gptq"}}, {}, {"dtype": "bfloat16"}):
        config.write_text(json.dumps(whole | changes))
        yield load_error(place.folder / "out")


@follows("there is no kind {}: choose {}")
def _(place: Place) -> Iterator[str]:
    model = run_of(place).parent / "m"
    error = load_error(model, "int3")  # the command line does not accept this kind
    yield error
    for kind in error.rpartition("choose ")[2].split(", "):
        yield load_error(model, kind)


@follows("and {} would round it again: export the model in {}", slow=True)
def _(place: Place) -> Iterator[str]:
    error = load_error(export_as_advised(place, run_of(place), "--to", "edge", "--quantize", "int8"), "int4")
    yield error
    kind = error.rpartition(" in ")[2]
    yield load_error(export_as_advised(place, run_of(place), "--to", "edge", "--quantize", kind), "int4")


@follows("virtual tokens come first, but the cache already holds {} tokens: use an empty one")
def _(place: Place) -> Iterator[str]:
    engine = load_engine(export_as_advised(place, run_of(place, CAUSAL, method="prompt"), "--to", "edge"))
    cache = engine.cache()
    engine.start(cache)
    yield error_of(lambda: engine.start(cache))
    yield error_of(lambda: engine.start(engine.cache()))


def _linear(says: str, kind: str, group: int = 32, **parts: Array | None) -> None:
    """A row about a stored linear layer with these parts; the next export writes all of them.

    No file causes this error, because the package reader checks first.
    """

    def follow(place: Place) -> Iterator[str]:
        whole: Any = portable(kind, np.ones((8, 64), np.float32))
        damaged = {name: part for name, part in (whole | parts).items() if part is not None}
        yield error_of(lambda: linear_from_tensors(kind, damaged, n_in=64, group=group))
        yield error_of(lambda: linear_from_tensors(kind, whole, n_in=64))

    follows(says)(follow)


_linear("{} lacks its {}, which {} needs: export the model again", "int4", zero=None)
_linear("{} has a {} of shape {}, {} needs {}: export the model again", "int4", zero=np.ones((3, 2), np.uint16))
_linear("{} has int4 groups of {} columns: the engine supports {}; export it again", "int4", group=16)


# -- text ---------------------------------------------------------------------------------------------------------------------------------


def encode_error(text: str, folder: Path) -> str:
    return error_of(lambda: read_text(folder).encode(text))


@follows("the prompt is empty and the tokenizer has no BOS token: give some text")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    for text in ("", "turn on"):
        yield encode_error(text, model)


@follows("the prompt is empty and the tokenizer has no token to begin with: give some text")
def _(place: Place) -> Iterator[str]:
    model = load_model(run_of(place, CAUSAL, "gpt2").parent / "m", {})
    for text in ("", "turn on"):
        yield error_of(lambda text=text: model.text.encode(text))


@follows("the text is not UTF-8: give it in that encoding")
def _(place: Place) -> Iterator[str]:
    for raw in ("für".encode("latin-1"), "für".encode()):
        text = raw.decode("utf-8", "surrogateescape")  # as Python decodes command-line arguments
        yield place.run("fedtune", "generate", run_of(place).parent / "m", text, "--max-new-tokens", "2")


@follows("the model has no chat template: give it a prompt instead")
def _(place: Place) -> Iterator[str]:
    model = place.keep("bare", lambda path: tiny_model(path, context=128, chat=False))
    yield error_of(lambda: read_text(model).chat([{"role": "user", "content": "hello"}]))
    yield encode_error("hello", model)


@follows("has no tokenizer.json: save its tokenizer in the fast format of the tokenizers library")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    fast = AutoTokenizer.from_pretrained(model)
    (model / "tokenizer.json").unlink()
    yield encode_error("turn on", model)
    fast.save_pretrained(model)
    yield encode_error("turn on", model)


@follows("needs BPE: set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    error = encode_error("turn on", model)
    yield error
    name, value, file = re.findall(r"set (\w+) to (\w+) in (\S+)", error)[0]
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | {name: value}))
    yield encode_error("turn on", model)


@follows("{}: install jinja2")
def _(place: Place) -> Iterator[str]:
    (place.folder / "jinja2.py").write_text("raise ImportError('No module named jinja2')")
    place.patch.setenv("PYTHONPATH", str(place.folder))
    for _ in range(2):
        place.patch.setattr(render, "_PROCESS", render._Process())
        yield render.render("hello", [render.Chat(messages=[])], {})[0].fault
        render._PROCESS._stop()
        (place.folder / "jinja2.py").unlink(missing_ok=True)  # jinja2 is installed again


# -- answers ------------------------------------------------------------------------------------------------------------------------------


@follows("the prompt has no tokens: give some text")
def _(place: Place) -> Iterator[str]:
    for prompt in ([], "turn on"):
        yield error_of(lambda prompt=prompt: Generation(engine_of(place), prompt, max_new_tokens=2))


@follows("a stop string is empty, which every text contains: leave it out")
def _(place: Place) -> Iterator[str]:
    for stop in (("", "off"), ("off",)):
        yield error_of(lambda stop=stop: Generation(engine_of(place), "turn on", Sampling(stop=stop)))


@follows("requests are running or waiting, the maximum: retry later")
def _(place: Place) -> Iterator[str]:
    engine = engine_of(place)
    scheduler = make_scheduler(engine, max_running=1, max_waiting=0)

    def submit() -> str:
        ids = engine.text.encode("turn on")
        request = GenerationRequest(ids=ids, sampling=Sampling(), max_new_tokens=2, deliver=lambda output: None)
        return error_of(lambda: scheduler.submit(request))

    assert not submit()
    yield submit()
    while scheduler.step():
        pass
    yield submit()


@follows("adapter {} changes '{}', which the engine cannot adapt: merge it with `fedtune export`")
def _(place: Place) -> Iterator[str]:
    engine = load_engine(export_as_advised(place, run_of(place), "--to", "edge", "--separate"))
    factors = {"lm_head": (np.ones((1, engine.shape.hidden), np.float32), np.ones((engine.shape.vocab, 1), np.float32))}
    yield error_of(lambda: engine.add_adapter("more", factors))
    yield load_error(export_as_advised(place, run_of(place), "--to", "edge"))  # without --separate the adapter is merged


@follows("an early exit after layer {} of {} saves nothing: leave before the last one")
def _(place: Place) -> Iterator[str]:
    for layers in (2, 1):
        yield error_of(lambda layers=layers: EarlyExit(layers).begin(Sampling(), Context(engine_of(place))))


@follows("their tokenizers differ; distill a draft model with `fedtune draft`", slow=True)
def _(place: Place) -> Iterator[str]:
    model = place.keep("served", lambda path: tiny_model(path, context=128))
    generate = ["fedtune", "generate", model, "turn on", "--max-new-tokens", "2", "--speculate", "draft", "--draft"]
    error = place.run(*generate, run_of(place).parent / "m")
    yield error
    (line,) = re.findall(r"`(fedtune draft)`", error)
    small = place.folder / "small"
    yield place.run(*line.split(), model, "--steps", "1", "--length", "16", "--layers", "1", "--out", small)
    yield place.run(*generate, small)
