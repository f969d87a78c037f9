"""Talk to a model, turn by turn; what the cache holds of the turns before is not computed again."""

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from fedtune.errors import ConfigError, FedtuneError
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import Generation, Report, Speculation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.shape import Unsupported
from fedtune.inference.generate import Stripped, engine_cannot, open_context, open_speculation, read_card, wrap

__all__ = ["Talk", "talk"]

LENGTH = 256  # tokens of an answer where neither the caller nor the run says


class Talk:
    """A conversation.

    Turns go through the model's chat template. Where it has none, the text so far goes on: each request in the run's prompt template, where
    it has one, and the answer after it. The oldest turns are forgotten when the context is full.

    Args:
        context: Empty; its engine answers.
        sampling: How to draw.
        length: Longest answer in tokens.
        prompt: The run's prompt template.
        system: What the model is told first.
        speculation: None decodes plainly.

    Attributes:
        messages: {"role", "content"} so far.
        forgotten: Turns that the context had no room for any more.
        report: Figures of the last answer.

    Raises:
        ConfigError: `system` without a chat template.
    """

    def __init__(
        self,
        context: Context,
        sampling: Sampling,
        length: int,
        *,
        prompt: str | None = None,
        system: str | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._context, self._sampling, self._length = context, sampling, length
        self._text = context.engine.text
        self._prompt, self._speculation = prompt, speculation
        if system is not None and self._text.template is None:
            raise ConfigError("the model has no chat template, so there is no place for a system message: leave it out")
        self._system = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self.report = Report()

    def answer(self, request: str) -> Generator[str, None, None]:
        """The answer, piece by piece; stop whenever: what has come so far is what was said.

        Raises:
            ConfigError: The request does not fit into the context.
        """
        asked = {"role": "user", "content": request}
        while True:
            ids = self._encode([*self.messages, asked])
            room = self._context.cache.limit - self._context.virtual - len(ids)
            if room >= min(self._length, self._context.cache.limit // 4) or not self.messages:
                break
            self.messages = self.messages[2:]
            self.forgotten += 1
        run = Generation(
            self._context.engine,
            ids,
            self._sampling,
            max(1, min(self._length, room)),
            context=self._context,
            speculation=self._speculation,
        )
        self.report = run.report
        said: list[str] = []
        try:
            for piece in run:
                said.append(piece.text)
                yield piece.text
        finally:
            self.messages += [asked, {"role": "assistant", "content": "".join(said)}]

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self._text.template is not None:
            return self._text.encode(self._text.chat([*self._system, *messages]), begin=False)
        turns = zip(messages[::2], [*(m["content"] for m in messages[1::2]), ""], strict=True)
        return self._text.encode("\n".join(wrap(asked["content"], self._prompt) + said for asked, said in turns))


def talk(
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

    A terminal gets a prompt, on stderr. Ctrl-C ends an answer, and does nothing between answers. A request that cannot be answered is told
    on stderr, and the talk goes on; in a pipe, it and an empty line have an empty line for an answer.

    Returns:
        How many requests of a pipe could not be answered.

    Raises:
        ConfigError: An option is out of range.
        Unsupported: The engine does not run the model.
        ModelError: The folder cannot be loaded.
    """
    source, out, folder = read or sys.stdin, write or sys.stdout, Path(folder)
    card = read_card(folder)
    length = max_new_tokens if max_new_tokens is not None else card.get("max_new_tokens") or LENGTH
    if length < 1:
        raise ConfigError(f"max_new_tokens={length} is out of range: it must be at least 1")
    chosen = Sampling(**sampling)
    if why := engine_cannot(folder, card):
        raise Unsupported(f"{folder} cannot chat: {why}; `fedtune generate` answers single requests")
    engine = load_engine(folder, kind)
    context = open_context(engine, kv_budget, adapter)
    speculation = open_speculation(engine, speculate, draft)
    conversation = Talk(context, chosen, length, prompt=card.get("prompt"), system=system, speculation=speculation)
    failed, terminal = 0, source.isatty()
    for line in _lines(source):
        if not line:
            print(file=out, flush=True)
            continue
        forgotten = conversation.forgotten
        try:
            with _interruptible() as interrupted:
                stripped = Stripped(out)
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
            print(f"fedtune: the context is full: {conversation.forgotten} of the first turns are forgotten", file=sys.stderr)
    return failed


def _lines(read: IO[str]) -> Iterator[str]:
    """Requests, a terminal's without empty ones; it is prompted, and Ctrl-C there begins the line again."""
    terminal = read.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = read.readline()
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nfedtune: Ctrl-D ends the talk", file=sys.stderr)
            continue
        if not line:
            return
        if line.strip() or not terminal:
            yield line.strip()


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that is not empty any more once Ctrl-C was pressed.

    The handler only takes note, so that no pass of the model is cut off in the middle and the cache stays sound.
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
