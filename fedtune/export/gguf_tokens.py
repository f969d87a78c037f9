"""Converts a tokenizer.json to the vocabulary of a GGUF file, if llama.cpp has a tokenizer model with the same behavior.

SentencePiece's BPE (`▁` for a space, bytes as <0xNN>) becomes llama.cpp's `llama`, which joins the pair whose token has the highest score
(minus the merge's rank). Byte-level BPE becomes `gpt2`, with one of llama.cpp's named pre-tokenizers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import ModelError
from fedtune.export.gguf_texts import SPACE, describe_texts, list_steps
from fedtune.inference.engine.text import read_text
from fedtune.storage.parsing import parse_json
from fedtune.storage.parsing import read_text as text_of

__all__ = ["Vocabulary", "read_vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}  # a Split's regular expression → llama.cpp's name


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A GGUF vocabulary.

    Args:
        model: `llama` or `gpt2`.
        pre: Pre-tokenizer of `gpt2`; "" for `llama`.
        tokens, types: By id, padded to the size of the embedding table.
        scores: Only for `llama`.
        merges: Only for `gpt2`, as "left right".
        space: Whether a space is added before a text.
        begins: Whether a text starts with `bos`.
        ids: `bos`, `eos`, `unk`, `pad` → id; missing ones are left out.
        template: Jinja chat template.
        differs: Texts that llama.cpp tokenizes differently from transformers (see `describe_texts`); "" if there are none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space: bool
    begins: bool
    ids: dict[str, int]
    template: str | None
    differs: str


def read_vocabulary(folder: Path, tokenizer: Any, size: int) -> Vocabulary:
    """Convert a tokenizer for an embedding table of `size` rows.

    Args:
        folder: The tokenizer's folder, with tokenizer.json.
        tokenizer: The tokenizer as loaded by transformers.

    Raises:
        ModelError: The tokenizer is damaged, or llama.cpp does not support its kind.
    """
    text = read_text(folder, saved=True)
    raw = parse_json(text_of(folder / "tokenizer.json"))  # valid: read_text has parsed it
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(
            f"{folder}: llama.cpp does not support this {model.get('type')} tokenizer: GGUF needs SentencePiece or byte-level BPE"
        )
    known = text.tokenizer.get_vocab()
    if known and max(known.values()) >= size:
        raise ModelError(f"the tokenizer in {folder} has token id {max(known.values())}, but the model has only {size} tokens")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in known.items():
        tokens[i], types[i] = token, NORMAL
    for i, added in text.tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER
    own = {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "unk", "pad")}
    ids = {n: i for n, i in own.items() if i is not None}
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    spaced = _sentencepiece(raw)
    common: dict[str, Any] = {"tokens": tokens, "ids": ids, "begins": text.bos is not None, "template": text.template}
    if spaced is None:
        pre = _pre(raw, folder)
        common["differs"] = describe_texts(raw, text.tokenizer, None)
        return Vocabulary(model="gpt2", pre=pre, types=types, scores=[], merges=[" ".join(p) for p in pairs], space=False, **common)
    if "unk" in ids:
        types[ids["unk"]] = UNKNOWN
    for i in text.bytes:
        types[i] = BYTE
    scores = _scores(tokens, known, pairs, folder)
    common["differs"] = describe_texts(raw, text.tokenizer, {t: scores[i] for t, i in sorted(known.items(), key=lambda item: item[1])})
    return Vocabulary(model="llama", pre="", types=types, scores=scores, merges=[], space=spaced, **common)


def _sentencepiece(raw: dict[str, Any]) -> bool | None:
    """Whether SentencePiece's BPE adds a space before a text; None for other tokenizers."""
    steps = list_steps(raw.get("normalizer"), "normalizers")
    kinds = [s["type"] for s in steps]
    replaced = any(s["type"] == "Replace" and s.get("content") == SPACE and s.get("pattern") == {"String": " "} for s in steps)
    pre = raw.get("pre_tokenizer")
    if replaced and set(kinds) <= {"Prepend", "Replace"} and pre is None:
        return "Prepend" in kinds
    if not steps and pre and pre["type"] == "Metaspace" and not pre.get("split", True) and pre.get("replacement") == SPACE:
        return pre.get("prepend_scheme", "always") != "never"
    return None


def _pre(raw: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer."""
    steps = list_steps(raw.get("pre_tokenizer"), "pretokenizers")
    kinds = [s["type"] for s in steps]
    normal = [s["type"] for s in list_steps(raw.get("normalizer"), "normalizers")]
    found = ""
    if kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space"):
        own = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own:
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and own and steps[0].get("individual_digits"):
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not own:
            found = _SPLITS.get(str(steps[0].get("pattern", {}).get("Regex")), "")
    # only for llama-bpe does llama.cpp look a whole word up in the vocabulary before any merge; it never normalizes, not even Qwen's NFC,
    # which `describe_texts` reports
    fits = bool(raw["model"].get("ignore_merges")) == (found == "llama-bpe") and normal in ([], ["NFC"])
    if not found or not fits:
        raise ModelError(f"{folder}: llama.cpp does not support this tokenizer's pre-tokenizer ({', '.join(kinds) or 'none'}): use --to hf")
    return found


def _scores(tokens: list[str], known: dict[str, int], pairs: list[tuple[str, ...]], folder: Path) -> list[float]:
    """A token's score is minus the rank of the merges that produce it: SentencePiece ranks pairs by the resulting token."""
    scores, rank, last = [0.0] * len(tokens), 0, -1
    for pair in pairs:
        token = known.get("".join(pair), -1)
        if token != last:
            rank += 1
            if token < 0 or scores[token]:
                raise ModelError(f"{folder}: the merges of '{''.join(pair)}' have several ranks, which scores cannot express: use --to hf")
            scores[token], last = float(-rank), token
    for i, text in enumerate(tokens):
        if len(text) > 1 and not scores[i]:  # no merge produces it
            scores[i] = float(-rank - 1)
    return scores
