"""Base classes of tasks with one target per row, predicted by a head."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Example, Task

if TYPE_CHECKING:
    import numpy as np
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


class VectorTask(RowTask, abc.ABC):
    """A row's target has one number for each of the head's K outputs. The loss of a row is the mean over them, as in transformers.

    A subclass defines the targets of rows and the loss of each output.
    """

    @abc.abstractmethod
    def vectors(self, rows: RowSet) -> "np.ndarray":
        """(n, K) float32 targets."""

    @abc.abstractmethod
    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        """(N, K): the loss of each output."""

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """One truncated text per example, with the tokenizer's special tokens."""
        from fedtune.data.examples import whole_texts

        coded = whole_texts(rows["text"][:], tokenizer, self.settings.max_length, one_end=encoder_decoder)
        return [Example(ids, target) for ids, target in zip(coded, self.vectors(rows), strict=True)]

    def example_labels(self, ids: "Tensor", mask: "Tensor") -> "Tensor":
        """One number for each row, which `loss` repeats: a task does not know the number of classes."""
        import torch

        return torch.zeros(len(ids), device=ids.device)

    def loss(self, logits: "Tensor", targets: "Tensor", reduction: str) -> "Tensor":
        wanted = targets[:, None] if targets.ndim == 1 else targets  # `collate` makes (N,) of single numbers
        each = self.losses(logits, wanted.expand_as(logits)).mean(-1)
        return each.sum() if reduction == "sum" else each

    def scored(self, logits: "Tensor", targets: "Tensor") -> "Iterator[tuple[float, list[float], list[float]]]":
        """Each row's loss, outputs (K,) and targets (K,)."""
        return zip(self.loss(logits, targets, "none").tolist(), logits.tolist(), targets.view(len(logits), -1).tolist(), strict=True)
