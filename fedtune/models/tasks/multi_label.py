"""Multi-label classification: any number of classes per text, scored by micro-F1."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Example, Score
from fedtune.errors import ConfigError, ModelError
from fedtune.models.tasks._rows import VectorTask

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedtune.config import Config

_BY_LABEL = ("dirichlet", "pathological", "prior")


class MultiLabel(VectorTask):
    """The head outputs one logit per class; a positive one predicts the class.

    The metrics are the loss (binary cross-entropy in nats, mean over the classes), micro_f1 (F1 of all decisions together), macro_f1 (mean
    F1 of the classes that occur in labels or predictions; both are 1 if there are none), and exact_match, the share of texts with exactly
    the right classes.
    """

    columns = {"text": "text", "labels": "classes"}
    metrics = {"micro_f1": True, "macro_f1": True, "exact_match": True}
    classes = True
    noun, gives = "a classifier", "labels"

    def check(self, config: "Config") -> None:
        if config.partition.kind in _BY_LABEL:
            raise ConfigError(
                f"partition.kind={config.partition.kind} splits rows by their label, but with task.kind={config.task.kind} a row has any"
                " number of labels: take natural, iid or size"
            )

    def outputs(self, labels: int) -> int:
        return labels

    def model_settings(self, outputs: int) -> dict[str, Any]:
        if outputs < 2:
            raise ModelError(f"a classifier needs at least 2 classes, but the data has {outputs}: see data.columns.labels")
        return {"num_labels": outputs, "problem_type": "multi_label_classification"}

    def vectors(self, rows: RowSet) -> "np.ndarray":
        import numpy as np

        return np.frombuffer(b"".join(rows["labels"][:]), np.uint8).reshape(len(rows), -1).astype(np.float32)

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is (true classes, predicted classes)."""
        found = self.scored(logits, targets)
        return [Score(loss, 1, (_ids(truth, 0.5), _ids(guesses, 0.0))) for loss, guesses, truth in found]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        labeled, guessed, hits = Counter[int](), Counter[int](), Counter[int]()
        for truth, guess in (s.detail for s in scores):
            labeled.update(truth)
            guessed.update(guess)
            hits.update(truth & guess)
        classes = labeled.keys() | guessed.keys()
        each = [2 * hits[c] / (labeled[c] + guessed[c]) for c in classes]
        return {
            "micro_f1": 2 * hits.total() / (labeled.total() + guessed.total()) if classes else 1.0,
            "macro_f1": math.fsum(each) / len(each) if classes else 1.0,
            "exact_match": sum(s.detail[0] == s.detail[1] for s in scores) / len(scores),
        }


def _ids(values: Sequence[float], above: float) -> set[int]:
    return {i for i, value in enumerate(values) if value > above}
