"""A folder's tokenizer: encodes text as in training, decodes tokens incrementally, and renders the chat template."""

import contextlib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.tokenizer import first_line, read_object, read_tokenizer
from fedtune.storage.parsing import parse_json
from fedtune.storage.parsing import read_text as text_of
from fedtune.templates.render import FAULT, Chat, render

_UNFINISHED = "\ufffd"  # decoded from invalid or incomplete bytes
_TAIL = 8  # last tokens of the prompt that determine how its text and the answer's join
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet maps to themselves
_LETTERS = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PLAIN}))}


class Text:
    """The tokenizer of a model; `read_text` loads it from a folder.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library.
        bos: The token that texts start with, as in training; None if there is none.
        ends: Tokens that end an answer.
        template: Jinja chat template; None if there is none.
        names: Special tokens available to a chat template, such as {"bos_token": "<s>"}.
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
        self.size = 1 + max(vocabulary.values(), default=-1)  # highest id + 1
        self.longest = max(map(len, vocabulary), default=0)  # length of the longest token, in characters
        kinds = decoder_kinds(tokenizer)
        found = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in range(256)] if "ByteFallback" in kinds else []
        self.bytes = frozenset(i for i in found if i is not None)  # tokens of single bytes
        self.by_letters = "ByteLevel" in kinds  # tokens are byte strings in GPT-2's alphabet

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Encode a text; with `begin`, it starts as in training.

        Raises:
            ConfigError: The result has no tokens, or the text is not UTF-8.
            ModelError: The tokenizer fails, as one without an unknown token does on some texts.
        """
        try:
            text.encode()
        except UnicodeEncodeError:  # from invalid bytes on a command line or in a pipe
            raise ConfigError("the text is not UTF-8: give it in that encoding") from None
        lead = [self.bos] if begin and self.bos is not None else []
        # `encode` holds the GIL and computes offsets: 1 MB of text would block all other threads for 2 s
        try:
            ids = lead + self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as bad:  # the Rust code raises Exception, and its panics are BaseExceptions
            raise ModelError(f"the model's tokenizer cannot encode this text ({first_line(bad)}): export the model again") from None
        if not ids:
            raise ConfigError("the prompt is empty and the tokenizer has no BOS token: give some text")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def name(self, token: int) -> str:
        """A token's text in the vocabulary."""
        return self.tokenizer.id_to_token(token) or ""

    def raw(self, token: int) -> bytes | None:
        """The bytes of a token; None if they depend on its neighbors."""
        name = self.name(token)
        if token in self.special:
            return b""
        if token in self.bytes:
            return bytes([int(name[3:5], 16)])
        if not self.by_letters:
            return None
        return bytes(_LETTERS[c] for c in name) if all(c in _LETTERS for c in name) else name.encode()

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Render messages {"role", "content"} with the chat template, up to the start of the answer; encode the result with begin=False.

        Args:
            messages: The messages.
            tools: JSON schemas of functions that the answer may call; None if there are none.

        Raises:
            ModelError: There is no template, or it fails.
            ConfigError: The template refuses the messages.
        """
        if self.template is None:
            raise ModelError("the model has no chat template: give it a prompt instead")
        (found,) = render(self.template, [Chat(messages=messages, tools=tools)], self._names)
        if found.refused:
            raise ConfigError(f"the model's chat template refuses the messages: {found.refused}")
        if found.fault:
            raise ModelError(FAULT + found.fault)
        return found.text

    def check_template(self) -> None:
        """Test the chat template, if any, with a single message. A template that refuses this message may accept others.

        Raises:
            ModelError: The template fails.
        """
        if self.template is not None:
            with contextlib.suppress(ConfigError):
                self.chat([{"role": "user", "content": "hello"}])

    def same_as(self, other: "Text") -> bool:
        """Whether both have the same vocabulary."""
        return self.tokenizer.get_vocab() == other.tokenizer.get_vocab()


class Stream:
    """Decodes tokens incrementally: the results of `push` and `finish` concatenate to `decode` of all tokens. Characters are never split.

    Text is held back while it can still change: after an incomplete character, and inside a run of byte tokens, which is decoded together.
    Each step decodes only the tokens of the last two pieces: the earlier one determines whether the later starts with a space.

    Args:
        text: The tokenizer.
        before: Tokens of the preceding text, which determine whether the first token starts with a space.
    """

    def __init__(self, text: Text, before: Sequence[int] = ()) -> None:
        self._text = text
        self._ids: list[int] = []
        self._shown = ""  # decode(_ids[:_done]), already returned
        self._done = 0
        tail = before[-_TAIL:]
        if tail and not text.decode(tail).endswith(_UNFINISHED):  # the answer does not complete the prompt's last character
            for token in tail:
                self.push(token)
            self.finish()

    def peek(self, token: int) -> str:
        """The text of a token if it came next."""
        whole = self._text.decode([*self._ids[: self._done], token])
        return whole[len(self._shown) :] if whole.startswith(self._shown) else self._text.decode([token])

    def push(self, token: int) -> str:
        """Add a token. Returns the text that is now final."""
        if token in self._text.special:
            return ""
        self._ids.append(token)
        if token in self._text.bytes:
            return ""
        whole = self._text.decode(self._ids)
        if whole.endswith(_UNFINISHED) or not whole.startswith(self._shown):
            return ""
        out = whole[len(self._shown) :]
        if context := self._text.decode(self._ids[self._done :]):  # an empty context would make the next token look like the first
            self._ids, self._shown = self._ids[self._done :], context
        else:
            self._shown = whole
        self._done = len(self._ids)
        return out

    def finish(self) -> str:
        """Return the text that was held back."""
        whole = self._text.decode(self._ids)
        self._done, out = len(self._ids), whole[len(self._shown) :]
        self._shown = whole
        return out


class StopStrings:
    """Ends a text before the first stop string; holds back text that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text. Returns the part that is certain to belong to the answer; "" once `stopped`."""
        if self.stopped:
            return ""
        held = self._held + text
        if found := [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]  # the first to be complete, so that the result does not depend on the pieces
        longest = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - longest :]
        return held[: len(held) - longest]

    def finish(self) -> str:
        """Return the text that was held back and is not a stop string."""
        out, self._held = self._held, ""
        return out


def decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    """Types of a tokenizer's decoder steps, such as "ByteLevel"."""
    decoder = parse_json(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    return frozenset(part.get("type", "") for part in decoder.get("decoders", [decoder]))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def wrap(prompt: str, template: str | None) -> str:
    """Insert a request into the run's template if that has one field. A text that starts like the template is returned unchanged."""
    if not template:
        return prompt
    parts = list(string.Formatter().parse(template))
    fields = [name for _, name, _, _ in parts if name is not None]
    if len(fields) != 1 or (parts[0][0] and prompt.startswith(parts[0][0])):
        return prompt
    return "".join(text + (prompt if name is not None else "") for text, name, _, _ in parts)


def read_text(folder: Path, *, saved: bool = False) -> Text:
    """Load the tokenizer of a Hugging Face folder or an edge package.

    A text starts with the BOS token if tokenizer.json's post-processor adds it: transformers ignores `add_bos_token`.

    Args:
        folder: Folder with tokenizer.json and the config files.
        saved: Whether the files are those of an edge package (see `read_tokenizer`).

    Raises:
        Unsupported: The engine does not support the tokenizer's class.
        ModelError: tokenizer.json is missing, or a file is damaged.
    """
    folder = Path(folder)
    loaded = read_tokenizer(folder, saved=saved)
    tokenizer, names = loaded.tokenizer, loaded.names
    bos, eos = (tokenizer.token_to_id(names[n]) if n in names else None for n in ("bos_token", "eos_token"))
    return Text(
        tokenizer,
        bos=bos if bos is not None and loaded.begun[:1] == [bos] else None,
        ends=frozenset({eos} - {None}) | _ends(folder),  # type: ignore[arg-type]
        template=_template(folder, read_object(folder / "tokenizer_config.json")),
        names=names,
    )


def _ends(folder: Path) -> frozenset[int]:
    """The eos_token_id (one or several) of generation_config.json, else of config.json."""
    own = read_object(folder / "generation_config.json")
    value = own.get("eos_token_id", read_object(folder / "config.json").get("eos_token_id"))
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if type(i) is int and i >= 0)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template that transformers uses for a chat without tools: of several, the one named default. Files override the config."""
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
