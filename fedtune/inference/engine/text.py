"""A folder's tokenizer: text to tokens as in training, tokens to text as they come, and the chat template."""

import contextlib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.template import render
from fedtune.inference.engine.tokenizer import read_object, read_tokenizer
from fedtune.storage.parsing import parse_json
from fedtune.storage.parsing import read_text as text_of

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or none yet
_TAIL = 8  # tokens of the prompt that show how its text and the answer's join
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as themselves
_LETTERS = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PLAIN}))}


class Text:
    """The tokenizer of a model; `read_text` makes it from a folder.

    Args:
        tokenizer: Of the `tokenizers` library.
        bos: The token that texts begin with, as in training; None where they begin with their own first token.
        ends: Tokens that end an answer.
        template: Jinja chat template; None where there is none.
        names: Special tokens that a chat template may name, such as {"bos_token": "<s>"}.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, bos: int | None, ends: frozenset[int], template: str | None, names: Mapping[str, str]
    ) -> None:
        self.tokenizer = tokenizer
        self.bos = bos
        self.ends = ends
        self.template = template
        self._names = dict(names)
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab()
        self.size = 1 + max(vocabulary.values(), default=-1)  # highest id, and one
        self.longest = max(map(len, vocabulary), default=0)  # characters that a token stands for at most
        kinds = decoder_kinds(tokenizer)
        found = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in range(256)] if "ByteFallback" in kinds else []
        self.bytes = frozenset(i for i in found if i is not None)  # tokens that stand for one byte each
        self.by_letters = "ByteLevel" in kinds  # tokens are bytes, each written as a letter of GPT-2's alphabet

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Tokens of a text; with `begin`, begun as texts were in training.

        Raises:
            ConfigError: There is nothing to begin an answer from, or the text holds bytes that are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # what Python makes of such bytes on a command line or a pipe
            raise ConfigError("the text is not UTF-8: give it in that encoding") from None
        lead = [self.bos] if begin and self.bos is not None else []
        # `encode` keeps Python's lock and makes offsets: a megabyte would stop every other thread for two seconds
        ids = lead + self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if not ids:
            raise ConfigError("the prompt is empty and the tokenizer has no token to begin with: give some text")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def name(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return self.tokenizer.id_to_token(token) or ""

    def raw(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text; None where they depend on its neighbors."""
        name = self.name(token)
        if token in self.special:
            return b""
        if token in self.bytes:
            return bytes([int(name[3:5], 16)])
        if not self.by_letters:
            return None
        return bytes(_LETTERS[c] for c in name) if all(c in _LETTERS for c in name) else name.encode()

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages {"role", "content"} in the model's chat template, up to where the answer begins; encode it with begin=False.

        Raises:
            ModelError: There is no template, or it cannot be run.
            ConfigError: The template refuses the messages.
        """
        if self.template is None:
            raise ModelError("the model has no chat template: give it a prompt instead")
        return render(self.template, messages, self._names)

    def check_template(self) -> None:
        """Render the chat template, where there is one, for a single message; one that refuses this message may take others.

        Raises:
            ModelError: It cannot be run.
        """
        if self.template is not None:
            with contextlib.suppress(ConfigError):
                self.chat([{"role": "user", "content": "hello"}])

    def same_as(self, other: "Text") -> bool:
        """Whether both give the same ids to the same tokens."""
        return self.tokenizer.get_vocab() == other.tokenizer.get_vocab()


class Stream:
    """Text of tokens as they come: what `push` and `finish` return joins to `decode` of them all, and never splits a character.

    Text is held back while it could still change: at the end of an unfinished character, and inside a run of byte tokens, which decodes as
    one. Each step decodes only the tokens since the last two pieces: the earlier of them shows whether the later begins with a space.

    Args:
        text: The tokenizer.
        before: Tokens of a text that goes on with these, so that a space between the two belongs to them.
    """

    def __init__(self, text: Text, before: Sequence[int] = ()) -> None:
        self._text = text
        self._ids: list[int] = []
        self._shown = ""  # decode(_ids[:_done]), and out already
        self._done = 0
        tail = before[-_TAIL:]
        if tail and not text.decode(tail).endswith(_UNFINISHED):  # a character that is left open is not the answer's to end
            for token in tail:
                self.push(token)
            self.finish()

    def peek(self, token: int) -> str:
        """The text of a token, were it the one that follows what is certain."""
        whole = self._text.decode([*self._ids[: self._done], token])
        return whole[len(self._shown) :] if whole.startswith(self._shown) else self._text.decode([token])

    def push(self, token: int) -> str:
        """The text that is certain now."""
        if token in self._text.special:
            return ""
        self._ids.append(token)
        if token in self._text.bytes:
            return ""
        whole = self._text.decode(self._ids)
        if whole.endswith(_UNFINISHED) or not whole.startswith(self._shown):
            return ""
        out = whole[len(self._shown) :]
        if context := self._text.decode(self._ids[self._done :]):  # an empty one would not show that the next token is not the first
            self._ids, self._shown = self._ids[self._done :], context
        else:
            self._shown = whole
        self._done = len(self._ids)
        return out

    def finish(self) -> str:
        """What was held back."""
        whole = self._text.decode(self._ids)
        self._done, out = len(self._ids), whole[len(self._shown) :]
        self._shown = whole
        return out


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends the text before the first one that comes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to belong to the answer; nothing once `stopped`."""
        if self.stopped:
            return ""
        held = self._held + text
        if found := [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]  # the first to be complete, so that it does not matter how the text comes in pieces
        longest = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - longest :]
        return held[: len(held) - longest]

    def finish(self) -> str:
        """What was held back, and is no stop string after all."""
        out, self._held = self._held, ""
        return out


def decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    """Types of the parts of a tokenizer's decoder, such as "ByteLevel"."""
    decoder = parse_json(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    return frozenset(part.get("type", "") for part in decoder.get("decoders", [decoder]))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def wrap(prompt: str, template: str | None) -> str:
    """A bare request in the run's template, where it has just one field; what begins as the template does is a whole prompt already."""
    if not template:
        return prompt
    parts = list(string.Formatter().parse(template))
    fields = [name for _, name, _, _ in parts if name is not None]
    if len(fields) != 1 or (parts[0][0] and prompt.startswith(parts[0][0])):
        return prompt
    return "".join(text + (prompt if name is not None else "") for text, name, _, _ in parts)


def read_text(folder: Path, *, saved: bool = False) -> Text:
    """The tokenizer of a Hugging Face folder or an edge package.

    A text begins with the bos token where tokenizer.json's own post-processor puts it there: transformers passes over `add_bos_token`.

    Args:
        folder: Holds tokenizer.json; of its configs, what `read_tokenizer` reads, the chat template and the tokens that end an answer.
        saved: As `read_tokenizer` has it: the files are those of an edge package.

    Raises:
        Unsupported: The tokenizer is of a class whose rules the engine does not know.
        ModelError: tokenizer.json is missing, or a file is damaged.
    """
    folder = Path(folder)
    made = read_tokenizer(folder, saved=saved)
    tokenizer, names = made.tokenizer, made.names
    bos, eos = (tokenizer.token_to_id(names[n]) if n in names else None for n in ("bos_token", "eos_token"))
    return Text(
        tokenizer,
        bos=bos if bos is not None and made.begun[:1] == [bos] else None,
        ends=frozenset({eos} - {None}) | _ends(folder),  # type: ignore[arg-type]
        template=_template(folder, read_object(folder / "tokenizer_config.json")),
        names=names,
    )


def _ends(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json: a token or several."""
    own = read_object(folder / "generation_config.json")
    value = own.get("eos_token_id", read_object(folder / "config.json").get("eos_token_id"))
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if type(i) is int and i >= 0)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template that transformers takes for a chat without tools: of several, the one named default. A file overrules the config."""
    named = {"default": folder / "chat_template.jinja", **{p.stem: p for p in (folder / "additional_chat_templates").glob("*.jinja")}}
    files = {name: path for name, path in named.items() if path.is_file()}
    if files:
        path = files.get("default")
        try:
            return text_of(path) if path else None
        except (OSError, ValueError):
            raise ModelError(f"{path} cannot be read: it must be a Jinja template in UTF-8") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None
