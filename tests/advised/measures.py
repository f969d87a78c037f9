"""The advice of `fedtune bench`, `chat` and `draft`."""

import io
from collections.abc import Iterator

from tests.advised.rows import Place, follows
from tests.inference.serve.servers import tiny_model


def model_of(place: Place) -> str:
    return str(place.keep("served", lambda path: tiny_model(path, context=128)))


@follows("prompt tokens and {} new tokens exceed the model's context of {}: use fewer", slow=True)
def _(place: Place) -> Iterator[str]:
    bench = ["fedtune", "bench", model_of(place), "--repeats", "1", "--threads", "1", "--new-tokens"]
    yield place.run(*bench, "100", "--prompt-tokens", "100")
    yield place.run(*bench, "4", "--prompt-tokens", "100")


@follows("{} has no text: give one line per prompt", slow=True)
def _(place: Place) -> Iterator[str]:
    text = place.folder / "prompts.txt"
    text.write_text("\n")
    bench = ["fedtune", "bench", model_of(place), "--repeats", "1", "--threads", "1", "--new-tokens", "4", "--prompt-tokens", "8"]
    yield place.run(*bench, "--speculate", "--text", text)
    text.write_text("turn on the light\nturn off the radio\n")
    yield place.run(*bench, "--speculate", "--text", text)


@follows("so it takes no system message: leave it out")
def _(place: Place) -> Iterator[str]:
    bare = place.keep("bare", lambda path: tiny_model(path, context=128, chat=False))
    for flags in (["--system", "be brief"], []):
        place.patch.setattr("sys.stdin", io.StringIO("hello\n"))
        yield place.run("fedtune", "chat", bare, "--max-new-tokens", "2", *flags)


def draft(place: Place, *flags: str) -> str:
    fixed = ["--length", "16", "--batch-size", "2", "--out", str(place.folder / f"draft-{len(list(place.folder.iterdir()))}")]
    return place.run("fedtune", "draft", model_of(place), *fixed, *flags)


@follows("is too many for a draft of a model of {} layers: use fewer", slow=True)
def _(place: Place) -> Iterator[str]:
    yield draft(place, "--steps", "1", "--layers", "9")
    yield draft(place, "--steps", "1", "--layers", "1")


@follows("holds {} texts: give at least two, one for training and one for measurement", slow=True)
def _(place: Place) -> Iterator[str]:
    text = place.folder / "texts.txt"
    for lines in (1, 2):
        text.write_text("turn on the light in the kitchen\n" * lines)
        yield draft(place, "--steps", "1", "--text", str(text))


@follows("the tokenizer has no BOS or EOS token to start a text with: give texts with --text", slow=True)
def _(place: Place) -> Iterator[str]:
    for name in ("bos_token_id", "eos_token_id"):
        place.patch.setattr("transformers.PreTrainedTokenizerFast." + name, None, raising=False)
    (place.folder / "texts.txt").write_text("turn on the light in the kitchen\nturn off the radio\n")
    yield draft(place, "--steps", "1")
    yield draft(place, "--steps", "1", "--text", str(place.folder / "texts.txt"))
