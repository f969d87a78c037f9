"""Generates an answer token by token, or several tokens per pass with speculative decoding."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedtune.config.bounds import require
from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.decoder import Decoder, linears_of
from fedtune.inference.engine.guess import best_of
from fedtune.inference.engine.sample import Sampler, Sampling, rate
from fedtune.inference.engine.speculate import Draft, Drafter
from fedtune.inference.engine.speculate.adapt import Adapt, Verified
from fedtune.inference.engine.text import StopStrings, Stream

if TYPE_CHECKING:
    from fedtune.inference.engine.load import Engine

# Two scores that are closer than this fraction of the largest may change their order between a pass over several tokens and plain decoding.
# It is four rounding steps of the least precise operand of a kind's products. float32 sums in another order differ too little to matter.
ROUNDING = {"fp32": 0.0, "bf16": 2**-6, "int8": 2**-5, "int4": 2**-5}  # int4 has 8-bit activations too, by the native kernels


@dataclass(frozen=True, slots=True)
class Piece:
    """The output for one token of an answer.

    Args:
        token: Its id.
        text: Final text; may be empty.
        logprob: The token's log-probability (natural) under the unmodified model; None unless requested.
        rivals: The requested number of most likely tokens and their log-probabilities, best first.
        end: Why the answer ends here: "stop" (an end token or a stop string) or "length"; None if it continues.
    """

    token: int
    text: str
    logprob: float | None = None
    rivals: tuple[tuple[int, float], ...] = ()
    end: Literal["stop", "length"] | None = None


@dataclass
class Report:
    """Statistics of an answer; seconds on the given clock.

    Attributes:
        prompt: Tokens of the prompt.
        reused: Tokens of the prompt found in the context.
        tokens: Tokens of the answer.
        prefill_seconds, decode_seconds: Time to the first token, and after it.
        passes: Forward passes after the first token.
        drafted, accepted: Places of the answer for which draft tokens were verified, and places where one of them was accepted.
        draft_seconds: Part of decode_seconds spent on drafting.
        close: Positions of the answer decided by a verifying pass whose two best scores were closer than ROUNDING of the model's linears:
            only there may a greedy answer differ from plain decoding. Always empty in fp32.
    """

    prompt: int = 0
    reused: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    close: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """The accepted share of the drafted places; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def speed(self) -> float:
        """Tokens per second after the first token."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Speculation:
    """A drafter and the policy for the number of draft tokens. Reuse it between answers to keep its measurements."""

    drafter: Drafter
    adapt: Adapt = field(default_factory=Adapt)


class Generation:
    """A running answer: iterate over its pieces. You may stop early; the context stays consistent.

    Args:
        engine: The model.
        prompt: Text, encoded as in training, or tokens.
        sampling: Sampling settings.
        max_new_tokens: Longest answer; None continues until the context is full.
        context: The context of earlier turns; a prefix that it holds is not computed again. None creates one with a full cache.
        speculation: None decodes without speculation.
        logprobs: Return each token's log-probability and this many alternatives; None returns none.

    Other arguments:
        clock: Seconds; the number of draft tokens depends on it.

    Raises:
        ConfigError: The answer does not fit, or the prompt is empty.
        ModelError: A token id is out of range.
    """

    def __init__(
        self,
        engine: "Engine",
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = 64,
        *,
        context: Context | None = None,
        speculation: Speculation | None = None,
        logprobs: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.report = Report()
        self.context = context or Context(engine)
        self._sampling = sampling or Sampling()
        self._ids = engine.text.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not self._ids:
            raise ConfigError("the prompt has no tokens: give some text")
        vocabulary = engine.shape.vocab
        if wrong := [t for t in self._ids if not 0 <= t < vocabulary]:
            raise ModelError(f"token id {wrong[0]} is out of range 0..{vocabulary - 1}: the tokenizer does not match this model")
        virtual, limit = self.context.virtual, self.context.cache.limit
        length = limit - virtual - len(self._ids) if max_new_tokens is None else max_new_tokens
        require("max_new_tokens", max_new_tokens, ge=1)
        if length < 1 or virtual + len(self._ids) + length > limit:
            raise ConfigError(
                f"the prompt's {virtual + len(self._ids)} tokens and {max(length, 1)} new tokens exceed the model's context of {limit}:"
                " shorten one"
            )
        self._length = length
        self._speculation = speculation
        self._logprobs = logprobs
        self._clock = clock
        self._ends = engine.text.ends
        self._sampler = Sampler(self._sampling, self._ids, vocabulary)
        self._stream, self._stops = Stream(engine.text), StopStrings(self._sampling.stop)
        self._rounding = _rounding(engine.decoder)
        self._undo = self.context.cache.undo

    def __iter__(self) -> Iterator[Piece]:
        begun = self._clock()
        new = self._prefill()
        self.report.prefill_seconds = self._clock() - begun
        while True:
            for token, row in new:
                piece = self._piece(token, row)
                yield piece
                if piece.end:
                    return
            begun = self._clock()
            new = self._step()
            self.report.decode_seconds += self._clock() - begun

    def _prefill(self) -> list[tuple[int, np.ndarray]]:
        report, context = self.report, self.context
        report.prompt = len(self._ids)
        report.reused = context.rewind(self._ids)
        logits = context.run(self._ids[report.reused :])
        if self._speculation:
            self._speculation.drafter.begin(self._sampling, context)
        return [self._take(logits[0])]

    def _step(self) -> list[tuple[int, np.ndarray]]:
        """Run one pass. Returns the new tokens, each with its logits (V,)."""
        begun = self._clock()
        self.report.passes += 1
        unread = self._ids[len(self.context.ids) :]  # one token, or two after a fork was right
        speculation = self._speculation
        grade = speculation.drafter.grade(self._ids) if speculation else None
        if speculation and grade is not None:
            adapt, drafter, chances = speculation.adapt, speculation.drafter, speculation.drafter.gives_chances(grade)
            count = min(adapt.count(grade, chances), self._length - self._sampler.count - 1, self.context.remaining - len(unread))
            if self._undo is not None:
                count = min(count, self._undo - 1)
            if count > 0:
                draft = drafter.draft(self._ids, count, self._sampler.seen, adapt.least(grade) if chances else None)
                drafted = self._clock()
                self.report.draft_seconds += drafted - begun
                if draft.tokens:
                    out, seen = self._check(unread, draft, adapt.most_rows)
                    adapt.verified(seen, drafted - begun, self._clock() - drafted, grade)
                    return out
                if not draft.only_read:
                    adapt.refused(drafted - begun, grade)
        begun = self._clock()
        logits = self.context.run(unread)
        self._learn([tuple(self._ids[-2:])], logits)
        out = [self._take(logits[0])]
        if speculation:
            speculation.adapt.plain(self._clock() - begun, len(unread))
        return out

    def _check(self, unread: list[int], draft: Draft, most: int) -> tuple[list[tuple[int, np.ndarray]], Verified]:
        """Verify a draft in a pass of at most `most` tokens. Returns the accepted tokens and the one after them, each with its logits (V,),
        and what happened."""
        drafted, context, begun, kept = draft.tokens, self.context, len(self._ids), 0
        most_others = max(min(context.remaining, most) - len(unread) - len(drafted), 0)
        others = draft.others[:most_others] if context.takes_forks else []
        tokens, last = [*unread, *drafted, *(token for _, token in others)], len(unread) - 1
        text, out = [*self._ids[-2:], *drafted], list[tuple[int, np.ndarray]]()
        keys = [tuple(text[max(i - 2, 0) : i]) for i in range(len(text) - len(drafted), len(text) + 1)]
        try:
            logits = context.run(tokens, keep=len(tokens) - last, forks=[last + k for k, _ in others])
            self._learn([*keys, *((keys[k][-1], token) for k, token in others)], logits)
            for row, wanted in zip(logits, [*drafted, None], strict=False):
                out.append(self._take(row, verifies=True))
                if out[-1][0] != wanted:
                    break
            kept = len(out) - 1
            for other, row in zip(others, logits[len(drafted) + 1 :], strict=True):
                if other == (kept, out[kept][0]):
                    out.append(self._take(row, verifies=True))
        finally:  # after an error too, the context holds no token that is not in the text
            if len(context.ids) > begun + kept:
                context.crop(begun + kept)
        self.report.drafted += len(drafted)
        self.report.accepted += len(out) - 1
        return out, Verified(len(drafted), kept, len(tokens), len(out), draft.chances)

    def _learn(self, keys: list[tuple[int, ...]], logits: np.ndarray) -> None:
        if self._speculation and self._speculation.drafter.learns:
            self._speculation.drafter.learn(keys, best_of(self.context.engine.decoder, logits, self._sampling.sharpness))

    def _take(self, logits: np.ndarray, verifies: bool = False) -> tuple[int, np.ndarray]:
        """Choose the next token from logits (V,)."""
        if verifies and self._rounding and self._sampling.greedy:
            scores = self._sampler.scores(logits[None])[0]
            if np.count_nonzero(scores >= scores.max() - self._rounding * np.abs(scores).max()) > 1:
                self.report.close.append(self._sampler.count)
        token = self._sampler.next(logits)
        self._sampler.take(token)
        self._ids.append(token)
        return token, logits

    def _piece(self, token: int, row: np.ndarray) -> Piece:
        self.report.tokens += 1
        logprob, rivals = None, ()
        if self._logprobs is not None:
            logprob, rivals = rate(row, token, self._logprobs)
        end: Literal["stop", "length"] | None = None
        if token in self._ends:
            end, text = "stop", ""
        else:
            text = self._stops.push(self._stream.push(token))
            end = "stop" if self._stops.stopped else "length" if self.report.tokens >= self._length else None
        if end and not self._stops.stopped:
            text += self._stops.push(self._stream.finish())
            if self._stops.stopped:
                end = "stop"
            text += self._stops.finish()
        return Piece(token, text, logprob, rivals, end)


def _rounding(decoder: Decoder) -> float:
    return max(ROUNDING[linear.kind] for linear in linears_of(decoder))


def generate(engine: "Engine", prompt: str | Sequence[int], sampling: Sampling | None = None, max_new_tokens: int | None = 64) -> str:
    """Return the complete answer, decoded without speculation; see `Generation` for more options."""
    return "".join(piece.text for piece in Generation(engine, prompt, sampling, max_new_tokens))
