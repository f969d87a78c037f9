"""Chat with a model. The cache keeps earlier turns, so they are not computed again."""

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from fedtune.config.bounds import require
from fedtune.errors import ConfigError, FedtuneError
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation, Report, Speculation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.text import Text
from fedtune.inference.generate import StrippedWriter, falls_back, open_context, open_speculation, read_card, wrap

__all__ = ["EngineWriter", "Conversation", "chat"]

LENGTH = 256  # default length of an answer, in tokens


class AnswerWriter(Protocol):
    """Generates the answers of a conversation: `EngineWriter`, or `SequentialScheduler` with transformers.

    Attributes:
        text: The model's tokenizer.
        limit: Maximum number of tokens of a prompt with its answer.
        single: Whether each request is independent, without earlier turns.
    """

    @property
    def text(self) -> Text: ...
    @property
    def limit(self) -> int: ...
    @property
    def single(self) -> bool: ...
    def write(self, ids: Sequence[int], sampling: Sampling, length: int) -> Generator[str, None, None]: ...


class EngineWriter:
    """Answers with the engine, whose cache keeps earlier turns.

    Args:
        context: An empty context of the engine.
        speculation: None decodes without speculation.

    Attributes:
        report: Figures of the last answer.
    """

    single = False

    def __init__(self, context: Context, speculation: Speculation | None = None) -> None:
        self._context, self._speculation = context, speculation
        self.text: Text = context.engine.text
        self.limit = context.cache.limit - context.virtual
        self.report = Report()

    def write(self, ids: Sequence[int], sampling: Sampling, length: int) -> Generator[str, None, None]:
        """Generate like `Generation`; yields only text."""
        run = Generation(self._context.engine, ids, sampling, length, context=self._context, speculation=self._speculation)
        self.report = run.report
        for piece in run:
            yield piece.text


class Conversation:
    """A conversation.

    Turns are formatted with the model's chat template. Without one, they are joined as plain text: each request, in the run's prompt
    template if there is one, and its answer. The oldest turns are dropped when the context is full.

    Args:
        writer: Generates the answers.
        sampling: Sampling settings.
        length: Longest answer, in tokens.
        prompt: The run's prompt template; None if it has none.
        system: The system message.

    Attributes:
        messages: The conversation so far: {"role", "content"}.
        forgotten: Number of turns dropped because the context was full.

    Raises:
        ConfigError: `system` without a chat template.
    """

    def __init__(
        self, writer: AnswerWriter, sampling: Sampling, length: int, *, prompt: str | None = None, system: str | None = None
    ) -> None:
        self._writer, self._sampling, self._length = writer, sampling, length
        self._prompt, self._text = prompt, writer.text
        if system is not None and self._text.template is None:
            raise ConfigError("the model has no chat template, so it takes no system message: leave it out")
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0

    def answer(self, request: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece. If the caller stops early, the pieces so far are the answer.

        Raises:
            ConfigError: The request does not fit into the context.
        """
        asked, limit = {"role": "user", "content": request}, self._writer.limit
        if self._writer.single:
            self.messages = []
        while True:
            ids = self._encode([*self.messages, asked])
            room = limit - len(ids)
            if room >= min(self._length, limit // 4) or not self.messages:
                break
            self.messages = self.messages[2:]
            self.forgotten += 1
        parts: list[str] = []
        with closing(self._writer.write(ids, self._sampling, max(1, min(self._length, room)))) as pieces:
            try:
                for text in pieces:
                    parts.append(text)
                    yield text
            finally:
                if parts:  # else the request was refused
                    self.messages += [asked, {"role": "assistant", "content": "".join(parts)}]

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._text.template is not None:
            return self._text.encode(self._text.chat([*self._system, *messages]), begin=False)
        turns = zip(messages[::2], [*(m["content"] for m in messages[1::2]), ""], strict=True)
        return self._text.encode("\n".join(wrap(asked["content"], self._prompt) + answer for asked, answer in turns))


def chat(
    folder: Path,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    kind: str | None = None,
    kv_budget: str | None = None,
    speculate: str = "auto",
    draft: Path | None = None,
    adapter: str | None = None,
    read: IO[str] | None = None,
    write: IO[str] | None = None,
    **sampling: Any,
) -> int:
    """Answer each line of `read` (stdin) on `write` (stdout) until it ends; other arguments as in `generate_text`.

    On a terminal, a prompt is printed to stderr. Ctrl-C stops an answer, and does nothing between answers. A failed request is reported on
    stderr and the chat continues. In a pipe, the answer to a failed request or an empty line is an empty line.

    Returns:
        Number of failed requests; 0 on a terminal.

    Raises:
        ConfigError: An option is out of range, or is not available with transformers.
        ModelError: The folder cannot be loaded.
    """
    source, out, folder = read or sys.stdin, write or sys.stdout, Path(folder)
    card = read_card(folder)
    length = max_new_tokens if max_new_tokens is not None else card.get("max_new_tokens") or LENGTH
    require("max_new_tokens", length, ge=1)
    chosen = Sampling(**sampling)
    guesses = None if speculate in ("auto", "none") else speculate
    writer: AnswerWriter
    if falls_back(folder, card, kind=kind, kv_budget=kv_budget, draft=draft, adapter=adapter, speculate=guesses):
        from fedtune.inference.generate_transformers import load_model  # late: it loads transformers
        from fedtune.inference.sequential import SequentialScheduler

        writer = SequentialScheduler(load_model(folder, card))
    else:
        engine = load_engine(folder, kind)
        context = open_context(engine, kv_budget, adapter)
        writer = EngineWriter(context, open_speculation(engine, speculate, draft))
    conversation = Conversation(writer, chosen, length, prompt=card.get("prompt"), system=system)
    failed, terminal = 0, source.isatty()
    for line in _lines(source):
        if not line:
            print(file=out, flush=True)
            continue
        forgotten = conversation.forgotten
        try:
            with _interruptible() as interrupted:
                stripped = StrippedWriter(out)
                with closing(conversation.answer(line)) as answer:
                    for text in answer:
                        stripped.write(text)
                        if interrupted:
                            break
        except FedtuneError as bad:
            print(f"fedtune: {bad}", file=sys.stderr)
            if not terminal:
                failed += 1
                print(file=out, flush=True)
            continue
        print(file=out, flush=True)
        if conversation.forgotten > forgotten:
            print(f"fedtune: the context is full: the first {conversation.forgotten} turns are dropped", file=sys.stderr)
    return failed


def _lines(read: IO[str]) -> Iterator[str]:
    """Yield requests. On a terminal, print a prompt, skip empty lines, and restart the line on Ctrl-C."""
    terminal = read.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = read.readline()
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nfedtune: Ctrl-D ends the chat", file=sys.stderr)
            continue
        if not line:
            return
        if line.strip() or not terminal:
            yield line.strip()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yield a list that is empty until Ctrl-C is pressed.

    The signal handler only appends to it, so that no forward pass is interrupted and the cache stays consistent.
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
