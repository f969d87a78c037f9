"""What a process needs to act as any client of one experiment: one frozen backbone, one adapter slot, the encoded rows."""

import itertools
import json
from functools import lru_cache

import numpy as np
import torch

from fedtune.config import Config, from_dict
from fedtune.data import Example, encode, load_federation, pad_id
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.tasks import score_examples, summarise
from fedtune.state import AdapterState


class Workspace:
    """Loaded once a process and kept; set up so that nothing is built anew for a turn."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.federation = load_federation(config)
        labels = len(self.federation.labels) if config.task.kind == "classification" else 0
        self.backbone = load_backbone(config.model, config.task, num_labels=labels, seed=config.seed)
        self.live = LiveAdapter(self.backbone, config.peft, config.task)
        self.labels = labels
        self.pad_id = pad_id(self.backbone.tokenizer)
        self.client_ids = list(self.federation.clients)
        self._encoded: dict[tuple[str, str], list[Example]] = {}

    def examples(self, client: str, part: str) -> list[Example]:
        """A client's encoded rows: part is `train` or `held_out`."""
        if (client, part) not in self._encoded:
            rows = self.federation.clients[client]
            indices = rows.train if part == "train" else rows.held_out
            self._encoded[client, part] = encode(self.federation.rows, indices, self.backbone.tokenizer, self.config.task)
        return self._encoded[client, part]

    def test_examples(self) -> list[Example]:
        """The encoded rows of the global test."""
        if ("", "test") not in self._encoded:
            test = self.federation.test
            self._encoded["", "test"] = encode(test, np.arange(len(test)), self.backbone.tokenizer, self.config.task)
        return self._encoded["", "test"]

    def score(self, state: AdapterState, *groups: list[Example]) -> list[dict[str, float]]:
        """Metrics of the task with this adapter for each group of examples, all in the same batches; empty where a group has no rows."""
        self.live.load(state)
        task, flat = self.config.task, [e for group in groups for e in group]
        scores = iter(score_examples(self.live.model, self.backbone.tokenizer, flat, task, batch_size=self.config.eval.batch_size))
        return [summarise(list(itertools.islice(scores, len(group))), task) if group else {} for group in groups]


@lru_cache(maxsize=1)
def workspace(config_json: str) -> Workspace:
    """The process's workspace for this experiment, loaded at the first call."""
    config = from_dict(json.loads(config_json))
    threads = config.engine.ray_cpus if config.engine.kind == "ray" else config.engine.threads
    if threads:
        torch.set_num_threads(threads)
    return Workspace(config)
