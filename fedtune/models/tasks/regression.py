"""Regression: a number for each text, or several, scored by the mean absolute error."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import Example, Score
from fedtune.errors import ConfigError
from fedtune.models.tasks._rows import VectorTask

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedtune.config import Config


class Regression(VectorTask):
    """The head gives `task.outputs` numbers.

    The metrics are the loss (mean squared error), mae (mean absolute error), and r2 and pearson: the means over the outputs of
    1 - Σ(ŷ - y)² / Σ(y - ȳ)² and of the correlation. They are left out where they are not defined: if an output's targets are all equal,
    or, for pearson, its predictions.
    """

    columns = {"text": "text", "target": "numbers"}
    metrics = {"mae": False, "r2": True, "pearson": True}
    noun, gives = "a regressor", "numbers"

    def check(self, config: "Config") -> None:
        if config.data.source == "demo":
            raise ConfigError("the demo rows have no numbers: task.kind=regression needs rows of your own, with data=local or data=hub")

    def outputs(self, labels: int) -> int:
        return self.settings.outputs

    def model_settings(self, outputs: int) -> dict[str, Any]:
        return {"num_labels": outputs, "problem_type": "regression"}

    def vectors(self, rows: RowSet) -> "np.ndarray":
        import numpy as np

        return np.array(rows["target"][:], np.float32).reshape(len(rows), self.settings.outputs)

    def losses(self, logits: "Tensor", targets: "Tensor") -> "Tensor":
        return (logits - targets).square()

    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """`detail` is (outputs, targets)."""
        return [Score(loss, 1, (guesses, truth)) for loss, guesses, truth in self.scored(logits, targets)]

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        import numpy as np

        guesses, truth = (np.array([s.detail[i] for s in scores], np.float64) for i in (0, 1))
        out = {"mae": float(np.abs(guesses - truth).mean())}
        off, spread, own = (np.square(x).sum(0) for x in (guesses - truth, truth - truth.mean(0), guesses - guesses.mean(0)))
        if (spread > 0).all():
            out["r2"] = float((1 - off / spread).mean())
            if (own > 0).all():
                common = ((guesses - guesses.mean(0)) * (truth - truth.mean(0))).sum(0)
                out["pearson"] = float((common / np.sqrt(spread * own)).mean())
        return {name: value for name, value in out.items() if math.isfinite(value)}
