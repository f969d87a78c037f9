"""Engines of tiny models with a tokenizer of words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from fedtune.inference.engine.load import Engine, load_engine
from tests.inference.engine.tiny import VOCAB, tiny_model

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(2, VOCAB))]


def build(folder: Path, name: str = "llama", *, seed: int = 0, words: Sequence[str] = WORDS, vocab: int = VOCAB) -> tuple[Engine, Any]:
    """An engine and the same model in transformers; end token </s>."""
    model = tiny_model(name, folder, seed=seed, vocab=vocab)
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(["<s>", "</s>"])
    tok.save(str(folder / "tokenizer.json"))
    # not the tokenizer class of the model's type
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return load_engine(folder), model
