"""The bridge over clients without models: which updates count, which are dropped and why, and the state after a restart."""

import dataclasses
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import ClientConfig, Config, DeviceClass, DevicesConfig, EvalConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import RunError
from fedtune.rounds.planning import schedule
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.flora import FLoRA
from tests.fakes import fail, fake_bridge, fake_client_app, lora_state


def config(**changes: Any) -> Config:
    return Config(**{"rounds": 1, "clients_per_round": 10, **changes})


def test_unequal_counts_weigh_the_mean(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, config())
    state = bridge.loop()
    # by hand: client a sends 0 + 1 with weight 1/4, client b sends 0 + 3 with weight 3/4: 2.5
    for tensor in state.adapter.tensors.values():
        assert torch.equal(tensor, torch.full_like(tensor, 2.5))
    assert state.adapter.spec.version == 1
    assert [r["round"] for r in observer.records] == [0, 1]
    assert observer.records[1]["counted"] == 2 and observer.records[1]["dropped"] == {}
    assert observer.records[0]["clients_mean"] == pytest.approx(0.02)
    assert observer.records[0]["clients_worst_decile"] == pytest.approx(0.01)


def swap(change: Any) -> Any:
    """A fault that changes one array of the reply."""

    def act(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        return change(arrays), text

    return act


def misreport(**changes: Any) -> Any:
    """A fault that changes fields of the update's text."""

    def act(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        return arrays, json.dumps({**json.loads(text), **changes})

    return act


def put(name: str, array: Array) -> Any:
    return swap(lambda arrays: ArrayRecord({**arrays, name: array}))


def lying_shape(arrays: ArrayRecord) -> ArrayRecord:
    head = arrays["head.weight"]
    return ArrayRecord({**arrays, "head.weight": Array(dtype=head.dtype, shape=tuple(head.shape), stype=head.stype, data=head.data[:-8])})


def pickle_array(arrays: ArrayRecord) -> ArrayRecord:
    head = arrays["head.weight"]
    data = b"\x80\x04cos\nsystem\n" + b"x" * (len(head.data) - 13)
    return ArrayRecord({**arrays, "head.weight": Array(dtype=head.dtype, shape=tuple(head.shape), stype=head.stype, data=data)})


NAN, INF = float("nan"), float("inf")
FAULTS = [
    ("weight", misreport(examples=1000), "refused", "reports 1000 examples, but the client's hello reported"),
    ("steps without end", misreport(measurements={"steps": 3, "lr_sum": 1e9}), "refused", "lr_sum=1e+09 is more than 3 steps"),
    ("no steps", misreport(measurements={"lr_sum": 0.003}), "refused", "steps or lr_sum is missing or negative"),
    ("negative lr_sum", misreport(measurements={"steps": 3, "lr_sum": -0.003}), "refused", "steps or lr_sum is missing or negative"),
    ("nan", put("head.weight", Array(torch.full((4, 7), NAN))), "refused", "tensor 'head.weight' has values that are not finite"),
    ("inf", put("q.lora_A", Array(torch.full((2, 5), INF))), "refused", "tensor 'q.lora_A' has values that are not finite"),
    ("transposed", put("q.lora_A", Array(torch.zeros(5, 2))), "refused", "tensor 'q.lora_A' is float32 (5, 2), wanted float32 (2, 5)"),
    ("dtype", put("q.lora_A", Array(torch.zeros(2, 5, dtype=torch.float64))), "refused", "is float64 (2, 5), wanted float32"),
    ("surplus", put("extra", Array(torch.zeros(1))), "refused", "tensor 'extra' is not one of the expected tensors"),
    ("missing", swap(lambda a: ArrayRecord({k: v for k, v in a.items() if k != "up.lora_B"})), "refused", "tensor 'up.lora_B' is missing"),
    ("truncated", swap(lying_shape), "refused", "tensor 'head.weight' is damaged"),
    ("pickled", swap(pickle_array), "refused", "tensor 'head.weight' is damaged"),
    ("stale", misreport(base_version=-1), "refused", "the update is for base_version -1, wanted 0"),
    ("other client", misreport(client="good"), "refused", "the update is for client good, wanted bad"),
    ("other round", misreport(round=9), "refused", "the update is for round 9, wanted 1"),
    ("no examples", misreport(examples=0), "refused", "the update's examples=0 is out of range: it must be at least 1"),
    ("examples as text", misreport(examples="many"), "refused", "the update's examples is 'many', which is not of type"),
    ("unknown field", misreport(surprise=1), "refused", "the update has the unknown field 'surprise'"),
    ("nan metric", misreport(metrics={"loss": NAN}), "refused", "the update's loss is nan"),
    ("text metric", misreport(metrics={"loss": "low"}), "refused", "the update's loss is low"),
    ("many metrics", misreport(metrics={f"m{i}": 1.0 for i in range(100_000)}), "refused", "numbers, more than the limit of 64"),
    ("a long name", misreport(metrics={"m" * 65: 1.0}), "refused", "names have at most 64 printable characters"),
    ("a name that moves the cursor", misreport(measurements={"\x1b[2J": 1.0}), "refused", "names have at most 64 printable characters"),
    ("a long device class", misreport(device_class="d" * 65), "refused", "names have at most 64 printable characters"),
    ("a huge metric", misreport(metrics={"train_loss": 10**400}), "refused", "the update has a number that is too large for a float"),
    ("a huge count", misreport(examples=10**400), "refused", "the update has a number that is too large for a float"),
    ("not json", lambda r, a, t: (a, "{"), "refused", "the update is not JSON"),
    ("a list", lambda r, a, t: (a, "[]"), "refused", "the update must be a JSON object, got list"),
    ("raises ours", fail("the training loss became nan in step 2 of 5"), "failed", "the training loss became nan in step 2 of 5"),
]


@pytest.mark.parametrize(("fault", "kind", "sentence"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_bad_reply_is_dropped_and_recorded(tmp_path: Path, fault: Any, kind: str, sentence: str) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"bad": 50, "good": 2}, {"bad": fault}), 2, config())
    state = bridge.loop()
    # only the good client counts: 0 + 2
    assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in state.adapter.tensors.values())
    assert observer.records[1]["dropped"] == {kind: 1} and observer.records[1]["counted"] == 1
    bad = next(r for r in observer.clients if r["client"] == "bad" and r["round"] == 1)
    assert sentence in bad["dropped"] and "\n" not in bad["dropped"]


def raises(error: BaseException) -> Any:
    def act(round: int, arrays: ArrayRecord, text: str) -> Any:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("broken"), "failed: ValueError: broken"),
        (MemoryError(), "failed: out of memory: lower client.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "failed: out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "failed: out of memory"),
    ],
    ids=["exception", "memory", "cuda memory", "cpu allocator"],
)
def test_a_client_that_fails_loses_only_that_round(tmp_path: Path, error: Exception, sentence: str) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"bad": 50, "good": 2}, {"bad": raises(error)}), 2, config(rounds=2))
    state = bridge.loop()
    assert state.adapter.spec.version == 2 and [r["counted"] for r in observer.records[1:]] == [1, 1]
    assert all(sentence in r["dropped"] for r in observer.clients if r["client"] == "bad" and r["round"] > 0)


def broken_app(**replies: RecordDict | Error) -> ClientApp:
    """Client a is good; b replies to messages of these types with these contents, or with Flower's error."""
    good, app = fake_client_app({"a": 1, "b": 3}), ClientApp()

    def answer(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if context.node_config["partition-id"] == 0 or kind not in replies:
            return good(message, context)
        return Message(replies[kind], reply_to=message)

    for register in (app.query, app.train, app.evaluate):
        register()(answer)
    return app


DEEP = "[" * 100_000
BREAKS = [
    {"query": RecordDict({"declined": ConfigRecord({})})},
    {"query": RecordDict({"hello": ConfigRecord({"json": DEEP})})},
    {"query": RecordDict()},
    {"train": Error(code=1, reason=" \n ")},
    {"train": RecordDict()},
    {"evaluate": RecordDict()},
    {"evaluate": RecordDict({"metrics": ConfigRecord({"json": DEEP})})},
    {"evaluate": RecordDict({"metrics": ConfigRecord({"json": '{"accuracy": 1' + "0" * 400 + "}"})})},
    {"evaluate": RecordDict({"metrics": ConfigRecord({"json": "[1]"})})},
]


@pytest.mark.parametrize("replies", BREAKS, ids=range(len(BREAKS)))
def test_no_malformed_reply_ends_the_run(tmp_path: Path, replies: dict[str, Any]) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", broken_app(**replies), 2, config())
    state = bridge.loop()
    counted = 2 if "evaluate" in replies else 1
    assert state.adapter.spec.version == 1 and observer.records[1]["counted"] == counted
    assert observer.records[1]["clients_mean"] == pytest.approx(0.02 if "train" in replies else 0.01)


def test_a_client_cannot_overwrite_fields_that_the_server_writes(tmp_path: Path) -> None:
    lie = {"steps": 3, "lr_sum": 300.0, "round": 99, "client": 7, "dropped": 1, "bytes_up": 0, "bytes_down": 0}
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}, {"b": misreport(measurements=lie)}), 2, config())
    bridge.loop()
    mine = next(r for r in observer.clients if r["client"] == "b" and r["round"] == 1)
    assert mine["bytes_up"] > 0 and mine["bytes_down"] > 0 and "dropped" not in mine
    newest = bridge.run.newest()[0]
    assert newest is not None and newest.clients["b"]["counted"] == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares(FedAvg):
    """Keeps the square of the aggregate, as adaptive server optimizers do."""

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        after = super().aggregate(round, state, updates)
        return dataclasses.replace(after, memory={"v": after.adapter["head.weight"] ** 2})


def test_a_result_that_overflows_does_not_count(tmp_path: Path) -> None:
    huge = put("head.weight", Array(torch.full((4, 7), 1e30)))  # finite, its square is not
    unclipped = ClientConfig(optimizer="sgd", clip_norm=None)  # the step has no bound
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1}, {"a": huge}), 1, config(client=unclipped), strategy=Squares())
    state = bridge.loop()
    assert state.adapter.spec.version == 0 and not state.memory
    assert observer.notes == ["round 1 does not count: 'v' in its result is not finite; the state is unchanged"]


def shifts_in(message: Message) -> set[str]:
    """Shifts that the message carries; a snapshot may replace some of their matrices (see tests/rounds/test_snapshot.py)."""
    return {n for n in message.content.array_records if n not in ("adapter", "snapshot")}


def test_a_device_that_failed_gets_all_shifts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []
    push = InProcessGrid.push_messages

    def listen(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        sent.extend(shifts_in(m) for m in messages if m.metadata.message_type == "train")
        return push(self, messages)

    def once(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        if round == 3:
            raise ValueError("restarted")
        return arrays, text

    monkeypatch.setattr(InProcessGrid, "push_messages", listen)
    quiet = config(rounds=4, eval=EvalConfig(clients=0))
    fake_bridge(tmp_path / "r", fake_client_app({"a": 1}, {"a": once}), 1, quiet, strategy=FLoRA())[0].loop()
    assert sent == [set(), {"shift-1"}, {"shift-2"}, {"shift-1", "shift-2"}]


def test_a_round_without_a_quorum_leaves_the_state(tmp_path: Path) -> None:
    app = fake_client_app({"a": 1, "b": 1, "c": 1}, {"a": fail("no"), "b": fail("no")})
    bridge, observer = fake_bridge(tmp_path / "r", app, 3, config(rounds=2, min_clients=2))
    state = bridge.loop()
    assert state.adapter.spec.version == 0 and float(state.adapter["head.weight"].sum()) == 0.0
    assert "round 1 does not count: it has 1 good updates, fewer than min_clients=2" in observer.notes[0]
    assert (tmp_path / "r" / "checkpoints" / "round-0002").is_dir()


def test_a_round_without_replies_leaves_the_state(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1}, {"a": fail("no")}), 1, config())
    assert bridge.loop().adapter.spec.version == 0
    assert "no client sent a good update" in observer.notes[0]


def test_too_few_clients_give_a_one_sentence_error(tmp_path: Path) -> None:
    bridge, _ = fake_bridge(tmp_path / "r", fake_client_app({"a": 1}), 1, config(min_clients=2), patience_s=0.2)
    with pytest.raises(RunError, match="1 clients can take part, min_clients=2"):
        bridge.loop()


def test_clients_with_another_backbone_are_rejected(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(
        tmp_path / "r", fake_client_app({"a": 1}), 1, config(), initial=lora_state(fill=0.0).replace(base="c" * 64)
    )
    with pytest.raises(RunError, match="client a has backbone .*, but the run has"):
        bridge.loop()


def test_late_replies_are_late_by_the_virtual_clock(tmp_path: Path) -> None:
    slow = misreport(measurements={"virtual_s": 31.0, "steps": 3, "lr_sum": 300.0})
    devices = DevicesConfig(classes={"phone": DeviceClass()}, deadline_s=30.0)
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}, {"b": slow}), 2, config(devices=devices))
    state = bridge.loop()
    assert float(state.adapter["q.lora_A"][0, 0]) == 1.0 and observer.records[1]["dropped"] == {"late": 1}
    assert next(r for r in observer.clients if r["client"] == "b" and r["round"] == 1)["dropped"] == "late: took 31.0 s, deadline 30 s"


def test_cohorts_depend_only_on_seed_and_round(tmp_path: Path) -> None:
    clients = {f"c{i:02d}": 1 for i in range(20)}
    bridge, _ = fake_bridge(tmp_path / "a", fake_client_app(clients), 20, config(seed=3, clients_per_round=5))
    nodes: Any = {c: i for i, c in enumerate(clients)}
    forwards = [bridge._sample(nodes, r) for r in (1, 2, 3)]
    backwards = [bridge._sample(dict(reversed(nodes.items())), r) for r in (3, 2, 1)]
    assert forwards == backwards[::-1] and len({tuple(c) for c in forwards}) == 3
    assert all(len(set(c)) == 5 for c in forwards)


def test_a_resumed_run_reaches_the_same_state(tmp_path: Path) -> None:
    clients = {f"c{i}": i + 1 for i in range(6)}
    whole, _ = fake_bridge(tmp_path / "whole", fake_client_app(clients), 6, config(rounds=5, clients_per_round=3))
    first, _ = fake_bridge(tmp_path / "part", fake_client_app(clients), 6, config(rounds=2, clients_per_round=3))
    first.loop()
    first.run.close()
    second, observer = fake_bridge(tmp_path / "part", fake_client_app(clients), 6, config(rounds=5, clients_per_round=3))
    expected, actual = whole.loop(), second.loop()
    assert [r["round"] for r in observer.records] == [3, 4, 5]
    assert all(torch.equal(expected.adapter[n], actual.adapter[n]) for n in expected.adapter.tensors)
    kept = [bridge.run.newest()[0] for bridge in (whole, second)]
    assert kept[0] is not None and kept[1] is not None and kept[0].clients == kept[1].clients


def test_bytes_are_counted_as_on_the_wire(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1}), 1, config())
    bridge.loop()
    values = lora_state().nbytes
    line = next(r for r in observer.clients if r["round"] == 1)
    # five arrays, each with np.save's 128-byte header, plus names and JSON
    assert values + 5 * 128 < line["bytes_up"] < values + 5 * 128 + 1500
    assert observer.records[1]["bytes_up"] == line["bytes_up"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    # warm-up over 2 of 10 rounds; then from 1 at round 2 to 0.2 at round 10, its middle is round 6
    [("constant", [0.0, 0.5, 1.0, 1.0, 1.0]), ("linear", [0.0, 0.5, 1.0, 0.6, 0.2]), ("cosine", [0.0, 0.5, 1.0, 0.6, 0.2])],
)
def test_the_learning_rate_schedule_over_rounds(kind: str, expected: list[float]) -> None:
    c = config(rounds=10, client=ClientConfig(schedule=kind, warmup_rounds=2, lr_end=0.2))
    assert [schedule(c, r) for r in (0, 1, 2, 6, 10)] == pytest.approx(expected)


def test_a_client_that_never_answers_is_late(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3, "c": 5}), 3, config(round_timeout_s=0.3))
    bridge = dataclasses.replace(bridge, grid=Deaf(fake_client_app({"a": 1, "b": 3, "c": 5}), 3))
    state = bridge.loop()
    # by hand: b is lost; (1*1 + 5*5) / 6; c, which answered after b's time was up, still counts
    assert float(state.adapter["q.lora_A"][0, 0]) == pytest.approx(26 / 6)
    assert observer.records[1]["dropped"] == {"late": 1} and observer.records[1]["counted"] == 2
    assert next(r for r in observer.clients if r["client"] == "b" and r["round"] == 1)["dropped"] == "late: no reply within 0.3 s"


class Deaf(InProcessGrid):
    """A grid on which node 2 never answers train messages."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = [i for i in message_ids if not (i in self._waiting and self._is_lost(self._waiting[i]))]
        return super().pull_messages(ids)

    def _is_lost(self, message: Message) -> bool:
        return message.metadata.dst_node_id == 2 and message.metadata.message_type == "train"


def test_the_server_holds_one_model_for_any_number_of_clients(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counting(FedAvg):
        def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
            def watch() -> Iterator[Update]:
                seen: list[weakref.ref[AdapterState]] = []
                for update in updates:
                    seen.append(weakref.ref(update.adapter))
                    alive.append(sum(r() is not None for r in seen))
                    yield update
                    del update

            return super().aggregate(round, state, watch())

    clients = {f"c{i:02d}": 1 for i in range(12)}
    bridge, _ = fake_bridge(tmp_path / "r", fake_client_app(clients), 12, config(clients_per_round=12), strategy=Counting())
    bridge.loop()
    # the current update, and the one before it that the loop variable still references
    assert len(alive) == 12 and max(alive) <= 3


def test_a_client_gets_exactly_the_shifts_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, set[str]]] = []
    push = InProcessGrid.push_messages

    def listen(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for m in messages:
            sent.append((f"{m.metadata.message_type} {m.metadata.dst_node_id}", shifts_in(m)))
        return push(self, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", listen)
    quiet = config(rounds=6, clients_per_round=1, eval=EvalConfig(clients=0))
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, quiet, strategy=FLoRA())
    state = bridge.loop()
    assert [s.spec.version for s in state.shifts] == [1, 2, 3, 4, 5, 6]
    held: dict[str, int] = {}
    turns = [(who, names) for who, names in sent if who.startswith("train")]
    assert len({who for who, _ in turns}) == 2  # both clients were sampled, and each missed rounds of the other
    for round, (who, names) in enumerate(turns, 1):
        assert names == {f"shift-{v}" for v in range(held.get(who, 0) + 1, round)}
        held[who] = round - 1
    # resuming in a new process: clients whose hello reports no shifts get all of them
    bridge.run.close()
    sent.clear()
    again, _ = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, dataclasses.replace(quiet, rounds=7), strategy=FLoRA())
    again.loop()
    assert [names for who, names in sent if who.startswith("train")] == [{f"shift-{v}" for v in range(1, 7)}]
    assert all(r["bytes_down"] > 0 for r in observer.records[1:])
