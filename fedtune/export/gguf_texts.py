"""Finds texts that llama.cpp tokenizes differently from transformers because GGUF cannot express the difference.

Source: llama.cpp's `llama_vocab::impl::tokenize` and `llm_tokenizer_spm_session`; `tests/export/test_gguf_texts.py` runs it.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

__all__ = ["describe_texts", "list_steps"]

SPACE = "▁"
BYTES = [f"<0x{b:02X}>" for b in range(256)]  # tokens


def describe_texts(raw: Mapping[str, Any], tokenizer: Tokenizer, scores: Mapping[str, float] | None) -> str:
    """Describe the texts in a sentence; "" if there are none.

    Args:
        raw: tokenizer.json.
        tokenizer: The loaded tokenizer.
        scores: Token text → score, for SentencePiece's BPE; None for byte-level BPE, which uses merges.
    """
    added = list(tokenizer.get_added_tokens_decoder().values())
    normal = [step["type"] for step in list_steps(raw.get("normalizer"), "normalizers")]
    differences = [*_spaces(raw), *_flags(added)]
    if "NFC" in normal:
        differences.append("text that is not in Unicode's NFC is not normalized")
    if scores is not None:
        differences += [*_normalized(normal, added), *_bytes(raw, scores), *_joined(raw, added, scores)]
    if not differences:
        return ""
    return f"llama.cpp tokenizes some texts differently from transformers, and GGUF cannot express it: {'; '.join(differences)}"


def list_steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json; a Sequence lists its steps under `inner`."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [dict(part)]


def _spaces(raw: Mapping[str, Any]) -> Iterable[str]:
    """llama.cpp adds a space before the text and after every special token, even if a space follows."""
    pre = raw.get("pre_tokenizer") or {}
    scheme = pre.get("prepend_scheme", "always") if pre.get("type") == "Metaspace" else "never"
    if scheme != "never":
        yield "text that starts with a space, or continues with one after a special token, gets a second space"
    if scheme == "first":
        yield "text after a special token, such as a chat turn, gets a space that only the first text should get"


def _flags(added: Iterable[AddedToken]) -> Iterable[str]:
    if odd := [t.content for t in added if t.lstrip or t.rstrip or t.single_word]:
        yield f"whitespace and words next to '{odd[0]}' ({len(odd)} such tokens) are not treated specially, as this tokenizer does"


def _normalized(normal: list[str], added: Iterable[AddedToken]) -> Iterable[str]:
    """transformers searches for an added token with `normalized` in the normalized text, after normalizing the token too."""
    if odd := [t.content for t in added if t.normalized and ("Prepend" in normal or (normal and {" ", SPACE} & {*t.content}))]:
        yield f"{odd[0]!r} ({len(odd)} such tokens) is searched in the raw text, where this tokenizer first replaces and adds spaces"


def _bytes(raw: Mapping[str, Any], known: Mapping[str, float]) -> Iterable[str]:
    """llama.cpp encodes a character without a token as bytes."""
    if any(byte not in known for byte in BYTES):
        yield "a character without a token ends llama.cpp with an error, because this vocabulary lacks byte tokens"
    elif not raw["model"].get("byte_fallback"):
        yield "a character without a token is encoded as byte tokens"


def _joined(raw: Mapping[str, Any], added: Iterable[AddedToken], scores: Mapping[str, float]) -> Iterable[str]:
    """llama.cpp joins any two parts whose text is a token; transformers joins only pairs listed as merges.

    Both agree if they encode each token's own text in the same way: whatever surrounds it, a token is joined from the same parts.
    """
    model = raw["model"]
    ranks = dict[tuple[str, ...], int]()
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)), rank)
    whole_words = bool(model.get("ignore_merges"))
    apart = {t.content for t in added if SPACE not in t.content} | {*BYTES}  # split off before the BPE, or never part of a text

    def by_merges(left: str, right: str) -> float | None:
        return ranks.get((left, right))

    def by_scores(left: str, right: str) -> float | None:
        return -scores[left + right] if left + right in scores else None

    odd = list[str]()
    for token in scores:
        if len(token) < 2 or token in apart:
            continue
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        if whole_words or any(h not in ranks and all(len(part) == 1 or part in scores for part in h) for h in halves):
            merged, scored = (_join(token, rank) == [token] for rank in (by_merges, by_scores))
            if merged != scored or (whole_words and not merged):
                odd.append(token)
    if odd:
        yield f"the text {odd[0]!r} ({len(odd)} such) is encoded as one token, which this tokenizer's merges do not produce"


def _join(text: str, rank: Callable[[str, str], float | None]) -> list[str]:
    """Byte-pair encoding of one text: repeatedly join the pair of the lowest rank, the leftmost of equals."""
    parts = list(text)
    while found := [(r, i) for i, pair in enumerate(pairwise(parts)) if (r := rank(*pair)) is not None]:
        at = min(found)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts
