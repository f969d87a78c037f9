"""Log-probabilities in words: the tokens of an answer join to its text, and their bytes to the text's UTF-8."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.inference.engine.jobs import Output
from fedtune.inference.engine.text import Stream, Text

_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and the best rivals of one of an answer.

    Args:
        token: The characters that it completes, in an answer; the name of a rival, which no other rival of the same place has.
        logprob: Natural logarithm.
        raw: Its bytes of the text's UTF-8; None for a special token, which adds nothing to a text.
        top: Best first; the token itself under the name that it has in the answer.
    """

    token: str
    logprob: float
    raw: bytes | None
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass
class _Open:
    """A token whose text is not out yet: it is the next `size` bytes of the text."""

    token: int
    logprob: float
    top: list[tuple[int, TokenLogprob]]
    size: int = 0


class Teller:
    """Puts the log-probabilities of an answer's outputs into words; a token is told as soon as all of its text is out.

    The text of several tokens is often certain only together: the bytes of an emoji, a run of bytes that turns out to be no UTF-8, or text
    that might begin a stop string. Each token gets the bytes that are its own, and the characters that end in them. What is not part of the
    answer (its end token, a stop string, leading white space of a chat) leaves its tokens without text.

    Args:
        text: The tokenizer.
        before: Tokens of the prompt, where the answer's text goes on from it.
        trims: The white space that the answer begins with is left out.
    """

    def __init__(self, text: Text, before: Sequence[int] = (), *, trims: bool = False) -> None:
        self._text, self._trims = text, trims
        self._stream = Stream(text, before)
        self._held: list[_Open] = []  # tokens whose text is not certain
        self._open: deque[_Open] = deque()  # tokens whose text is certain and not all out
        self._bytes = b""  # of the open tokens
        self._sent = 0  # of these, bytes that are out
        self._characters = codecs.getincrementaldecoder("utf-8")()

    def push(self, out: Output) -> list[TokenLogprob]:
        """The tokens that can be told once the text of this output is out."""
        piece = ""
        if out.token is not None and out.logprob is not None:
            self._held.append(_Open(out.token, out.logprob, [(token, self._rival(token, value)) for token, value in out.rivals]))
            piece = "" if out.token in self._text.ends else self._stream.push(out.token)
        if out.end:
            piece += self._stream.finish()
        if piece or out.end:
            self._share(piece)
        self._sent += len(out.text.encode())
        told = []
        while self._open and (out.end or self._open[0].size <= self._sent):
            first = self._open.popleft()
            size = min(first.size, self._sent)  # at the end, less where a stop string cuts it off
            part, self._bytes = self._bytes[:size], self._bytes[size:]
            self._sent -= size
            told.append(self._tell(first, part))
        return told

    def _share(self, piece: str) -> None:
        """Give the held tokens their bytes of a text that has become certain."""
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

    def _tell(self, token: _Open, part: bytes) -> TokenLogprob:
        said = self._characters.decode(part)
        top, taken = [], {said}
        for i, rival in token.top:
            if i == token.token:
                rival = TokenLogprob(said, rival.logprob, part)
            elif rival.token in taken:
                rival = TokenLogprob(f"token_id:{i}", rival.logprob, rival.raw)
            taken.add(rival.token)
            top.append(rival)
        return TokenLogprob(said, token.logprob, part, tuple(top))

    def _rival(self, token: int, logprob: float) -> TokenLogprob:
        if token in self._text.special:
            return TokenLogprob(self._text.name(token), logprob, None)
        raw = self._text.raw(token)
        if raw is None:
            raw = self._stream.peek(token).encode()
        try:
            return TokenLogprob(raw.decode(), logprob, raw)
        except UnicodeDecodeError:  # part of a character, as OpenAI writes it
            return TokenLogprob("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), logprob, raw)


def _sizes(raw: Sequence[bytes | None], piece: str) -> list[int]:
    """How many bytes of a text belong to each of its tokens; the last one gets what the others leave.

    Args:
        raw: Bytes of each token, where they are known.
        piece: The text, in which U+FFFD may stand for bytes that are no character.
    """
    whole, first = piece.encode(), raw[:-1]
    known = [part for part in first if part is not None]
    if len(known) == len(first):
        lossy = codecs.getincrementaldecoder("utf-8")("replace")
        # as they are; as UTF-8 with its faults replaced, which byte-level decoders do; one replacement a byte, which a byte fallback does
        for parts in (known, [lossy.decode(part).encode() for part in known], [_NO_CHARACTER.encode() * len(part) for part in known]):
            if whole.startswith(b"".join(parts)):
                return [*map(len, parts), len(whole) - sum(map(len, parts))]
    return [*(0 for _ in first), len(whole)]
