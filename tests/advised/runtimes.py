"""The advice of exports for other programs: Ollama, vLLM, GPTQ and AWQ."""

import re
from collections.abc import Iterator

from fedtune.config import TaskConfig
from tests.advised.exports import export
from tests.advised.rows import Place, follows
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.inference.serve.served import tiny_model
from tests.models import templates
from tests.models.build import checkpoint, hub


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


def _merged_instead(says: str, kind: str, task: TaskConfig, method: str) -> None:
    def follow(place: Place) -> Iterator[str]:
        run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m", kind)), task, method=method)
        yield export(place, run, "--to", "vllm")
        yield export(place, run, "--to", "hf")

    follows(says)(follow)


_merged_instead("and fedtune exports only models that generate text for vLLM: use --to hf", "llama", CLASSES, "lora")
_merged_instead("vLLM cannot run peft.method={}, which cannot be merged into weights: use --to hf", "llama", CAUSAL, "prompt")
_merged_instead("vLLM does not run this encoder-decoder: use --to hf", "t5", ASK, "lora")


@follows("the adapter has rank {}, and vLLM allows {}: leave out --separate")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m")), CAUSAL)
    with place.patch.context() as patch:
        patch.setattr("fedtune.export.vllm.RANKS", (1, 2))
        yield export(place, run, "--to", "vllm", "--separate")
        yield export(place, run, "--to", "vllm")
