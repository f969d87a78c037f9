"""What a process needs to act as any client of one experiment: a frozen backbone a precision, its adapter slot, the encoded rows."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from datasets import Dataset

from fedtune.clients.loaded_model import Body
from fedtune.clients.lower_layers import LowerLayers
from fedtune.clients.tokens import Rows, TokenStore
from fedtune.config import Config, from_dict
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.task import task_of
from fedtune.data import Example, Federation, encode, load_federation, pad_id
from fedtune.models import Backbone, LiveAdapter, initial_adapter
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot
from fedtune.storage.parsing import parse_json


class Workspace:
    """Loaded once a process and kept; set up so that nothing is built anew for a turn.

    Where clients are devices, each computes in the precision that it settled on: there is a body a precision, loaded when it is first
    needed. That of the config's own is always there; `backbone`, `live` and `frozen` are its.
    """

    def __init__(self, config: Config, federation: Federation | None = None) -> None:
        self.config = config
        self.federation = federation or load_federation(config)
        self.labels = task_of(config.task).outputs(len(self.federation.labels))
        self._bodies = {config.model.precision: Body(config, self.labels)}
        self.pad_id = pad_id(self.backbone.tokenizer)
        self.client_ids = list(self.federation.clients)
        self._tokens, self._encoded = TokenStore(), dict[tuple[str, str, int], Rows]()

    @property
    def own(self) -> Body:
        """The body of the config's precision."""
        return self._bodies[self.config.model.precision]

    @property
    def backbone(self) -> Backbone:
        return self.own.backbone

    @property
    def live(self) -> LiveAdapter:
        """The slot of the config's method."""
        return self.own.live

    @property
    def frozen(self) -> FrozenWeights:
        return self.own.frozen

    @property
    def _lower(self) -> LowerLayers | None:
        return self.own.lower

    def body(self, precision: str) -> Body:
        """The body of this precision, loaded at the first call; all have the same fingerprint, which is the checkpoint's.

        Raises:
            ModelError: It cannot be loaded so.
        """
        if precision not in self._bodies:
            model = dataclasses.replace(self.config.model, precision=precision)
            self._bodies[precision] = Body(dataclasses.replace(self.config, model=model), self.labels)
        return self._bodies[precision]

    def examples(self, client: str, part: str, length: int | None = None) -> Sequence[Example]:
        """A client's encoded rows of at most `length` tokens (None: the task's): part is `train` or `held_out`."""
        longest = length or self.config.task.max_length
        if (client, part, longest) not in self._encoded:
            rows = self.federation.clients[client]
            indices = rows.train if part == "train" else rows.held_out
            # a private turn's steps, rate and ε follow from the count of its examples, which must not follow from what is in them
            private = part == "train" and terms(self.config)["privacy"] != "none"
            self._encoded[client, part, longest] = self._encode(self.federation.rows, indices, longest, keep_short=private)
        return self._encoded[client, part, longest]

    def test_examples(self) -> Sequence[Example]:
        """The encoded rows of the global test."""
        key = "", "test", self.config.task.max_length
        if key not in self._encoded:
            test = self.federation.test
            self._encoded[key] = self._encode(test, np.arange(len(test)), key[2])
        return self._encoded[key]

    def _encode(self, rows: Dataset, indices: np.ndarray, longest: int, keep_short: bool = False) -> Rows:
        task = dataclasses.replace(self.config.task, max_length=longest)
        backbone = self.backbone
        return self._tokens.add(encode(rows, indices, backbone.tokenizer, task, seq2seq=backbone.seq2seq, keep_short=keep_short))

    @cached_property
    def initial(self) -> AdapterState:
        """The adapter of version 0, as the server draws it from the run's seed."""
        config = self.config
        drawn = initial_adapter(config.model, config.task, config.peft, num_labels=self.labels, seed=config.seed)
        return drawn.replace(base=self.backbone.fingerprint)

    def rebase(self, base: tuple[int, ...], shifts: Sequence[AdapterState]) -> None:
        """`Body.rebase` of the config's own body with shifts alone; back to W0, of all of them."""
        for body in self._bodies.values() if not base else [self.own]:
            body.rebase(base, shifts)

    def slot(self, state: AdapterState) -> LiveAdapter | SparseSlot:
        """`Body.slot` of the config's own body."""
        return self.own.slot(state)

    def score(self, state: AdapterState, *groups: Sequence[Example]) -> list[dict[str, float]]:
        """`Body.score` of the config's own body."""
        return self.own.score(state, *groups)


def load_workspace(config: Config) -> Workspace:
    """Load the experiment's workspace, and set torch's threads as the config says."""
    threads = config.engine.ray_cpus if config.engine.kind == "ray" else config.engine.threads
    if threads:
        torch.set_num_threads(threads)
    return Workspace(config)


@lru_cache(maxsize=1)
def workspace(config_json: str) -> Workspace:
    """The workspace of this experiment that the process loaded last, so that a further run of the same experiment loads nothing."""
    return load_workspace(from_dict(parse_json(config_json)))
