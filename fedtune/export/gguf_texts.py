"""Which texts llama.cpp gives other tokens than transformers, though a GGUF file says all that it can of the tokenizer.

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
    """The texts in a sentence; "" where there are none.

    Args:
        raw: tokenizer.json.
        tokenizer: The same, ready.
        scores: Of all tokens by their text, where SentencePiece's BPE goes by them; None for byte-level BPE, which goes by merges.
    """
    added = list(tokenizer.get_added_tokens_decoder().values())
    normal = [step["type"] for step in list_steps(raw.get("normalizer"), "normalizers")]
    said = [*_spaces(raw), *_flags(added)]
    if "NFC" in normal:
        said.append("text that is not composed yet (Unicode's NFC) stays as it is")
    if scores is not None:
        said += [*_normalized(normal, added), *_bytes(raw, scores), *_joined(raw, added, scores)]
    return f"llama.cpp gives some texts other tokens than transformers, which GGUF cannot express: {'; '.join(said)}" if said else ""


def list_steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json, whose sequences list theirs under `inner`."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [dict(part)]


def _spaces(raw: Mapping[str, Any]) -> Iterable[str]:
    """llama.cpp puts its space before every piece of text, at the beginning and behind special tokens, whatever the piece begins with."""
    pre = raw.get("pre_tokenizer") or {}
    scheme = pre.get("prepend_scheme", "always") if pre.get("type") == "Metaspace" else "never"
    if scheme != "never":
        yield "text that begins with a space, or goes on with one after a special token, gets a second one"
    if scheme == "first":
        yield "text behind a special token, such as a chat's turns, gets a space that is meant for the first text only"


def _flags(added: Iterable[AddedToken]) -> Iterable[str]:
    if odd := [t.content for t in added if t.lstrip or t.rstrip or t.single_word]:
        yield f"white space and words beside '{odd[0]}' ({len(odd)} such) are left as they are, which this tokenizer heeds"


def _normalized(normal: list[str], added: Iterable[AddedToken]) -> Iterable[str]:
    """An added token that is normalized is looked for in the normalized text, as the normalizer writes the token itself."""
    if odd := [t.content for t in added if t.normalized and ("Prepend" in normal or (normal and {" ", SPACE} & {*t.content}))]:
        yield f"{odd[0]!r} ({len(odd)} such) is found in the text as it is written, where this tokenizer changes and adds spaces first"


def _bytes(raw: Mapping[str, Any], known: Mapping[str, float]) -> Iterable[str]:
    """What llama.cpp makes of a character that is no token: its bytes."""
    if any(byte not in known for byte in BYTES):
        yield "a character that is no token ends llama.cpp with an error, since this vocabulary lacks tokens for single bytes"
    elif not raw["model"].get("byte_fallback"):
        yield "a character that is no token becomes the tokens of its bytes"


def _joined(raw: Mapping[str, Any], added: Iterable[AddedToken], scores: Mapping[str, float]) -> Iterable[str]:
    """llama.cpp joins any two parts whose text is a token, transformers those only that a merge names.

    Both come to the same where they make the same of each token's own text: whatever stands around it, the parts that it is joined from
    are the same at that point.
    """
    model = raw["model"]
    ranks = dict[tuple[str, ...], int]()
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)), rank)
    whole_words = bool(model.get("ignore_merges"))
    apart = {t.content for t in added if SPACE not in t.content} | {*BYTES}  # cut out of a text beforehand, or never spelled

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
        yield f"text that spells {odd[0]!r} ({len(odd)} such) becomes that one token, which this tokenizer's merges do not make there"


def _join(text: str, rank: Callable[[str, str], float | None]) -> list[str]:
    """Byte-pair encoding of one text: the pair of the lowest rank is joined, the leftmost of equals, until there is none."""
    parts = list(text)
    while found := [(r, i) for i, pair in enumerate(pairwise(parts)) if (r := rank(*pair)) is not None]:
        at = min(found)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts
