"""A frozen backbone of one precision with its adapter slots: what all clients of a process share that compute in it."""

import itertools
from collections.abc import Sequence
from functools import cached_property

from fedtune.clients.devices.probe import stored_bytes
from fedtune.clients.lower_layers import LowerLayers
from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import task_of
from fedtune.data import Example
from fedtune.errors import PlanError
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.evaluation import score_examples
from fedtune.models.probe import probe
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot


class Body:
    """Loaded once; its slots are loaded and read for each turn.

    Args:
        config: The experiment, with this body's precision.
        labels: Outputs of the task's head; 0 without one.

    Attributes:
        backbone: Frozen.
        live: The slot of the config's method.
        lower: The cache of the layers below the adapters; None keeps none.
        frozen: The frozen weights, and which shifts have been merged into them.
    """

    def __init__(self, config: Config, labels: int) -> None:
        self.config, self._labels = config, labels
        self.backbone = load_backbone(config.model, config.task, num_labels=labels, seed=config.seed)
        self.live = LiveAdapter(self.backbone, config.peft, config.task)
        probe(self.live, config.task)
        self._sparse: SparseSlot | None = None
        self.lower = LowerLayers(self.live, config.engine.cache_layers * 1e9) if config.engine.cache_layers else None
        self.frozen = FrozenWeights(self.backbone.model)

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of the frozen weights as they are stored."""
        return stored_bytes(self.live.model, self.live.parameters.values())

    def rebase(self, base: tuple[int, ...], shifts: Sequence[AdapterState], snapshot: AdapterState | None = None) -> None:
        """Bring the frozen weights to W0 with the shifts of the versions `base` merged in, of which those in `shifts` are at hand.

        `snapshot` is what all of them have added to some weights, which the shifts at hand then lack.

        Raises:
            PlanError: One that is missing is not at hand.
        """
        if self.lower is not None and self.frozen.versions != base:
            self.lower.clear()
        if self.frozen.versions != base[: len(self.frozen.versions)]:  # they carry what this state knows nothing of: back to W0
            config = self.config
            fresh = load_backbone(config.model, config.task, num_labels=self._labels, seed=config.seed)
            self.frozen.reset(fresh.model)
        at_hand = {s.spec.version: s for s in shifts}
        lacking = base[len(self.frozen.versions) :]
        for version in lacking:
            if version not in at_hand:
                raise PlanError(f"the client lacks what round {version} merged into the frozen weights, and it was not sent along")
        if lacking:
            self.frozen.add(*(at_hand[version] for version in lacking), snapshot=snapshot)

    def slot(self, state: AdapterState) -> LiveAdapter | SparseSlot:
        """The live slot that a state of this method is loaded into; the other one stands aside."""
        if state.spec.method != "sparse":
            if self._sparse is not None:
                self._sparse.release()
            return self.live
        if self._sparse is None or self._sparse.spec.mask != state.spec.mask:
            self._sparse = SparseSlot(self.live, state.spec)
        return self._sparse

    def score(self, state: AdapterState, *groups: Sequence[Example]) -> list[dict[str, float]]:
        """Metrics of the task with this adapter for each group of examples, all in the same batches; empty where a group has no rows."""
        live = self.slot(state)
        live.load(state)
        task, flat = self.config.task, [e for group in groups for e in group]
        scores = iter(score_examples(live.model, self.backbone.tokenizer, flat, task, batch_size=self.config.eval.batch_size))
        return [task_of(task).summarize(list(itertools.islice(scores, len(group)))) if group else {} for group in groups]
