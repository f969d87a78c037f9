"""Base class of tasks with one target per row, predicted by a head."""

import abc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedtune.contracts.task import Example, Task

if TYPE_CHECKING:
    from torch import Tensor


class RowTask(Task, abc.ABC):
    """A subclass defines its columns, its head's outputs, its loss and its metrics."""

    head = True
    gives_text = False

    def most_targets(self, length: int) -> int:
        return 1

    def auto_class(self, encoder_decoder: bool) -> str:
        return "AutoModelForSequenceClassification"

    def peft_type(self, encoder_decoder: bool) -> str:
        return "SEQ_CLS"

    def example_labels(self, ids: "Tensor", mask: "Tensor") -> "Tensor":
        return ids.new_zeros(len(ids))

    def count(self, example: Example) -> int:
        return 1

    def counts(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        return batch["attention_mask"].new_ones(len(batch["labels"]), 1).bool()

    def targets(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        return batch["labels"][:, None]

    def inputs(self, model: Any, batch: "Mapping[str, Tensor]") -> "dict[str, Any]":
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def logits(self, model: Any, call: Callable[..., Any], places: int, choose: "Callable[[Tensor], Tensor]") -> "Tensor":
        return call().logits
