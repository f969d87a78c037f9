"""Base class of tasks whose rows end with an answer that the model generates."""

import abc
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedtune.contracts.task import Example, Score
from fedtune.errors import ConfigError
from fedtune.models.tasks._tokens import TokenTask, perplexity

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config


@dataclass(frozen=True, slots=True)
class Graded:
    """The grade of one generated answer.

    Args:
        exact: Whether it equals the reference, ignoring leading and trailing white space.
        f1: F1 of its words and the reference's; None if overlap is not measured.
        rouge: ROUGE-L, the F1 of their longest common subsequence of words; None if overlap is not measured.
    """

    exact: bool
    f1: float | None = None
    rouge: float | None = None


class AnswerTask(TokenTask, abc.ABC):
    """A subclass defines its columns and its encoding; the tokens after an example's prompt are its answer.

    The metrics are the loss (nats per token) and the perplexity of the answers; with `task.generate` exact_match, the share of generated
    answers that equal the reference; and with `task.overlap` token_f1 and rouge_l, the means over the answers. Words are runs of letters,
    digits and underscores, in lower case.

    Sources: Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250 (token F1; here articles count); Lin 2004, ROUGE.
    """

    metrics = {"exact_match": True, "token_f1": True, "rouge_l": True, "perplexity": False}
    prompted = True

    def check(self, config: "Config") -> None:
        t = self.settings
        if t.max_new_tokens >= t.max_length:
            raise ConfigError(f"task.max_new_tokens={t.max_new_tokens} leaves no room for a prompt in task.max_length={t.max_length}")

    @property
    def primary(self) -> tuple[str, bool]:
        name = "exact_match" if self.settings.generate else "perplexity"
        return name, self.metrics[name]

    @property
    def answer_tokens(self) -> int:
        return self.settings.max_new_tokens if self.settings.generate else 0

    def usual_targets(self, length: int) -> int:
        return min(length - 1, self.settings.max_new_tokens)

    def answer_length(self, example: Example) -> int:
        """Number of targets at the end of the example that are its answer."""
        return self.count(example)

    def answer_end(self, tokenizer: Any) -> int | None:
        """The token that ends an answer."""
        return tokenizer.eos_token_id

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is a `Graded`; None if this requires generation."""
        scores = super().score(logits, targets, sizes, examples, tokenizer)
        if not self.answer_tokens:
            return scores
        guesses, wanted, parts, end = logits.argmax(-1), targets, list(sizes), self.answer_end(tokenizer)
        out = []
        for score, guess, answer, example in zip(scores, guesses.split(parts), wanted.split(parts), examples, strict=True):
            last = len(answer) - self.answer_length(example)
            right = verdict(guess[last:].tolist(), answer[last:].tolist(), example.answer, tokenizer, self.answer_tokens, end)
            known = right is not None and (right or not self.settings.overlap)  # the words of a wrong answer must be generated
            out.append(replace(score, detail=self._grade(example.answer if right else None, example.answer) if known else None))
        return out

    def settle(
        self, model: Any, tokenizer: Any, examples: Sequence[Example], scores: Sequence[Score], *, batch_size: int
    ) -> Sequence[Score]:
        from fedtune.models.evaluation import generate_answers

        unsure = [i for i, s in enumerate(scores) if s.detail is None and s.count] if self.answer_tokens else []
        answers = generate_answers(model, tokenizer, [examples[i] for i in unsure], self.settings, batch_size=batch_size)
        out = list(scores)
        for i, answer in zip(unsure, answers, strict=True):
            out[i] = replace(out[i], detail=self._grade(answer, examples[i].answer))
        return out

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        out = {"perplexity": perplexity(loss)}
        if self.answer_tokens:
            grades: list[Graded] = [s.detail for s in scores if s.count]
            out["exact_match"] = sum(g.exact for g in grades) / len(grades)
            if self.settings.overlap:
                out["token_f1"] = math.fsum(g.f1 or 0.0 for g in grades) / len(grades)
                out["rouge_l"] = math.fsum(g.rouge or 0.0 for g in grades) / len(grades)
        return out

    def _grade(self, answer: str | None, reference: str) -> Graded:
        """The grade of an answer; None is a wrong answer whose text is not known."""
        exact = answer is not None and answer.strip() == reference.strip()
        if not self.settings.overlap:
            return Graded(exact)
        return Graded(True, 1.0, 1.0) if exact else Graded(False, token_f1(answer or "", reference), rouge_l(answer or "", reference))


def token_f1(answer: str, reference: str) -> float:
    """2·shared / (words of both), counting repeated words; 1 if neither has a word."""
    one, two = _words(answer), _words(reference)
    shared = sum((Counter(one) & Counter(two)).values())
    return 2 * shared / (len(one) + len(two)) if one or two else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F1 of the words; 1 if neither has a word."""
    from rouge_score.rouge_scorer import RougeScorer

    if not _words(answer) and not _words(reference):
        return 1.0
    return RougeScorer(["rougeL"], tokenizer=_Words()).score(reference, answer)["rougeL"].fmeasure


class _Words:
    """A tokenizer for rouge_score, whose own drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def verdict(guesses: list[int], wanted: list[int], answer: str, tokenizer: Any, max_new_tokens: int, end: int | None) -> bool | None:
    """Whether greedy generation gives the answer, if one forward pass over the reference determines this; None if it does not.

    Generation follows the reference up to the first token that differs. If the text with this token is still a prefix of the answer (with
    another tokenization), only generation can tell. Otherwise no later token can correct it. So most rows need no generation.

    Args:
        guesses: Argmax at each target, given the reference before it.
        wanted: The reference: the answer's tokens and the end token.
        answer: The reference as text.
        tokenizer: Decodes tokens.
        max_new_tokens: Largest number of generated tokens.
        end: The token that ends an answer.
    """
    wish = answer.strip()
    if not wanted or len(wanted) > max_new_tokens or wanted[-1] != end:
        return None
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None  # such decoders change earlier text ("do n" → "don't"), so comparing prefixes is not reliable
    first = next((j for j, (g, w) in enumerate(zip(guesses, wanted, strict=True)) if g != w), None)
    if first is None or guesses[first] == end:
        return tokenizer.decode(wanted[: len(wanted) - 1 if first is None else first], skip_special_tokens=True).strip() == wish
    text = tokenizer.decode([*wanted[:first], guesses[first]], skip_special_tokens=True).lstrip()
    if wish.startswith(text) or text.rstrip() == wish or "\ufffd" in text:  # \ufffd: a partial character; the next token may complete it
        return None
    return False
