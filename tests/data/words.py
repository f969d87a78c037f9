"""A tokenizer with one token for each word, whose id is the word's index in `WORDS`."""

from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<pad>", "a", "b", "c", "d", "e", "f", "g", "h"]  # a is 3, b is 4, ... h is 10


@cache
def word_tokenizer(bos: bool = True, eos: bool = True, pad: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer. With `bos` it starts a text with <s>, as Llama's does; unknown words become h."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="h"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None, "pad_token": "<pad>" if pad else None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
