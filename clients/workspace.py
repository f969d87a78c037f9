"""Everything that a process loads for the clients of one experiment: a frozen backbone per precision, adapter slots, encoded rows."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from fedtune.clients.loaded_model import LoadedModel
from fedtune.clients.lower_layers import LowerLayers
from fedtune.clients.tokens import Rows, TokenStore
from fedtune.config import Config, from_dict
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import task_of
from fedtune.data import Example, Federation, encode, load_federation, pad_id
from fedtune.errors import DataError
from fedtune.models import Backbone, LiveAdapter, initial_adapter
from fedtune.models.shift import FrozenWeights
from fedtune.models.sparse import SparseSlot
from fedtune.storage.parsing import parse_json


class Workspace:
    """Loaded once per process, so that a turn creates only its optimizer.

    Devices may choose different precisions. There is one loaded model per precision, loaded when it is first needed. The model in the
    config's precision is always loaded; `backbone`, `live` and `frozen` belong to it.
    """

    def __init__(self, config: Config, federation: Federation | None = None) -> None:
        self.config = config
        self.federation = federation or load_federation(config)
        self.labels = task_of(config.task).outputs(len(self.federation.labels))
        self._models = {config.model.precision: LoadedModel(config, self.labels)}
        self.pad_id = pad_id(self.backbone.tokenizer)
        self.client_ids = list(self.federation.clients)
        self._tokens, self._encoded = TokenStore(), dict[tuple[str, str, int], Rows]()
        self.start: tuple[str, AdapterState] | None = None  # digest and adapter that the server of a warm start has sent

    @property
    def own(self) -> LoadedModel:
        """The model in the config's precision."""
        return self._models[self.config.model.precision]

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

    def loaded_model(self, precision: str) -> LoadedModel:
        """The model in this precision, loaded at the first call. All precisions have the checkpoint's fingerprint.

        Raises:
            ModelError: The backbone cannot be loaded in this precision.
        """
        if precision not in self._models:
            model = dataclasses.replace(self.config.model, precision=precision)
            self._models[precision] = LoadedModel(dataclasses.replace(self.config, model=model), self.labels)
        return self._models[precision]

    def examples(self, client: str, part: str, length: int | None = None) -> Sequence[Example]:
        """A client's encoded rows, truncated to `length` tokens (None: the task's maximum); `part` is `train` or `held_out`."""
        longest = length or self.config.task.max_length
        if (client, part, longest) not in self._encoded:
            rows = self.federation.clients[client]
            indices = rows.train if part == "train" else rows.held_out
            # the row count determines the steps, sampling rate and ε of a private turn, so it must not depend on the rows' content
            private = part == "train" and terms(self.config)["privacy"] != "none"
            self._encoded[client, part, longest] = self._encode(self.federation.rows, indices, longest, keep_short=private)
        return self._encoded[client, part, longest]

    def test_examples(self) -> Sequence[Example]:
        """The encoded rows of the global test set."""
        key = "", "test", self.config.task.max_length
        if key not in self._encoded:
            test = self.federation.test
            self._encoded[key] = self._encode(test, np.arange(len(test)), key[2])
        return self._encoded[key]

    def unusable(self, client: str) -> str:
        """Why the client's training rows give no example, for the end of an error."""
        rows = self.federation.clients[client].train.tolist()
        return task_of(self.config.task).unusable(self.federation.rows.select(rows), self.backbone.tokenizer)

    def check_examples(self) -> None:
        """Check that at least one client can train, and that the global test has an example if it is scored here.

        Clients are encoded until one can train, so this usually costs nothing that the run does not need.

        Raises:
            DataError: No client can train, or a row cannot be used.
        """
        task, federation = task_of(self.config.task), self.federation
        if self.config.eval.where == "server" and len(federation.test) and not self.test_examples():
            raise DataError(f"the global test has no row that can be scored: {task.unusable(federation.test, self.backbone.tokenizer)}")
        if not federation.clients or any(task.count(e) for client in federation.clients for e in self.examples(client, "train")):
            return
        rows = federation.rows.select(np.concatenate([client.train for client in federation.clients.values()]).tolist())
        raise DataError(f"no client has a training row that it can use: {task.unusable(rows, self.backbone.tokenizer)}")

    def _encode(self, rows: RowSet, indices: np.ndarray, longest: int, keep_short: bool = False) -> Rows:
        task = dataclasses.replace(self.config.task, max_length=longest)
        backbone = self.backbone
        return self._tokens.add(encode(rows, indices, backbone.tokenizer, task, seq2seq=backbone.seq2seq, keep_short=keep_short))

    @cached_property
    def initial(self) -> AdapterState:
        """The first adapter that server and clients draw from the run's seed; the adapter of version 0, unless the start is warm."""
        config = self.config
        drawn = initial_adapter(config.model, config.task, config.peft, num_labels=self.labels, seed=config.seed)
        return drawn.replace(base=self.backbone.fingerprint)

    def rebase(self, base: tuple[int, ...], shifts: Sequence[AdapterState]) -> None:
        """`LoadedModel.rebase` of the model in the config's precision, without a snapshot; an empty `base` resets every model to W0."""
        for model in self._models.values() if not base else [self.own]:
            model.rebase(base, shifts)

    def slot(self, state: AdapterState) -> LiveAdapter | SparseSlot:
        """`LoadedModel.slot` of the model in the config's precision."""
        return self.own.slot(state)

    def score(self, state: AdapterState, *groups: Sequence[Example]) -> list[dict[str, float]]:
        """`LoadedModel.score` of the model in the config's precision."""
        return self.own.score(state, *groups)


def load_workspace(config: Config) -> Workspace:
    """Load the experiment's workspace and set torch's number of threads."""
    threads = config.engine.ray_cpus if config.engine.kind == "ray" else config.engine.threads
    if threads:
        torch.set_num_threads(threads)
    return Workspace(config)


@lru_cache(maxsize=1)
def workspace(config_json: str) -> Workspace:
    """The process's workspace for this experiment; the last one is cached."""
    return load_workspace(from_dict(parse_json(config_json)))
