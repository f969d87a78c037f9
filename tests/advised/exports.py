"""The advice of `fedtune export` and of the commands that run exported models."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from fedtune.config import DataConfig, TaskConfig
from fedtune.export.edge import export_edge
from fedtune.inference.generate import generate_text
from tests.advised.models import lora, run_of
from tests.advised.operators import package
from tests.advised.rows import Place, command, error_of, follows
from tests.advised.runs import one_round_run, setting_of
from tests.export.test_huggingface import ASK as ASKS
from tests.export.test_huggingface import CAUSAL, CLASSES, make_run
from tests.inference.serve.servers import tiny_model
from tests.models.build import checkpoint, hub, llama_config

EXPORT = "fedtune export {run} --out {here}/out "


def run_with(method: str = "lora", task: TaskConfig = CAUSAL) -> Callable[[Place], dict[str, str]]:
    return lambda place: lora(place) | {"run": str(run_of(place, task, method=method))}


def export(place: Place, source: Path, *flags: str) -> str:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    return place.run("fedtune", "export", source, "--out", place.folder / "out", *flags)


# -- exports that are refused -------------------------------------------------------------------------------------------------------------

command("which is not quantized: leave out --requantize", EXPORT + "--requantize", ready=lora)
command("has an effect only with quantization: add", EXPORT + "--to edge --calibrate {here}/text.txt", ready=lora)
command("which generates no text: export it with --to hf", EXPORT + "--to edge", ready=run_with(task=CLASSES))
command("can stay separate: leave out --separate", EXPORT + "--to edge --separate", ready=run_with("prompt"))
command("the engine cannot run peft.method=", EXPORT + "--to edge", ready=run_with("adapter"))


@follows("belongs to the backbone {}, but {} is {}: use the checkpoint that it was trained on")
def _(place: Place) -> Iterator[str]:
    run = Path(shutil.copytree(run_of(place), place.folder / "run"))
    config = (run / "config.yaml").read_text()
    own = str(run_of(place).parent / "m")
    (run / "config.yaml").write_text(config.replace(own, str(checkpoint(place.folder / "other", seed=9))))
    yield export(place, run)
    (run / "config.yaml").write_text(config)
    yield export(place, run)


@follows("{} is already a complete model: export it with --to edge or gguf", library="gguf")
def _(place: Place) -> Iterator[str]:
    model = place.keep("served", lambda path: tiny_model(path, context=128))
    output = export(place, model)
    yield output
    for to in output.rpartition("--to ")[2].strip().split(" or "):
        yield export(place, model, "--to", to)


@follows("{} already exists: give another folder with --out, or remove it")
def _(place: Place) -> Iterator[str]:
    (place.folder / "taken").mkdir()
    (place.folder / "taken/letter.txt").write_text("dear")
    argv = ["fedtune", "export", str(run_of(place)), "--out"]
    yield place.run(*argv, place.folder / "taken")
    yield place.run(*argv, place.folder / "another")
    shutil.rmtree(place.folder / "taken")
    yield place.run(*argv, place.folder / "taken")


@follows("there is no folder {}: give a run directory, a PEFT adapter folder or a model")
def _(place: Place) -> Iterator[str]:
    for flags in ([], ["--to", "edge"]):
        yield export(place, place.folder / "none", *flags) if not flags else ""
        yield export(place, run_of(place), *flags)
        yield export(place, run_of(place) / "adapter", *flags)
    yield export(place, run_of(place).parent / "m", "--to", "edge")


@follows("has no adapter/ yet: the run has not ended, continue it with resume={}", slow=True)
def _(place: Place) -> Iterator[str]:
    run = one_round_run(place)
    shutil.rmtree(run / "adapter")
    output = export(place, run)
    yield output
    yield place.run("fedtune.sim", setting_of(output))
    yield export(place, run)


@follows("does not name its backbone: set base_model_name_or_path in its adapter_config.json")
def _(place: Place) -> Iterator[str]:
    adapter = Path(shutil.copytree(run_of(place) / "adapter", place.folder / "adapter"))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    output = export(place, adapter)
    yield output
    (name,) = re.findall(r"set (\w+) in", output)
    path.write_text(json.dumps(config | {name: str(run_of(place).parent / "m")}))
    yield export(place, adapter)


@follows("so that it loads with other token ids: export it with --to edge")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("fedtune.export.huggingface._reads_back", lambda *_: False)
    run = place.keep("nano words", lambda path: make_run(path / "run", hub(tiny_model(path / "m")), CAUSAL)) / "run"
    yield export(place, run)
    yield export(place, run, "--to", "edge")


@follows("--method {} needs calibration text: give --calibrate, or use rtn")
def _(place: Place) -> Iterator[str]:
    run, text = run_of(place), Path(lora(place)["run"]) and place.folder / "text.txt"
    yield error_of(lambda: export_edge(run, place.folder / "out", quantize="int8", method="awq"))  # the command line refuses this before
    yield export(place, run, "--to", "edge", "--quantize", "int8", "--method", "awq", "--calibrate", str(text))
    yield export(place, run, "--to", "edge", "--quantize", "int8", "--method", "rtn")


@follows("does not account for: use rtn or gptq, or leave out --separate", slow=True)
def _(place: Place) -> Iterator[str]:
    run = Path(lora(place)["run"])
    flags = ["--to", "edge", "--quantize", "int8", "--calibrate", str(place.folder / "text.txt"), "--method"]
    output = export(place, run, *flags, "awq", "--separate")
    yield output
    for method in re.findall(r"use (\w+) or (\w+),", output)[0]:
        yield export(place, run, *flags, method, "--separate")
    yield export(place, run, *flags, "awq")


@follows("the adapter trains '{}' too: leave out --separate")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m", config=llama_config(tie_word_embeddings=False))
    run, _ = make_run(place.folder / "run", hub(model), CAUSAL)
    (run / "adapter/fedtune.safetensors").unlink()
    path, config = run / "adapter/adapter_model.safetensors", run / "adapter/adapter_config.json"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": load_file(model / "model.safetensors")["lm_head.weight"] * 2}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["lm_head"]}))
    adapter = Path(shutil.copytree(run / "adapter", place.folder / "adapter"))
    yield export(place, adapter, "--to", "edge", "--separate")
    yield export(place, adapter, "--to", "edge")


@follows("the precision to quantize to is in the adapter's run: give the run directory", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    from tests.export.test_requantize import make_run as quantized_run
    from tests.models.test_quantize import wide

    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    run, _ = quantized_run(place.folder / "run", wide(place.folder / "m"))
    adapter = Path(shutil.copytree(run / "adapter", place.folder / "adapter"))
    yield export(place, adapter, "--requantize")
    yield export(place, run, "--requantize")


# -- notes of an export -------------------------------------------------------------------------------------------------------------------


def _separate_adapter(place: Place, method: str) -> Iterator[str]:
    assert not export(place, run_of(place, CAUSAL, method=method))
    output = place.warned
    yield output
    assert "`fedtune generate`" in output
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--max-new-tokens", "2")
    if reloaded_model := re.findall(r"PeftModel.from_pretrained\(model, '(.*?)'\)", output):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(place.folder / "out")
        assert PeftModel.from_pretrained(model, reloaded_model[0]).peft_config
        yield ""


@follows("`fedtune generate` or PeftModel.from_pretrained(model, '{}')")
def _(place: Place) -> Iterator[str]:
    yield from _separate_adapter(place, "prompt")


@follows("`fedtune generate`")
def _(place: Place) -> Iterator[str]:
    yield from _separate_adapter(place, "adapter")


@follows("is the backbone, with the adapter in {}; use {}")
def _(place: Place) -> Iterator[str]:
    yield from _separate_adapter(place, "adapter")


@follows("the model answers untuned without it: select it with --adapter {}")
def _(place: Place) -> Iterator[str]:
    assert not export(place, run_of(place), "--to", "edge", "--separate")
    output = place.warned
    yield output
    name = re.findall(r"select it with (--adapter \S+)", output)[0].split()
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--max-new-tokens", "2", *name)


@follows("there is no test data here to measure the perplexity: give text with --calibrate")
def _(place: Place) -> Iterator[str]:
    run = Path(lora(place)["run"])
    assert not export(place, run, "--to", "edge", "--quantize", "int8")
    yield place.warned
    assert not export(place, run, "--to", "edge", "--quantize", "int8", "--calibrate", str(place.folder / "text.txt"))
    yield place.warned if "no test data" in place.warned else ""


@follows("is already an edge package: give the run or the model that it was made from")
def _(place: Place) -> Iterator[str]:
    yield export(place, package(place, "plain"), "--to", "edge")
    yield export(place, run_of(place), "--to", "edge")
    yield export(place, run_of(place).parent / "m", "--to", "edge")


@follows("has an unmerged adapter: give the run that it was exported from")
def _(place: Place) -> Iterator[str]:
    run = run_of(place, CAUSAL, method="prompt")
    assert not place.run("fedtune", "export", run, "--out", place.folder / "beside")
    yield export(place, place.folder / "beside", "--to", "edge")
    yield export(place, run, "--to", "edge")


@follows("is already quantized ({}): give the unquantized model")
def _(place: Place) -> Iterator[str]:
    model = Path(shutil.copytree(run_of(place).parent / "m", place.folder / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    yield export(place, model, "--to", "edge")
    yield export(place, run_of(place).parent / "m", "--to", "edge")


# -- commands that generate answers -------------------------------------------------------------------------------------------------------

ASK = "fedtune generate {model} 'turn on' --max-new-tokens 2 "


def models(place: Place) -> dict[str, str]:
    """A model that the engine runs, a draft for it, and one that transformers runs."""
    llama = place.keep("served", lambda path: tiny_model(path, context=128))
    return {"model": str(llama), "draft": str(llama), "gpt2": str(run_of(place, CAUSAL, "gpt2").parent / "m")}


command("has no effect with --speculate {}: leave one out", ASK + "--draft {draft} --speculate lookup", ready=models)
command("runs on transformers, which has no --{}: leave it out", ASK.replace("{model}", "{gpt2}") + "--kind int8", ready=models)


@follows("--speculate draft needs a draft model: give its folder with --draft (`fedtune draft` makes one)", slow=True)
def _(place: Place) -> Iterator[str]:
    model = models(place)["model"]
    argv = ["fedtune", "generate", model, "turn on", "--max-new-tokens", "2", "--speculate", "draft"]
    yield place.run(*argv)
    yield place.run("fedtune", "draft", model, "--steps", "1", "--length", "16", "--layers", "1", "--out", place.folder / "small")
    yield place.run(*argv, "--draft", place.folder / "small")


@follows("speculate={} is unknown: choose auto, none, lookup, early-exit or draft")
def _(place: Place) -> Iterator[str]:
    made = models(place)

    def answers(how: str) -> str:
        draft = Path(made["draft"]) if how == "draft" else None
        return error_of(lambda: generate_text(Path(made["model"]), "turn on", max_new_tokens=2, speculate=how, draft=draft))

    error = answers("guess")  # the command line accepts only these
    yield error
    for how in re.findall(r"[a-z-]+", error.rpartition("choose ")[2]):
        yield answers(how) if how != "or" else ""


@follows("there is no folder {}: give a model that `fedtune export` wrote")
def _(place: Place) -> Iterator[str]:
    yield place.run("fedtune", "generate", place.folder / "none", "turn on")
    assert not export(place, run_of(place))
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--max-new-tokens", "2")


@follows("{} is a run directory: export its model with `fedtune export {}` and give that folder")
def _(place: Place) -> Iterator[str]:
    run = Path(shutil.copytree(run_of(place), place.folder / "run"))
    output = place.run("fedtune", "generate", run, "turn on")
    yield output
    (line,) = re.findall(r"`(fedtune export .*?)`", output)
    yield place.run(*line.split())
    yield place.run("fedtune", "generate", place.printed.strip(), "turn on", "--max-new-tokens", "2")


@follows("the request is empty: give some text")
def _(place: Place) -> Iterator[str]:
    data = DataConfig(source="local", path="x", prompt="Q: {q}\nA:", answer=" {a}")
    assert not export(place, run_of(place, ASKS, data=data))
    for request in (" ", "lamp"):
        yield place.run("fedtune", "generate", place.folder / "out", request, "--max-new-tokens", "2")


@follows("{} cannot be read: export the model again")
def _(place: Place) -> Iterator[str]:
    for damaged in (True, False):
        assert not export(place, run_of(place))
        if damaged:
            (place.folder / "out/fedtune.json").write_text("{")
        yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--max-new-tokens", "2")
