"""Base class of tasks whose targets are tokens, predicted by the model's output layer from the tokens before them."""

import abc
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.task import IGNORED, Example, Score, Task
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import TaskConfig


class TokenTask(Task, abc.ABC):
    """A subclass defines its columns, and which tokens of a row are targets.

    The P positions of a row are those of its labels, except the first, because no token precedes it.
    """

    head = False
    gives_text = True
    packs = True
    cross_entropy = True

    def outputs(self, labels: int) -> int:
        return 0

    def most_targets(self, length: int) -> int:
        return max(1, length - 1)

    def auto_class(self, encoder_decoder: bool) -> str:
        return "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"

    def peft_type(self, encoder_decoder: bool) -> str:
        return "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"

    def example_labels(self, ids: "Tensor", mask: "Tensor") -> "Tensor":
        return ids.masked_fill(mask == 0, IGNORED)

    def count(self, example: Example) -> int:
        return int((example.labels[1:] != IGNORED).sum())

    def counts(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        return batch["labels"][:, 1:] != IGNORED

    def targets(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        return batch["labels"][:, 1:]

    def silence(self, batch: "dict[str, Tensor]", examples: "Tensor") -> None:
        batch["labels"][examples.repeat_interleave(self.sequences)] = IGNORED

    def decoder_mask(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        return batch["labels"] != IGNORED

    def inputs(self, model: Any, batch: "Mapping[str, Tensor]") -> "dict[str, Any]":
        from torch.nn.functional import pad

        if "position_ids" in batch:  # packed: without a mask, transformers lets no token attend across a restart of the positions
            return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        out = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # the decoder's input is its start token and the answer
            shifted = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            out["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(shifted)
        return out

    def logits(self, model: Any, call: Callable[..., Any], places: int, choose: "Callable[[Tensor], Tensor]") -> "Tensor":
        """Logits only at the chosen positions: for a large vocabulary, the output layer's product and its float32 logits for prompts and
        padding would cost more than the backbone. Drops virtual tokens before the sequence and the last position, whose next token is
        unknown."""
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: (choose(args[0][:, -places - 1 : -1]),))
        try:
            return call(use_cache=False).logits
        finally:
            hook.remove()

    def loss(self, logits: "Tensor", targets: "Tensor", reduction: str) -> "Tensor":
        """Cross-entropy in nats."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets, reduction=reduction)

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        each = self.loss(logits, targets, "none")
        return [Score(losses.sum().item(), len(losses)) for losses in each.split(list(sizes))]


def check_date(settings: "TaskConfig") -> None:
    """Raises ConfigError if `task.date`, which chat templates print, is not a date."""
    try:
        datetime.date.fromisoformat(settings.date)
    except ValueError:
        raise ConfigError(f"task.date={settings.date} is not a date: write YYYY-MM-DD, such as 2026-01-01") from None


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, capped at a loss of 700, because a float overflows at 709.8."""
    return math.exp(min(loss, 700.0))
