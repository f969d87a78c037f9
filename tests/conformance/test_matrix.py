"""Strategies × PEFT methods × tasks: two rounds on a tiny model, resumed and exported; the messages are checked.

Quick: one of each kind of exchange, shift, stage, head and refusal. Slow: every other cell. A cell that makes no sense is refused with its
sentence.
"""

import copy
import dataclasses
import functools
import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

import fedtune.experiment
from fedtune.config import METHODS, ClientConfig, Config, DataConfig, EngineConfig, EvalConfig, ModelConfig, PartitionConfig, TaskConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import FedtuneError
from fedtune.experiment import simulate
from fedtune.export.huggingface import export_hf
from fedtune.rounds.find_strategy import make_strategy
from fedtune.runs.directory import read_checkpoint
from fedtune.simulations.engines.grid import InProcessGrid
from tests.models.build import checkpoint
from tests.quick import quick

STRATEGIES, TASKS = choices("strategy"), ("causal_lm", "classification")
OTHERS = [task for task in choices("task") if task not in (*TASKS, "chat", "instruction")]  # with every strategy, and one method
BACKBONES = {"causal_lm": "qwen2", "preference": "qwen2"}  # Qwen2 has biases, which Llama has not; BERT for tasks with a head
FACTORS_ONLY = (
    "feddat", "feddpa", "fedex", "fedrot", "fedsa", "fedsvd", "ffa", "flexlora", "flora", "hetlora", "lora_fair", "rolora", "slora",
)  # fmt: skip
SGD: dict[str, dict[str, Any]] = dict.fromkeys(("fedkseed", "fedmezo", "fednova", "scaffold"), {"optimizer": "sgd", "clip_norm": None})
SENTENCES = {  # strategy, method or task that refuses a cell → part of its error
    **{(s, m): f"{s}" for s in FACTORS_ONLY for m in METHODS if m not in ("lora", "rslora")},
    **{("fedpeptao", m): "set peft=ptuning_v2" for m in METHODS if m != "ptuning_v2"},
    **{("ravan", m): "set peft=ravan" for m in METHODS if m != "ravan"},
    ("prefix", "classification"): "prefix",
    **{("feddat", t): "strategy=feddat distills" for t in ("multi_label", "preference", "regression")},
    **{(s, m): "selects every tensor|prefix" for s in ("fedper", "fedrep") for m in ("prompt", "prefix")},
}
ALLOWED = {("flexlora", "dora"), ("fedrot", "dora"), ("fedsvd", "dora"), ("lora_fair", "dora")}
UP = {  # suffixes of the tensors that a client sends in a round; it always sends the head
    "fedsa": lambda round: ("lora_A",),
    "ffa": lambda round: ("lora_B", "head"),
    "fedsvd": lambda round: ("lora_B", "lora_magnitude", "head"),
    "ravan": lambda round: ("core", "head"),
    "rolora": lambda round: ("lora_B", "head") if round % 2 else ("lora_A", "head"),
    "slora": lambda round: ("sparse", "head") if round == 1 else ("lora_A", "lora_B", "head"),
}
DOWN = {"fedsa": ("lora_A",), "ffa": ("lora_B", "head"), "ravan": ("core", "head"), "slora": ("sparse", "head")}
CLIENTS: dict[str, int] = {"bulyan": 7, "fedtrimmedavg": 7, "krum": 7, "multikrum": 7}  # robust rules need 7; the others have 3


def rows(clients: int, each: int, seed: int) -> list[dict[str, Any]]:
    words = ["turn", "on", "off", "the", "light", "lamp", "heat", "in", "kitchen", "bed", "up", "down"]
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 8))) for _ in range(each * clients)]
    return [
        {
            "text": text, "label": i // clients % 3, "client": f"c{i % clients}", "labels": text.split()[:2], "target": len(text) / 20,
            "prompt": text, "chosen": text.split()[0], "rejected": text.split()[1] + " no",
        }
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    for kind in {*BACKBONES.values(), "bert"}:
        checkpoint(folder / kind, kind)
    for name, clients, each, seed in (("3", 3, 8, 0), ("7", 7, 8, 0), ("test", 1, 9, 1)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(clients, each, seed))) + "\n")
    return folder


@functools.cache
def chosen_by(choice: str) -> Config:
    """The settings of a choice in `conf/`, such as `peft=lora`; read only, as all its cells share them."""
    return compose([choice, "rounds=30"])[0].config


def experiment(files: Path, out: Path, strategy: str, method: str, task: str) -> Config:
    named = copy.deepcopy(chosen_by(f"strategy={strategy}").strategy)
    if strategy == "slora":
        named.update(rounds=2, density=0.1)
    if strategy == "fedkseed":
        named.update(candidates=16, lr=1e-2)
    if strategy == "fedpeptao":  # a round that scores, then partial ones
        named.update(warmup_rounds=0, ratio=0.5, score_rows=4)
    clients = CLIENTS.get(strategy, 3)
    return Config(
        name="cell",
        rounds=2,
        clients_per_round=clients,
        min_clients=clients,
        output_dir=str(out),
        model=ModelConfig(source="hub", name=str(files / BACKBONES.get(task, "bert")), device="cpu"),
        data=DataConfig(
            source="local",
            path=str(files / f"{clients}.jsonl"),
            test_path=str(files / "test.jsonl"),
            held_out=0.25,
            labels=sorted({word for row in rows(7, 8, 0) for word in row["labels"]}) if task == "multi_label" else [],
        ),
        partition=PartitionConfig(kind="natural"),
        task=TaskConfig(kind=task, max_length=80 if task == "preference" else 16, max_new_tokens=4, stride_texts=False),
        peft=dataclasses.replace(chosen_by(f"peft={method}").peft, rank=2, alpha=4.0, core=3, tokens=3, bottleneck=3),
        strategy=named,
        client=ClientConfig(steps=2, epochs=None, batch_size=4, lr=1e-2, schedule="constant", **SGD.get(strategy, {})),
        engine=EngineConfig(threads=1, batched="none"),
        eval=EvalConfig(clients=2),
    )


class Listener:
    """Records the train messages between the bridge and the clients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down: dict[int, set[tuple[str, ...]]] = {}
        self.up: dict[int, set[tuple[str, ...]]] = {}
        push, pull = InProcessGrid.push_messages, InProcessGrid.pull_messages

        def record_push(grid: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for m in messages:
                self._hear(self.down, m)
            return push(grid, messages)

        def record_pull(grid: InProcessGrid, ids: Iterable[str]) -> Iterable[Message]:
            replies = list(pull(grid, ids))
            for m in replies:
                self._hear(self.up, m)
            return replies

        monkeypatch.setattr(InProcessGrid, "push_messages", record_push)
        monkeypatch.setattr(InProcessGrid, "pull_messages", record_pull)

    def _hear(self, where: dict[int, set[tuple[str, ...]]], m: Message) -> None:
        if m.metadata.message_type == "train" and "adapter" in m.content.array_records:
            where.setdefault(int(m.metadata.group_id), set()).add(tuple(m.content.array_records["adapter"]))


def check_aggregation(strategy: Any) -> Any:
    """The strategy with every aggregation done twice, also in reverse order; inputs must not change."""
    aggregate = strategy.aggregate

    def tensors(state: ServerState) -> dict[str, torch.Tensor]:
        # of a shift, the product counts: its rows may come in any order
        shifts = {f"{s.spec.version} {m}": s[f"{m}.lora_B"] @ s[f"{m}.lora_A"] for s in state.shifts for m in s.spec.ranks}
        return {**state.adapter.tensors, **state.memory, **shifts}

    @functools.wraps(aggregate)
    def twice(round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        all_updates = list(updates)
        before = [{n: t.clone() for n, t in ts.items()} for ts in (tensors(state), *(u.adapter.tensors for u in all_updates))]
        after, other = aggregate(round, state, iter(all_updates)), aggregate(round, state, iter(all_updates[::-1]))
        for old, now in zip(before, (tensors(state), *(u.adapter.tensors for u in all_updates)), strict=True):
            assert old.keys() == now.keys() and all(torch.equal(t, now[n]) for n, t in old.items())
        a, b = tensors(after), tensors(other)
        assert a.keys() == b.keys() and all(torch.allclose(a[n].double(), b[n].double(), atol=1e-4) for n in a)
        return after

    object.__setattr__(strategy, "aggregate", twice)
    return strategy


def kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last in ("lora_A", "lora_B", "lora_magnitude", "sparse", "prompt", "core", "core_scale") else "head"


def cell(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, method: str, task: str) -> None:
    build = functools.partial(experiment, files, tmp_path, strategy, method, task)
    refusal = next(
        (SENTENCES[k] for k in ((strategy, method), (strategy, task), (method, task)) if k in SENTENCES and k not in ALLOWED), None
    )
    if refusal is not None:
        with pytest.raises(FedtuneError, match=refusal) as error:
            simulate(build())
        assert str(error.value).count(".") < 12 and len(str(error.value)) < 400
        return
    monkeypatch.setattr(fedtune.experiment, "make_strategy", lambda config: check_aggregation(make_strategy(config)))
    listener = Listener(monkeypatch)
    whole = simulate(build())
    payload(listener, whole, strategy)
    part = tmp_path / "part"  # as after a kill in round 2
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "round-0002")
    shutil.rmtree(part / "adapter")
    simulate(dataclasses.replace(build(), resume=str(part)))
    ends = [AdapterState.load(run / "adapter" / "fedtune.safetensors") for run in (whole, part)]
    assert ends[0].spec == ends[1].spec and all(torch.equal(t, ends[1][n]) for n, t in ends[0].tensors.items())
    assert any(float(t.abs().max()) > 0 for t in ends[0].tensors.values())
    payload(listener, whole, strategy)
    out = export_hf(whole, tmp_path / "merged")
    assert (out / "model.safetensors").is_file() and (out / "config.json").is_file()


def payload(heard: Listener, run: Path, strategy: str) -> None:
    """Check the tensors of each round's messages: all have the same ones, as the method defines."""
    every = set(AdapterState.load(run / "adapter" / "fedtune.safetensors").tensors)
    for round in (1, 2):
        (down,), (up,) = heard.down[round], heard.up[round]
        if strategy == "fedpeptao":  # round 1 scores the layers, round 2 exchanges some of the prompts
            heads, prompts = ({n for n in every if kind(n) == what} for what in ("head", "prompt"))
            chosen = math.ceil(len(prompts) / 2)
            assert (
                (set(up) == {"layers"} and not down) if round == 1 else (heads <= set(up) == set(down) and len(up) == len(heads) + chosen)
            )
            continue
        if strategy == "fedkseed":
            assert set(up) == {"fedkseed.sums"} and not down
            continue
        if strategy in ("fedper", "fedrep"):  # the head, or else the last layer, stays with the clients
            backbone = {n.split(".")[0] for n in every if "layer" in n}  # its embeddings are no head
            heads = {n for n in every if kind(n) == "head" and "layer" not in n and n.split(".")[0] not in backbone}
            assert set(up) == set(down) == every - (heads or {n for n in every if "layers.1." in n or "layer.1." in n}) and up
            continue
        ends = UP[strategy](round) if strategy in UP else None
        assert {kind(n) for n in up} <= set(ends) if ends else set(up) == every
        if ends is None or strategy == "slora":
            assert set(up) == set(down)
        elif strategy in DOWN:
            assert set(down) == {n for n in every if kind(n) in DOWN[strategy]}
        else:
            assert set(down) == every and set(up) == {n for n in every if kind(n) in ends}


QUICK = [
    ("ravan", "ravan", "classification"),
    ("diloco", "fedsb", "causal_lm"),
    ("fedrot", "lora", "causal_lm"),
    *((s, "ptuning_v2" if s == "fedpeptao" else "lora", "causal_lm") for s in ("fedsa", "flora", "rolora", "slora", "fedpeptao")),
    *(("fedavg", m, "classification") for m in ("prompt", "prefix")),
]
ONE_TASK = sorted(set(STRATEGIES) - {*UP, *FACTORS_ONLY, "fedper", "fedpeptao", "fedrep"})  # clients exchange the whole adapter
CELLS = [
    (s, m, t)
    for s in STRATEGIES
    for i, m in enumerate(METHODS)
    for j, t in enumerate(TASKS)
    # each strategy meets each method and each task; the two tasks alternate over the methods
    if s not in ONE_TASK or (ONE_TASK.index(s) + i + j) % 2 == 0 or (s, m, t) in QUICK
]
CELLS += [(s, {"fedpeptao": "ptuning_v2", "ravan": "ravan"}.get(s, "lora"), t) for s in STRATEGIES for t in OTHERS]


@pytest.mark.parametrize(("strategy", "method", "task"), quick(CELLS, *QUICK))
def test_every_cell(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, method: str, task: str) -> None:
    cell(files, tmp_path, monkeypatch, strategy, method, task)


def test_a_checkpoint_holds_everything(files: Path, tmp_path: Path) -> None:
    run = simulate(experiment(files, tmp_path, "flora", "lora", "causal_lm"))
    stored = read_checkpoint(run / "checkpoints" / "round-0002")
    assert [s.spec.version for s in stored.state.shifts] == [1, 2]
