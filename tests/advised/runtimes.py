"""The advice of exports for other programs: Ollama, vLLM, GPTQ and AWQ."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fedtune.config import TaskConfig
from tests.advised.exports import EXPORT, export
from tests.advised.rows import Place, command, follows
from tests.export.test_edge_architectures import folder_of
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.inference.serve.servers import tiny_model
from tests.models import templates
from tests.models.build import checkpoint, hub, llama_config


@follows(
    "the model's chat template cannot be rewritten for Ollama ({}): use --to gguf and llama.cpp, which runs it as it is", library="gguf"
)
def _(place: Place) -> Iterator[str]:
    model = place.keep("odd template", lambda path: tiny_model(path, context=128))
    tokenizer = templates.tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}. {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    yield export(place, model, "--to", "ollama")
    yield export(place, model, "--to", "gguf")


@follows("the gguf library does not write {}: choose {}, or choose f16 and quantize it with llama.cpp", library="gguf")
def _(place: Place) -> Iterator[str]:
    model = place.keep("served", lambda path: tiny_model(path, context=128))
    output = export(place, model, "--to", "gguf", "--gguf-type", "q4_k")
    yield output
    for kind in re.findall(r"[a-z]\w*\d\w*", output.partition("choose ")[2].partition(", or")[0]):
        yield export(place, model, "--to", "gguf", "--gguf-type", kind)
        (place.folder / "out").unlink()


def text(place: Place) -> str:
    (place.folder / "text.txt").write_text("turn on the light in the kitchen and set heat up to two " * 40)
    return str(place.folder / "text.txt")


def wide(place: Place) -> dict[str, str]:
    """A run whose layers are wide enough for groups of 32."""
    text(place)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m", config=llama_config(**sizes))), CAUSAL)
    return {"run": str(run)}


def _merge_row(says: str, kind: str, task: TaskConfig, method: str) -> None:
    def follow(place: Place) -> Iterator[str]:
        run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m", kind)), task, method=method)
        yield export(place, run, "--to", "vllm")
        yield export(place, run, "--to", "hf")

    follows(says)(follow)


_merge_row("and fedtune exports only models that generate text for vLLM: use --to hf", "llama", CLASSES, "lora")
_merge_row("vLLM cannot run peft.method={}, which cannot be merged into weights: use --to hf", "llama", CAUSAL, "prompt")
_merge_row("vLLM does not run this encoder-decoder: use --to hf", "t5", ASK, "lora")


@follows("the adapter has rank {}, and vLLM allows {}: leave out --separate")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m")), CAUSAL)
    with place.patch.context() as patch:
        patch.setattr("fedtune.export.vllm.RANKS", (1, 2))
        yield export(place, run, "--to", "vllm", "--separate")
        yield export(place, run, "--to", "vllm")


command("--to {} needs text: give --calibrate", EXPORT + "--to gptq", ready=wide, slow=True, calibrate="{here}/text.txt")


@follows("a {} checkpoint has no place for the virtual tokens of {}: use --to edge")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m")), CAUSAL, method="prompt")
    yield export(place, run, "--to", "awq", "--calibrate", text(place))
    yield export(place, run, "--to", "edge")


@follows("but {} needs multiples of 8 and {}: use --to edge")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m")), CAUSAL)  # its layers have 16 columns
    yield export(place, run, "--to", "awq", "--calibrate", text(place))
    yield export(place, run, "--to", "edge")


@follows("a weight is beyond the range of float16 scales: use --to edge --quantize int4")
def _(place: Place) -> Iterator[str]:
    run = Path(wide(place)["run"])
    file = place.folder / "m/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e7
    save_file(tensors, file, {"format": "pt"})
    (run / "adapter/fedtune.safetensors").unlink()  # this file identifies the backbone by its content
    yield export(place, run / "adapter", "--to", "gptq", "--calibrate", text(place))
    yield export(place, run / "adapter", "--to", "edge", "--quantize", "int4")


@follows("in 4 bits, and {} would round it again: export the model with --to edge", slow=True)
def _(place: Place) -> Iterator[str]:
    run = Path(wide(place)["run"])
    assert export(place, run, "--to", "gptq", "--calibrate", text(place)) == ""
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--kind", "int8", "--max-new-tokens", "2")
    assert export(place, run, "--to", "edge") == ""
    yield place.run("fedtune", "generate", place.folder / "out", "turn on", "--kind", "int8", "--max-new-tokens", "2")


@follows("vLLM names the layers of this composite model in another way: leave out --separate", slow=True)
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(folder_of(place.folder / "m", "gemma3_composite")), CAUSAL)
    yield export(place, run, "--to", "vllm", "--separate")
    yield export(place, run, "--to", "vllm")
