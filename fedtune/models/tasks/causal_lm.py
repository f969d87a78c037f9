"""Causal language modeling: predict the next token of a text, scored by perplexity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example, Score
from fedtune.errors import ConfigError
from fedtune.models.tasks._tokens import TokenTask, perplexity

if TYPE_CHECKING:
    from fedtune.config import Config


class CausalLM(TokenTask):
    """Every token of a text except its first is a target.

    The metrics are the loss (nats per token), the perplexity, and the number of tokens.
    """

    columns = {"text": "text"}
    drops_blank = ("text",)
    metrics = {"perplexity": False}
    encoder_decoder = False
    adapter_types = ("CAUSAL_LM",)

    def check(self, config: "Config") -> None:
        if config.data.source == "demo":
            raise ConfigError(
                "the demo rows are requests with answers: task.kind=causal_lm does not fit data=demo, take task=instruction or"
                " classification"
            )

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """Texts with end tokens: with `stride_texts` joined in order and split into blocks; otherwise one truncated text per example.

        A block of fewer than two tokens has no target and is dropped, so the list may be empty. With `keep_short` it becomes an example
        without a target, so that the number of examples does not disclose the length of a text.
        """
        import numpy as np

        from fedtune.data.examples import begin, end, filler, token_ids

        longest, lead, last = self.settings.max_length, begin(tokenizer), end(tokenizer)
        coded = [lead + ids + last if ids else [] for ids in token_ids(rows["text"][:], tokenizer)]
        if self.settings.stride_texts:
            joined = np.array([i for ids in coded for i in ids], np.int32)
            pieces = [joined[at : at + longest] for at in range(0, len(joined), longest)]
        else:
            pieces = [np.array(ids[:longest], np.int32) for ids in coded]
        silent = Example(np.full(2, filler(tokenizer), np.int32), np.full(2, IGNORED, np.int32))
        return [Example(ids, ids) if len(ids) >= 2 else silent for ids in pieces if keep_short or len(ids) >= 2]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        return {"perplexity": perplexity(loss), "tokens": float(sum(s.count for s in scores))}
