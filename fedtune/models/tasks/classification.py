"""Text classification: one class per text, scored by accuracy and macro-F1."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Example, Score
from fedtune.errors import ModelError
from fedtune.models.tasks._rows import RowTask

if TYPE_CHECKING:
    from torch import Tensor


class Classification(RowTask):
    """The head outputs one logit per class.

    The metrics are the loss (nats per text), the accuracy, and macro_f1, the mean F1 of the classes that occur in labels or predictions.
    """

    columns = {"text": "text", "label": "class"}
    metrics = {"accuracy": True, "macro_f1": True}
    classes = True
    cross_entropy = True
    noun, gives = "a classifier", "labels"
    adapter_types = ("SEQ_CLS",)

    def outputs(self, labels: int) -> int:
        return labels

    def model_settings(self, outputs: int) -> dict[str, Any]:
        if outputs < 2:
            raise ModelError(f"a classifier needs at least 2 classes, but the data has {outputs}: see data.columns.label")
        return {"num_labels": outputs, "problem_type": "single_label_classification"}

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """One truncated text per example, with the tokenizer's special tokens; the label is the class id."""
        import numpy as np

        from fedtune.data.examples import whole_texts

        coded = whole_texts(rows["text"][:], tokenizer, self.settings.max_length, one_end=encoder_decoder)
        return [Example(ids, np.array([label], np.int32)) for ids, label in zip(coded, rows["label"][:], strict=True)]

    def loss(self, logits: "Tensor", targets: "Tensor", reduction: str) -> "Tensor":
        """Cross-entropy in nats."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets, reduction=reduction)

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is (true class, predicted class)."""
        each, guesses = self.loss(logits, targets, "none"), logits.argmax(-1)
        found = zip(each.tolist(), targets.tolist(), guesses.tolist(), strict=True)
        return [Score(loss, 1, (label, guess)) for loss, label, guess in found]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        truth, guesses = [s.detail[0] for s in scores], [s.detail[1] for s in scores]
        hits = sum(g == t for g, t in zip(guesses, truth, strict=True))
        return {"accuracy": hits / len(scores), "macro_f1": macro_f1(truth, guesses)}


def macro_f1(truth: Sequence[int], guesses: Sequence[int]) -> float:
    """Mean of 2·hits / (labeled + guessed) over the classes that occur."""
    labeled, guessed = Counter(truth), Counter(guesses)
    hits = Counter(t for t, g in zip(truth, guesses, strict=True) if t == g)
    classes = labeled.keys() | guessed.keys()
    return math.fsum(2 * hits[c] / (labeled[c] + guessed[c]) for c in classes) / len(classes)
