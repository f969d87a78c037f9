"""Measures forgetting: the model's metrics on the test rows of the run that it started from, in every evaluated round.

Forgetting is the best earlier value of the primary metric minus the current one, so that more is worse (for a metric where lower is better,
such as perplexity, the current value minus the lowest). The first value is that of round 0, the start.

Source: Chaudhry et al. 2018, Riemannian Walk for Incremental Learning, arXiv:1801.10112, section 2.2, for one earlier task.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.clients.workspace import Workspace
from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import task_of
from fedtune.data import encode, load_test
from fedtune.data.local import has_files
from fedtune.errors import DataError
from fedtune.models.evaluation import score_examples
from fedtune.runs.report.summary import EARLIER, FORGETTING


class EarlierRows:
    """The earlier run's test rows, and the best value so far.

    Args:
        earlier: The earlier run's config. Its rows are read as that run read them; they must be on this machine, or on the hub.
        space: The run's workspace.
        records: The run's metrics so far, if it resumes.

    Raises:
        DataError, ConfigError: The rows are not on this machine, or cannot be read.
    """

    def __init__(self, earlier: Config, space: Workspace, records: Iterable[Mapping[str, Any]] = ()) -> None:
        data = earlier.data
        if task_of(earlier.task).needs_reference:
            raise DataError(f"the metrics of the earlier run '{earlier.name}' compare with the model that it started from")
        if data.source == "local" and not any(path and has_files(path) for path in (data.path, data.test_path)):
            raise DataError(f"the test rows of the earlier run '{earlier.name}' are not on this machine")
        rows = load_test(earlier).test
        if not len(rows):
            raise DataError(f"the earlier run '{earlier.name}' has no test rows")
        backbone, self._space, self._task, self._batch = space.backbone, space, earlier.task, earlier.eval.batch_size
        self._examples = encode(rows, np.arange(len(rows)), backbone.tokenizer, earlier.task, seq2seq=backbone.seq2seq)
        name, self._higher = task_of(earlier.task).primary
        self._metric = EARLIER + name
        self._values = [float(v) for r in records if r.get("client") is None and isinstance(v := r.get(self._metric), (int, float))]

    def score(self, adapter: AdapterState) -> dict[str, float]:
        """The metrics on the earlier rows, each named `earlier_<metric>`, and `forgetting`.

        Args:
            adapter: The adapter; the workspace's frozen weights already include the state's shifts.
        """
        live = self._space.slot(adapter)
        live.load(adapter)
        each = score_examples(live.model, self._space.backbone.tokenizer, self._examples, self._task, batch_size=self._batch)
        scores = {EARLIER + name: value for name, value in task_of(self._task).summarize(each).items()}
        if (now := scores.get(self._metric)) is None:
            return scores
        self._values.append(now)
        return {**scores, FORGETTING: forgetting(self._values, higher_is_better=self._higher)}


def forgetting(values: Sequence[float], *, higher_is_better: bool) -> float:
    """How much worse the last value is than the best of all, at least 0."""
    return max(values) - values[-1] if higher_is_better else values[-1] - min(values)


__all__ = ["EarlierRows", "forgetting"]
