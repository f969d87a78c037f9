"""The advice about rows and settings of single tasks."""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fedtune.clients.workspace import Workspace
from fedtune.config import Config, PartitionConfig, PeftConfig, PrivacyConfig, TaskConfig, check
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.data.values import label_sets
from fedtune.models.shift import FrozenWeights
from fedtune.models.tasks.multi_label import MultiLabel
from fedtune.warm_start import fit
from tests.advised.data import rows
from tests.advised.rows import Place, error_of, follows
from tests.models.test_preference import DPO, experiment
from tests.warm_start.test_fit import DRAWN, EARLIER, source

ONE: dict[str, Any] = {"partition": {"kind": "iid", "clients": 1}, "data": {"test_fraction": 0.0}}
PAIRS = ONE | {"task": {"kind": "preference"}}
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def lines(*found: dict[str, Any]) -> str:
    return "\n".join(json.dumps({**GOOD, **row}) for row in found)


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


rows("is neither text nor a list of messages; correct it or remove the row",
     "a.jsonl", lines({"chosen": 5, "rejected": 6}), PAIRS, lines({"chosen": "5", "rejected": "6"}), lines({}))  # fmt: skip
rows("its last message has the role '{}', but an answer has the role 'assistant'; correct it",
     "a.jsonl", lines({"chosen": talk("q", "a", "more"), "rejected": talk("q", "b")}), PAIRS,
     lines({"chosen": talk("q", "a"), "rejected": talk("q", "b")}))  # fmt: skip
rows("it has no prompt; set data.columns.prompt, or give whole conversations",
     "a.jsonl", json.dumps({"q": "x", "chosen": "a", "rejected": "b"}), PAIRS, PAIRS | {"data": ONE["data"] | {"columns": {"prompt": "q"}}},
     json.dumps({"chosen": talk("x", "a"), "rejected": talk("x", "b")}))  # fmt: skip
rows("the conversations differ before their last message; give both the same prompt",
     "a.jsonl", lines({"chosen": talk("x", "a"), "rejected": talk("y", "b")}), PAIRS,
     lines({"chosen": talk("x", "a"), "rejected": talk("x", "b")}))  # fmt: skip
rows("chosen and rejected are the same; remove the row", "a.jsonl", lines({}, {"rejected": "a"}), PAIRS, lines({}))
rows("row {} of column '{}' has {} numbers, but task.outputs={}: set task.outputs to the numbers of each row",
     "a.jsonl", json.dumps({"text": "x", "target": [1, 2]}), ONE | {"task": {"kind": "regression"}},
     ONE | {"task": {"kind": "regression", "outputs": 2}})  # fmt: skip


@follows("splits rows by their label, but with task.kind={} a row has any number of labels: take natural, iid or size")
def _(place: Place) -> Iterator[str]:
    error = error_of(lambda: check(Config(task=TaskConfig(kind="multi_label"), partition=PartitionConfig(kind="dirichlet"))))
    yield error
    for kind in re.split(", | or ", error.rpartition("take ")[2]):
        yield error_of(lambda kind=kind: check(Config(task=TaskConfig(kind="multi_label"), partition=PartitionConfig(kind=kind))))


@follows('which are not a JSON list: write ["a", "b"] or a, b')
def _(place: Place) -> Iterator[str]:
    for text in ("['a', 'b']", '["a", "b"]', "a, b"):
        yield error_of(lambda text=text: label_sets([text], None, "training"))


@follows("a classifier needs at least 2 classes, but the data has {}: see data.columns.labels")
def _(place: Place) -> Iterator[str]:
    for outputs in (1, 2):
        yield error_of(lambda outputs=outputs: MultiLabel(TaskConfig(kind="multi_label")).model_settings(outputs))


@follows("with task.kind={} a row is a pair of sequences: take privacy=user")
def _(place: Place) -> Iterator[str]:
    for kind in ("record", "user"):
        yield error_of(lambda kind=kind: check(Config(task=DPO, privacy=PrivacyConfig(kind=kind, noise=1.0))))


@follows("compares with the model without it: set peft.init=default, or task.loss=orpo")
def _(place: Place) -> Iterator[str]:
    config = experiment(place.folder)
    coarse = dataclasses.replace(config.model, precision="nf4", compute="fp32")
    for init, loss in (("loftq", "dpo"), ("default", "dpo"), ("loftq", "orpo")):
        changed = {"peft": PeftConfig(init=init), "task": dataclasses.replace(DPO, loss=loss), "model": coarse}
        yield error_of(lambda changed=changed: check(dataclasses.replace(config, **changed)))


@follows("none of {} pairs fits into task.max_length={}: raise it to {} or more")
def _(place: Place) -> Iterator[str]:
    def tried(length: int) -> str:
        return error_of(lambda: Workspace(experiment(place.folder, dataclasses.replace(DPO, max_length=length))).check_examples())

    error = tried(8)
    yield error
    yield tried(int(re.findall(r"raise it to (\d+)", error)[0]))


@follows("cannot be merged into its frozen weights: start from a run with peft=lora, or set task.loss=orpo")
def _(place: Place) -> Iterator[str]:
    for method, loss in (("ia3", "dpo"), ("lora", "dpo"), ("ia3", "orpo")):
        given = source(EARLIER.replace(method=method))
        config = Config(task=dataclasses.replace(DPO, loss=loss), peft=PeftConfig(method=method))
        yield error_of(lambda g=given, c=config, m=method: fit(g, DRAWN.replace(method=m), c, [], needs_zero=False))


@follows("this client lacks the model that the run started from: restart it")
def _(place: Place) -> Iterator[str]:
    def shift(version: int) -> AdapterState:
        spec = AdapterSpec(method="lora", base="", version=version, ranks={"0": 1}, scaling={"0": 1.0})
        return AdapterState({"0.lora_A": torch.ones(1, 2), "0.lora_B": torch.ones(3, 1)}, spec)

    def restored(frozen: FrozenWeights) -> None:
        with frozen.at_start():
            pass

    bare = AdapterSpec(method="lora", base="", version=0)
    total = AdapterState({"0.weight": torch.ones(3, 2)}, dataclasses.replace(bare, method="sum"))
    for apart in (False, True):  # after a restart, the server sends the shifts apart
        frozen = FrozenWeights(nn.Sequential(nn.Linear(2, 3)).requires_grad_(False))
        if apart:
            frozen.add(shift(0), shift(1))
        else:
            frozen.add(*(AdapterState({}, dataclasses.replace(bare, version=v)) for v in (0, 1)), snapshot=total)
        yield error_of(lambda frozen=frozen: restored(frozen))
