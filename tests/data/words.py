"""A tokenizer whose ids can be read off."""

from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<pad>", "a", "b", "c", "d", "e", "f", "g", "h"]  # a is 3, b is 4, ... h is 10


@cache
def word_tokenizer(bos: bool = True, eos: bool = True, pad: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, <s> in front where the tokenizer knows one, as Llama does it."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="h"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None, "pad_token": "<pad>" if pad else None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
