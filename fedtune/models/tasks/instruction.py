"""Instruction tuning: an answer to a prompt, scored by exact match of the greedily generated answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.contracts.task import IGNORED, Example, Score
from fedtune.errors import ConfigError, DataError
from fedtune.models.tasks._tokens import TokenTask, perplexity

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from fedtune.config import Config


class Instruction(TokenTask):
    """The answer's tokens and its end token are the targets.

    The metrics are the loss (nats per token) and the perplexity of the answers, and with `task.generate` exact_match: the share of
    generated answers that equal the reference, ignoring leading and trailing white space.
    """

    columns = {"prompt": "text", "answer": "text"}
    columns_hint = " or the templates data.prompt and data.answer"
    metrics = {"exact_match": True, "perplexity": False}
    prompted = True
    adapter_types = ("SEQ_2_SEQ_LM",)

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

    def encode(self, rows: "datasets.Dataset", tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """Prompt, answer, end token. If they are too long, the prompt is truncated from its start, down to one token, and then the answer
        from its end.

        For an encoder-decoder, prompt and answer each have up to `max_length` tokens and an end token.

        Raises:
            DataError: An answer has no tokens.
        """
        from fedtune.data.examples import begin, end, filler, token_ids

        lead, last, longest = begin(tokenizer), end(tokenizer), self.settings.max_length
        prompts, texts, out = token_ids(rows["prompt"][:], tokenizer), rows["answer"][:], []
        for text, prompt, answer in zip(texts, prompts, token_ids(texts, tokenizer), strict=True):
            answer = (answer + last)[: longest if encoder_decoder else longest - 1]
            if not answer:
                raise DataError("an answer is empty and the tokenizer has no end token, so the row has no target: remove such rows")
            if encoder_decoder:
                room = longest - len(lead) - len(last)
                prompt = lead + prompt[max(0, len(prompt) - room) :] + last or [filler(tokenizer)]
            else:
                room = longest - len(answer)
                kept = lead[: room - 1] if prompt else lead
                prompt = kept + prompt[max(0, len(prompt) - (room - len(kept))) :] or [filler(tokenizer)]
            out.append(_example(prompt, answer, text, encoder_decoder=encoder_decoder))
        return out

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is whether the generated answer is correct; None if this requires generation."""
        scores = super().score(logits, targets, sizes, examples, tokenizer)
        if not self.answer_tokens:
            return scores
        guesses, wanted, parts = logits.argmax(-1), targets, list(sizes)
        rows = zip(scores, guesses.split(parts), wanted.split(parts), examples, strict=True)
        return [
            replace(score, detail=verdict(guess.tolist(), answer.tolist(), example.answer, tokenizer, self.answer_tokens))
            for score, guess, answer, example in rows
        ]

    def settle(
        self, model: Any, tokenizer: Any, examples: Sequence[Example], scores: Sequence[Score], *, batch_size: int
    ) -> Sequence[Score]:
        from fedtune.models.evaluation import generate_answers

        unsure = [i for i, s in enumerate(scores) if s.detail is None] if self.answer_tokens else []
        answers = generate_answers(model, tokenizer, [examples[i] for i in unsure], self.settings, batch_size=batch_size)
        out = list(scores)
        for i, answer in zip(unsure, answers, strict=True):
            out[i] = replace(out[i], detail=answer == examples[i].answer.strip())
        return out

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        out = {"perplexity": perplexity(loss)}
        if self.answer_tokens:
            out["exact_match"] = sum(s.detail for s in scores) / len(scores)
        return out


def _example(prompt: list[int], answer: list[int], text: str, *, encoder_decoder: bool) -> Example:
    import numpy as np

    if encoder_decoder:  # the first label is a placeholder for the decoder's start token
        return Example(np.array(prompt, np.int32), np.array([IGNORED, *answer], np.int32), len(prompt), text)
    ids = np.array(prompt + answer, np.int32)
    labels = ids.copy()
    labels[: len(prompt)] = IGNORED
    return Example(ids, labels, len(prompt), text)


def verdict(guesses: list[int], wanted: list[int], answer: str, tokenizer: Any, max_new_tokens: int) -> bool | None:
    """Whether greedy generation gives the answer, if one forward pass over the reference determines this; None if it does not.

    Generation follows the reference up to the first token that differs. If the text with this token is still a prefix of the answer (with
    another tokenization), only generation can tell. Otherwise no later token can correct it. So most rows need no generation.

    Args:
        guesses: Argmax at each target, given the reference before it.
        wanted: The reference: the answer's tokens and the end-of-sequence token.
        answer: The reference as text.
        tokenizer: Decodes tokens; its `eos_token_id` ends an answer.
        max_new_tokens: Largest number of generated tokens.
    """
    end, wish = tokenizer.eos_token_id, answer.strip()
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
