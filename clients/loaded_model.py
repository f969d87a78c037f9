"""A frozen backbone in one precision with its adapter slots. All clients of a process with this precision share it."""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fedtune.clients.devices.probe import stored_bytes
from fedtune.clients.lower_layers import LowerLayers
from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import task_of
from fedtune.data import Example, pad_id
from fedtune.errors import PlanError
from fedtune.models import LiveAdapter, lean, load_backbone
from fedtune.models.adapter_folder import OWN
from fedtune.models.combined import fold_shifts
from fedtune.models.evaluation import score_examples, sequence_log_probs
from fedtune.models.probe import probe, probe_packing
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot

_LOG = logging.getLogger(__name__)


class LoadedModel:
    """A backbone that is loaded once. Each turn writes its tensors into a slot (the trainable parameters) and reads them back.

    Args:
        config: The experiment, with this model's precision.
        labels: Outputs of the task's head; 0 without a head.

    Attributes:
        backbone: The frozen backbone.
        live: The slot of the config's method.
        lower: The cache of the layers below the adapters; None if it is disabled.
        frozen: The frozen weights and the versions of the shifts merged into them.
    """

    def __init__(self, config: Config, labels: int) -> None:
        self.config, self._labels = config, labels
        self.backbone = load_backbone(config.model, config.task, num_labels=labels, seed=config.seed)
        self.live = LiveAdapter(self.backbone, config.peft, config.task)
        probe(self.live, config.task)
        if config.task.packing:
            probe_packing(self.live, config.task)
        if config.client.lean == "auto" and (why := lean.enable(self.live)):
            _LOG.info("PEFT's modules compute the training steps: %s", why)
        self._sparse: SparseSlot | None = None
        self.lower = LowerLayers(self.live, config.engine.cache_layers * 1e9) if config.engine.cache_layers else None
        self.frozen = FrozenWeights(self.backbone.model)
        self._reference: tuple[str, dict[bytes, tuple[float, ...]]] = "", {}  # of the start with this digest: row → its log-probabilities

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of the frozen weights in their stored form."""
        return stored_bytes(self.live.model, self.live.parameters.values())

    def rebase(self, base: tuple[int, ...], shifts: Sequence[AdapterState], snapshot: AdapterState | None = None) -> None:
        """Set the frozen weights to W0 plus the shifts of the versions in `base`.

        Args:
            base: Versions to merge.
            shifts: The shifts that came with the message.
            snapshot: For some weights, the sum of all shifts; `shifts` does not cover these weights.

        Raises:
            PlanError: A shift is neither merged nor in `shifts`.
        """
        if self.lower is not None and self.frozen.versions != base:
            self.lower.clear()
        if self.frozen.versions != base[: len(self.frozen.versions)]:  # a merged shift is not in `base`: reset to W0
            config = self.config
            fresh = load_backbone(config.model, config.task, num_labels=self._labels, seed=config.seed)
            self.frozen.reset(fresh.model)
        by_version = {s.spec.version: s for s in shifts}
        missing = base[len(self.frozen.versions) :]
        for version in missing:
            if version not in by_version:
                raise PlanError(f"the shift of round {version} is neither merged on this client nor in the message: restart the client")
        if missing:
            self.frozen.add(*(by_version[version] for version in missing), snapshot=snapshot)

    def slot(self, state: AdapterState) -> LiveAdapter | SparseSlot:
        """The slot for a state of this method; the other slot is deactivated."""
        if state.spec.method != "sparse":
            if self._sparse is not None:
                self._sparse.release()
            return self.live
        if self._sparse is None or self._sparse.spec.mask != state.spec.mask:
            self._sparse = SparseSlot(self.live, state.spec)
        return self._sparse

    def with_reference(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples with their `reference`, if the task needs it: log-probabilities under the model before round 1, which is the frozen
        weights of the start without an adapter. Each row is computed once."""
        if not task_of(self.config.task).needs_reference:
            return examples
        start = self.frozen.start.digest if self.frozen.start else ""
        if start != self._reference[0]:
            self._reference = start, {}
        known, keys = self._reference[1], [hashlib.sha256(e.labels.tobytes() + e.input_ids.tobytes()).digest() for e in examples]
        if missing := {key: e for key, e in zip(keys, examples, strict=True) if key not in known}:
            if self._sparse is not None:
                self._sparse.release()
            how = {"batch_size": self.config.eval.batch_size, "pad_id": pad_id(self.backbone.tokenizer)}
            with self.frozen.at_start(), self.live.disabled():
                found = sequence_log_probs(self.live.model, [*missing.values()], self.config.task, **how)
            known.update(zip(missing, found, strict=True))
        return [dataclasses.replace(e, reference=known[key]) for key, e in zip(keys, examples, strict=True)]

    def save(self, folder: Path, state: AdapterState, shifts: Sequence[AdapterState]) -> None:
        """Write an adapter folder: PEFT's files, which include the shifts, and fedtune's own, which keep them apart."""
        self.slot(state).load(state)
        self.live.save_peft(folder)
        state.save(folder / OWN)
        for old in folder.glob("shift-*.safetensors"):  # from rounds after the checkpoint that the run resumed from
            old.unlink()
        for shift in shifts:
            shift.save(folder / f"shift-{shift.spec.version:04d}.safetensors")
        if shifts:
            fold_shifts(folder, state, shifts)

    def score(self, state: AdapterState, *groups: Sequence[Example]) -> list[dict[str, float]]:
        """The task's metrics with this adapter, one dict per group of examples; empty for an empty group. Batches may span groups."""
        task, flat = self.config.task, self.with_reference([e for group in groups for e in group])
        live = self.slot(state)
        live.load(state)
        scores = iter(score_examples(live.model, self.backbone.tokenizer, flat, task, batch_size=self.config.eval.batch_size))
        return [task_of(task).summarize(list(itertools.islice(scores, len(group)))) if group else {} for group in groups]
