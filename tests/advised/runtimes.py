"""The advice of exports for other programs: Ollama, vLLM, GPTQ and AWQ."""

import re
from collections.abc import Iterator

from tests.advised.exports import export
from tests.advised.rows import Place, follows
from tests.inference.serve.served import tiny_model
from tests.models import templates


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
