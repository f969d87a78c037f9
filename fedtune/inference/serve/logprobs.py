"""Log-probabilities per token: the tokens of an answer concatenate to its text, and their bytes to the text's UTF-8."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.inference.engine.requests import Output
from fedtune.inference.engine.text import Stream, Text

_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its most likely alternatives.

    Args:
        token: In an answer, the characters that the token completes. For an alternative, a name that is unique at its position.
        logprob: Natural logarithm of its probability.
        raw: Its bytes of the text's UTF-8; None for a special token, which has no text.
        top: Most likely tokens, best first; includes the token itself, under its name in the answer.
    """

    token: str
    logprob: float
    raw: bytes | None
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass
class _Open:
    """A token whose text has not been sent yet: the next `size` bytes of the text."""

    token: int
    logprob: float
    top: list[tuple[int, TokenLogprob]]
    size: int = 0


class LogprobFormatter:
    """Formats the log-probabilities of an answer's outputs. A token is returned once all of its text has been sent.

    The text of several tokens is often known only together: the bytes of an emoji, invalid UTF-8, or text that might start a stop string.
    Each token gets its own bytes, and the characters that end in them. Tokens outside the answer (its end token, a stop string, leading
    whitespace of a chat) have no text.

    Args:
        text: The tokenizer.
        before: Tokens of the prompt, if the answer continues its text.
        trims: Whether the answer's leading whitespace is removed.
    """

    def __init__(self, text: Text, before: Sequence[int] = (), *, trims: bool = False) -> None:
        self._text, self._trims = text, trims
        self._stream = Stream(text, before)
        self._held: list[_Open] = []  # tokens whose text is not known yet
        self._open: deque[_Open] = deque()  # tokens whose text is known but not completely sent
        self._bytes = b""  # of the open tokens
        self._sent = 0  # of these, the bytes that have been sent
        self._characters = codecs.getincrementaldecoder("utf-8")()

    def push(self, out: Output) -> list[TokenLogprob]:
        """Return the tokens that are complete after this output's text."""
        piece = ""
        if out.token is not None and out.logprob is not None:
            self._held.append(_Open(out.token, out.logprob, [(token, self._rival(token, value)) for token, value in out.rivals]))
            piece = "" if out.token in self._text.ends else self._stream.push(out.token)
        if out.end:
            piece += self._stream.finish()
        if piece or out.end:
            self._share(piece)
        self._sent += len(out.text.encode())
        complete = []
        while self._open and (out.end or self._open[0].size <= self._sent):
            first = self._open.popleft()
            size = min(first.size, self._sent)  # smaller at the end if a stop string cuts it off
            part, self._bytes = self._bytes[:size], self._bytes[size:]
            self._sent -= size
            complete.append(self._complete(first, part))
        return complete

    def _share(self, piece: str) -> None:
        """Assign the bytes of a newly known text to the held tokens."""
        raw = [self._text.raw(held.token) for held in self._held]
        for held, size in zip(self._held, _sizes(raw, piece), strict=False):
            held.size = size
        self._open.extend(self._held)
        self._held.clear()
        self._bytes += piece.encode()
        if self._trims:
            lead = len(self._bytes) - len(self._bytes.decode().lstrip().encode())
            self._bytes, self._trims = self._bytes[lead:], lead == len(self._bytes)
            for token in self._open:
                cut = min(lead, token.size)
                token.size -= cut
                lead -= cut

    def _complete(self, token: _Open, part: bytes) -> TokenLogprob:
        name = self._characters.decode(part)
        top, taken = [], {name}
        for i, rival in token.top:
            if i == token.token:
                rival = TokenLogprob(name, rival.logprob, part)
            elif rival.token in taken:
                rival = TokenLogprob(f"token_id:{i}", rival.logprob, rival.raw)
            taken.add(rival.token)
            top.append(rival)
        return TokenLogprob(name, token.logprob, part, tuple(top))

    def _rival(self, token: int, logprob: float) -> TokenLogprob:
        if token in self._text.special:
            return TokenLogprob(self._text.name(token), logprob, None)
        raw = self._text.raw(token)
        if raw is None:
            raw = self._stream.peek(token).encode()
        try:
            return TokenLogprob(raw.decode(), logprob, raw)
        except UnicodeDecodeError:  # part of a character, in OpenAI's notation
            return TokenLogprob("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), logprob, raw)


def _sizes(raw: Sequence[bytes | None], piece: str) -> list[int]:
    """Number of bytes of a text that belong to each of its tokens; the last token gets the rest.

    Args:
        raw: Bytes of each token, if known.
        piece: The text, in which U+FFFD may replace invalid bytes.
    """
    whole, first = piece.encode(), raw[:-1]
    known = [part for part in first if part is not None]
    if len(known) == len(first):
        lossy = codecs.getincrementaldecoder("utf-8")("replace")
        # the text shows the bytes unchanged, or invalid UTF-8 replaced (byte-level decoders), or one U+FFFD per byte (byte fallback)
        for parts in (known, [lossy.decode(part).encode() for part in known], [_NO_CHARACTER.encode() * len(part) for part in known]):
            if whole.startswith(b"".join(parts)):
                return [*map(len, parts), len(whole) - sum(map(len, parts))]
    return [*(0 for _ in first), len(whole)]
