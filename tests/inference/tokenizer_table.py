"""Folders of tokenizers: kinds of tokenizer.json × contents of the configs × tokenizer class × model_type."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def _flagged_tokens() -> list[AddedToken]:
    return [
        AddedToken("<|user|>", lstrip=True, rstrip=True, special=True),
        AddedToken("<|end|>", rstrip=True, special=True),
        AddedToken("<tool>", lstrip=True, special=False),
    ]


def pieces(scheme: str | None = None, *, flagged: bool = True) -> Tokenizer:
    """SentencePiece's BPE with bytes, with a Metaspace of this scheme or, as in old versions, a normalizer that adds a leading space."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, *"▁abcdehi12", "▁a", "ab", "▁ab", "hi", "▁hi", "12", "ea", "c1"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b"), ("h", "i"), ("▁", "hi"), ("1", "2"), ("e", "a"), ("c", "1")]
    out = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    out.add_special_tokens(["<unk>", "<s>", "</s>"])
    out.add_tokens(_flagged_tokens() if flagged else [])
    return out


def by_bytes(before: Any, *, use_regex: bool, ignore_merges: bool = False, flagged: bool = True) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "i"), ("1", "2"), ("Ġ", "hi"), ("e", "a"), ("c", "1")]
    words = [*alphabet, *map("".join, merges), "<|endoftext|>"]
    out = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, ignore_merges=ignore_merges))
    out.pre_tokenizer = pre_tokenizers.Sequence([before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(["<|endoftext|>", "<s>", "</s>"])
    out.add_tokens(_flagged_tokens() if flagged else [])
    return out


def by_words() -> Tokenizer:
    out = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "a", "b", "hi", "12"])}, unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out.add_special_tokens(["<s>", "</s>"])
    out.add_tokens(_flagged_tokens())
    return out


def with_start_token(out: Tokenizer) -> Tokenizer:
    """Add a post-processor that prepends <s>."""
    out.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", out.token_to_id("<s>"))])
    return out


def pad(out: Tokenizer) -> Tokenizer:
    out.enable_padding(pad_id=0, pad_token="<pad>")
    out.enable_truncation(4)
    return out


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "prepend": lambda: pieces(),
    "always": lambda: pieces("always"),
    "first": lambda: with_start_token(pieces("first")),
    "never": lambda: pieces("never"),
    "llama3": lambda: with_start_token(
        by_bytes(pre_tokenizers.Split(Regex(SPLIT % "{1,3}"), "isolated"), use_regex=False, ignore_merges=True)
    ),
    "qwen2": lambda: by_bytes(pre_tokenizers.Split(Regex(SPLIT % ""), "isolated"), use_regex=False),
    "smollm": lambda: by_bytes(pre_tokenizers.Digits(True), use_regex=True),
    "words": lambda: with_start_token(by_words()),
    "padded": lambda: pad(pieces()),
}


def _flags(content: str, **changes: Any) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **changes}


def _with_type(content: str, **changes: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", **_flags(content, **changes)}


BASE: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
CONFIGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {  # contents of tokenizer_config.json and of older files beside it
    "none": (None, {}),
    "names": (BASE, {}),
    "names of flagged tokens": ({"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|user|>"}, {}),
    "bos asked": ({**BASE, "add_bos_token": True}, {}),
    "bos refused": ({**BASE, "add_bos_token": False, "add_eos_token": True}, {}),
    "legacy": ({**BASE, "legacy": True}, {}),
    "no prefix space": ({**BASE, "add_prefix_space": False}, {}),
    "prefix space": ({**BASE, "add_prefix_space": True, "legacy": False}, {}),
    "other flags": (
        {**BASE, "added_tokens_decoder": {"1": _flags("<s>", rstrip=True), "2": _flags("</s>", lstrip=True, normalized=True)}}, {}
    ),
    "new tokens": (
        {
            **BASE,
            "added_tokens_decoder": {"1": _flags("<s>"), "600": _flags("<new>", special=False, normalized=True)},
            "pad_token": "<new>",
        },
        {},
    ),
    "typed": ({"bos_token": _with_type("<s>", lstrip=True), "eos_token": _with_type("</s>", rstrip=True), "unk_token": None}, {}),
    "map": (
        BASE,
        {
            "special_tokens_map.json": {
                "bos_token": _flags("<s>", lstrip=True),
                "pad_token": "<pad>",
                "additional_special_tokens": ["<|user|>", "<x>"],
            }
        },
    ),
    "map that does not count": ({**BASE, "added_tokens_decoder": {}}, {"special_tokens_map.json": {"bos_token": "</s>"}}),
    "added file": (
        BASE, {"added_tokens.json": {"<extra>": 700, "<plain>": 701}, "special_tokens_map.json": {"pad_token": "<extra>"}}
    ),
    "extra": ({**BASE, "extra_special_tokens": ["<|user|>", "<img>"]}, {}),
    "extra by name": ({**BASE, "extra_special_tokens": {"image_token": "<img>", "audio_token": "<|end|>"}}, {}),
    "extra by another name": ({**BASE, "extra_special_tokens": {"boi": "<|end|>"}}, {}),
    "additional": ({**BASE, "additional_special_tokens": ["<|user|>", _with_type("<img>", lstrip=True)], "image_token": "hi"}, {}),
    "split special": ({**BASE, "split_special_tokens": True}, {}),
    "words that are special": ({**BASE, "unk_token": "hi", "mask_token": "b"}, {}),
    "no eos": ({"bos_token": "<s>"}, {}),
    "null bos": ({"bos_token": None, "eos_token": "</s>"}, {}),
}  # fmt: skip
CLASSES = [
    None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "GPT2TokenizerFast",
    "LlamaTokenizer in config.json",
]  # fmt: skip
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
NEWER = ["gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
TEXTS = [
    "hi ab 12", "  hi  a", "hi\n a", "<s>hi</s> a", "<s> hi </s>  b", "a <|user|> hi <|end|> \n ab", "ab<tool> c123 café 😀",
    "<|endoftext|>ab", "hi<|end|>hi", "e\u0301a <img> <x><extra><new> <plain>b", "<unk> hi <pad>",
]  # fmt: skip


def make(folder: Path, family: str, tokenizer: str, config: str, kind: str | None) -> Path:
    """A folder with config.json and a tokenizer's files, without weights."""
    folder.mkdir(parents=True)
    TOKENIZERS[tokenizer]().save(str(folder / "tokenizer.json"))
    own, beside = CONFIGS[config]
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 4)
    model: dict[str, Any] = {"model_type": family, "architectures": ["X"], "vocab_size": 400, **sizes}
    if kind and kind.endswith("in config.json"):
        model["tokenizer_class"] = kind.split()[0]
    elif kind:
        own = {**(own or {}), "tokenizer_class": kind}
    files: Mapping[str, Any] = {"config.json": model, **beside, **({} if own is None else {"tokenizer_config.json": own})}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
