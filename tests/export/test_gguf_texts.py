"""An export reports exactly the texts with different tokens in llama.cpp and transformers.

The quick tests compare transformers with llama.cpp's rule as `as_llama_cpp` writes it; a slow one compares this rule with llama.cpp, which
is looked for as `tests.export.test_gguf` says.
"""

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.export.gguf import describe_gguf, export_gguf
from fedtune.export.gguf_tokens import CONTROL, UNKNOWN, UNUSED, USER, Vocabulary, read_vocabulary
from tests.export.test_gguf import llama_python
from tests.inference.tokenizer_table import SPLIT, by_bytes, pieces, with_start_token
from tests.models.build import checkpoint, llama_config

CHATS = [
    "hi ab 12", "ab", "a b  ab", "hi\n a", "café 😀 hi", "<s>hi</s>ab", "<s>hi ab</s>\nhi", "</s><s>ab", "hi</s> ab", "<s> hi", " hi ab",
    "  hi", "\nhi", "<s>ab</s> <s> hi",
]  # fmt: skip
TEXTS = [
    *CHATS, "     ", "\n", "a\r\nb\tc", "12 123 ab12", "nai\u0308ve e\u0301", "你好 hi", "👨\u200d👩 ab", "hi<tool>ab", "hi <tool> ab",
    "<tool>  <tool>", "abc", "aabc bc", "a<0x41>b", "<|user|>\nhi ab</s>\n<|assistant|>\n",
    "<s>[INST] hi ab [/INST] ab </s><s>[INST] a [/INST]", "hi <|user|> ab<|end|> hi", "I'm IT'S we'Ve",
    "<|im_start|>user\nhi  ab<|im_end|>\n<|im_start|>assistant\n",
    "def f(x):\n    return x + 1\n\n\nf(2)",
]  # fmt: skip


def plain(scheme: str | None, *added: str | AddedToken) -> Tokenizer:
    out = pieces(scheme, flagged=False)
    out.add_tokens(list(added))
    return out


def letters(merges: list[tuple[str, str]], *, bytes_: bool = True, **model: Any) -> Tokenizer:
    """SentencePiece's BPE of a few letters, whose merges need not make every token from all its parts."""
    bytes_of = [f"<0x{b:02X}>" for b in range(256 if bytes_ else 0)]
    words = ["<unk>", "<s>", "</s>", *bytes_of, *"▁abchi12", "ab", "bc", "abc"]
    out = Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)}, merges, **{"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": bytes_, **model}
        )
    )
    out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    out.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    out.add_special_tokens(["<unk>", "<s>", "</s>"])
    return out


def composing_tokenizer() -> Tokenizer:
    out = by_bytes(pre_tokenizers.Split(Regex(SPLIT % ""), "isolated"), use_regex=False, flagged=False)
    out.normalizer = normalizers.NFC()
    return out


ALL = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
SPACES = "gets a second space"
FIRST = "only the first text should get"
SPELLED = "merges do not produce"
NORMALIZED = "first replaces and adds spaces"
ENDS = "ends llama.cpp with an error"
BYTES = "is encoded as byte tokens"
PIECES: dict[str, tuple[Callable[[], Tokenizer], list[str]]] = {  # SentencePiece's BPE tokenizers, and the reported differences
    "legacy": (lambda: pieces(None, flagged=False), []),
    "never": (lambda: pieces("never", flagged=False), []),
    "always": (lambda: pieces("always", flagged=False), [SPACES]),
    "first": (lambda: with_start_token(pieces("first", flagged=False)), [SPACES, FIRST]),
    "flags": (lambda: pieces("never"), ["next to '<|user|>' (3 such tokens)"]),
    "added": (lambda: plain("never", "<tool>"), []),
    "added, legacy": (lambda: plain(None, "<tool>", "<|x|>"), ["'<tool>' (2 such tokens) is searched", NORMALIZED]),
    "added as it is, legacy": (lambda: plain(None, AddedToken("<tool>", normalized=False)), []),
    "added spaces": (lambda: plain("never", "▁▁"), ["the text '▁▁' (1 such)", SPELLED]),
    "added spaces, legacy": (lambda: plain(None, AddedToken("▁▁", normalized=False)), ["the text '▁▁' (1 such)", SPELLED]),
    "added blanks": (lambda: plain("never", "  "), []),
    "added blanks, legacy": (lambda: plain(None, "  "), ["'  ' (1 such tokens) is searched", NORMALIZED]),
    "all merges": (lambda: letters(ALL), []),
    "merges that no text lacks": (lambda: letters(ALL[:3]), []),
    "merges that come too late": (lambda: letters([ALL[1], ALL[0], ALL[2]]), ["the text 'abc' (1 such)", SPELLED]),
    "no merges of some": (lambda: letters(ALL[:1]), ["the text 'bc' (2 such)", SPELLED]),
    "whole words": (lambda: letters(ALL[:1], ignore_merges=True), ["the text 'bc' (2 such)", SPELLED]),
    "whole words by merges": (lambda: letters(ALL, ignore_merges=True), []),
    "bytes that are not used": (lambda: letters(ALL, byte_fallback=False), [BYTES]),
    "no bytes": (lambda: letters(ALL, bytes_=False), [ENDS]),
}
BY_BYTES: dict[str, tuple[Callable[[], Tokenizer], list[str]]] = {
    "gpt-2": (lambda: by_bytes(pre_tokenizers.Sequence([]), use_regex=True, flagged=False), []),
    "smollm": (lambda: by_bytes(pre_tokenizers.Digits(True), use_regex=True, flagged=False), []),
    "qwen2": (composing_tokenizer, ["text that is not in Unicode's NFC"]),
    "llama3": (
        lambda: with_start_token(
            by_bytes(pre_tokenizers.Split(Regex(SPLIT % "{1,3}"), "isolated"), use_regex=False, ignore_merges=True, flagged=False)
        ),
        [],
    ),
    "flags": (lambda: by_bytes(pre_tokenizers.Digits(True), use_regex=True), ["next to '<|user|>' (3 such tokens)"]),
}


def model_of(folder: Path, made: Tokenizer) -> Path:
    """A checkpoint with this tokenizer."""
    checkpoint(folder, config=llama_config(vocab_size=400))
    for old in folder.glob("token*"):
        old.unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", **({"unk_token": "<unk>"} if made.token_to_id("<unk>") is not None else {})}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return folder


def as_llama_cpp(own: Vocabulary, text: str) -> list[int] | None:
    """llama.cpp's `llama_vocab::impl::tokenize` for SentencePiece with special tokens parsed: a space before each piece of text, then pairs
    joined by the best score, the leftmost of equals, then bytes; None where there is no token for a byte, which ends it."""
    special = {t: i for i, t in enumerate(own.tokens) if own.types[i] in (CONTROL, USER, UNKNOWN)}
    known = {t: i for i, t in enumerate(own.tokens) if own.types[i] != UNUSED}
    out = []
    for piece in re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text):
        if piece in special or not piece:
            out += [special[piece]] if piece else []
            continue
        parts = list((" " * own.space + piece).replace(" ", "▁"))
        while joined := [(own.scores[known[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in known]:
            at = -max(joined)[1]
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        for part in parts:
            out += [known[part]] if part in known else [known.get(f"<0x{b:02X}>", -1) for b in part.encode()]
    return None if -1 in out else out


@pytest.mark.parametrize(
    ("scheme", "others"), [(None, set()), ("never", set()), ("always", {8, 9, 10, 11, 13}), ("first", {5, 6, 7, 8, 9, 10, 11, 13})]
)
def test_special_tokens_and_chats_are_the_same_in_llama_cpp_or_reported(tmp_path: Path, scheme: str | None, others: set[int]) -> None:
    tokenizer = pieces(scheme, flagged=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    own = read_vocabulary(tmp_path, theirs, len(theirs))
    differ = {i for i, t in enumerate(CHATS) if as_llama_cpp(own, t) != theirs(t, add_special_tokens=False).input_ids}
    assert differ == others and bool(own.differs) == bool(others)
    assert ("a second space" in own.differs) == (scheme in ("always", "first"))
    assert ("text after a special token" in own.differs) == (scheme == "first")


@pytest.mark.parametrize("name", PIECES)
def test_exactly_the_differing_texts_are_reported(tmp_path: Path, name: str) -> None:
    folder = model_of(tmp_path / "m", PIECES[name][0]())
    theirs = AutoTokenizer.from_pretrained(folder)
    own = read_vocabulary(folder, theirs, 400)
    differ = [t for t in TEXTS if as_llama_cpp(own, t) != theirs(t, add_special_tokens=False).input_ids]
    assert bool(differ) == bool(own.differs)
    check(own.differs, PIECES[name][1])


@pytest.mark.parametrize("name", BY_BYTES)
def test_flags_and_unicode_composition_of_byte_level_tokenizers_are_reported(tmp_path: Path, name: str) -> None:
    folder = model_of(tmp_path / "m", BY_BYTES[name][0]())
    check(read_vocabulary(folder, AutoTokenizer.from_pretrained(folder), 400).differs, BY_BYTES[name][1])


def check(differs: str, reported: list[str]) -> None:
    """Check that the sentence has every part and no others."""
    assert all(part in differs for part in reported) and (reported or not differs)
    for other in {SPACES, FIRST, SPELLED, NORMALIZED, ENDS, BYTES, "next to", "NFC"}:
        assert (other in differs) == any(other in part for part in reported), other


def test_an_export_reports_texts_with_other_tokens(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", config=llama_config(vocab_size=400))
    PreTrainedTokenizerFast(tokenizer_object=pieces("first"), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    description = describe_gguf(export_gguf(folder, tmp_path / "m.gguf"))
    for part in ("GGUF cannot express it", "gets a second space", "after a special token", "next to '<|user|>' (3 such tokens)"):
        assert part in description


# -- llama.cpp ----------------------------------------------------------------------------------------------------------------------------

RUN = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = [t.encode() for t in json.loads(sys.argv[2])]
print("\\n" + json.dumps([model.tokenize(t, add_bos=begin, special=True) for begin in (False, True) for t in texts]))
"""


def llama_tokens(path: Path, texts: list[str]) -> list[list[int]] | None:
    """llama.cpp's tokens of each text, then of each text with its start token; None if the process dies."""
    process = subprocess.run([llama_python(), "-c", RUN, path, json.dumps(texts)], capture_output=True, text=True)
    return json.loads(process.stdout.splitlines()[-1]) if process.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"pieces: {n}" for n in PIECES] + [f"bytes: {n}" for n in BY_BYTES])
def test_llama_cpp_agrees_with_the_report(tmp_path: Path, name: str) -> None:
    kind, _, name = name.partition(": ")
    tokenizer, reported = (PIECES if kind == "pieces" else BY_BYTES)[name]
    folder = model_of(tmp_path / "m", tokenizer())
    path = export_gguf(folder, tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(folder)
    own, texts = read_vocabulary(folder, theirs, 400), TEXTS
    if kind == "pieces":
        texts = [t for t in TEXTS if as_llama_cpp(own, t) is not None]
        for text in [t for t in TEXTS if t not in texts][:2]:
            assert llama_tokens(path, [text]) is None
    actual = llama_tokens(path, texts)
    assert actual is not None and len(texts) >= 5
    bare = actual[: len(texts)]
    if kind == "pieces":
        assert bare == [as_llama_cpp(own, t) for t in texts]
    assert actual[len(texts) :] == [[theirs.bos_token_id] * own.begins + ids for ids in bare]
    assert (bare != theirs(texts, add_special_tokens=False).input_ids or texts != TEXTS) == bool(reported)
