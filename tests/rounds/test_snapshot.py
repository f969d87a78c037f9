"""Snapshots give a new client the same weights for fewer bytes; offers announce a message's size before its tensors are sent."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.clients.app import check_offer
from fedtune.clients.loaded_model import LoadedModel
from fedtune.config import EvalConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import OFFER, MessageWriter, read_message, read_offer
from fedtune.errors import Decline, ModelError, PlanError
from fedtune.models.shift import FrozenWeights
from fedtune.rounds.planning import base_plan
from fedtune.rounds.snapshot import Snapshots
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.strategies.flora import FLoRA
from tests.fakes import fake_bridge, fake_client_app, lora_state
from tests.rounds.test_bridge import config

SIZES = {"q": (6, 5), "up": (40, 30)}  # (out, in)


def shift(version: int, rank: int = 2, scaling: float = 0.7) -> AdapterState:
    gen, tensors = torch.Generator().manual_seed(version), dict[str, torch.Tensor]()
    for module, (wide, narrow) in SIZES.items():
        tensors[f"{module}.lora_A"] = torch.randn(rank, narrow, generator=gen)
        tensors[f"{module}.lora_B"] = torch.randn(wide, rank, generator=gen)
    return AdapterState(
        tensors, AdapterSpec(method="lora", version=version, ranks=dict.fromkeys(SIZES, rank), scaling=dict.fromkeys(SIZES, scaling))
    )


SHIFTS = [shift(v) for v in range(1, 8)]  # of q, 30 numbers, two factors of rank 2 are 44; of up, 1,200, they are 140 a round


class Quantized(nn.Linear):
    """Its weight is integers; it computes in bf16."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__(narrow, wide, bias=False)
        self.weight = nn.Parameter(torch.ones(wide, narrow, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to(x.dtype).T


def model(kind: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind in ("bf16", "quantised") else torch.float32
    layers: dict[str, Any] = {}
    for module, (wide, narrow) in SIZES.items():
        layer_of = {"conv": lambda w=wide, n=narrow: Conv1D(w, n), "quantised": lambda w=wide, n=narrow: Quantized(n, w)}
        layers[module] = layer_of.get(kind, lambda w=wide, n=narrow: nn.Linear(n, w, bias=False))()
    out = nn.ModuleDict(layers)
    out["norm"] = nn.LayerNorm(3, dtype=dtype)
    return (out if kind == "quantised" else out.to(dtype)).requires_grad_(False)


def outputs(layers: nn.ModuleDict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(9)
    return {m: layers[m](torch.randn(4, narrow, generator=gen).to(dtype)) for m, (_, narrow) in SIZES.items()}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "conv", "quantised"])
@pytest.mark.parametrize("held", range(7))
def test_weights_are_the_same_with_shifts_and_with_a_snapshot(kind: str, held: int) -> None:
    one_by_one, late = model(kind), model(kind)
    always, came = FrozenWeights(one_by_one), FrozenWeights(late)
    snapshots = Snapshots()
    for i, one in enumerate(SHIFTS, 1):
        always.add(one)
        snapshots.of(SHIFTS[:i])  # from round to round, as the server does
    for one in SHIFTS[:held]:
        came.add(one)
    content = MessageWriter(8, SHIFTS, snapshot=snapshots.of(SHIFTS)).write(lora_state(), held=came.versions)
    received = read_message(content)
    came.add(*received.shifts, snapshot=received.snapshot)
    if held < 6:  # a client that lacks one round gets that round's shift: its 22 numbers are fewer than the 30 of q
        assert received.snapshot is not None and set(received.snapshot.tensors) == {"q.weight"}
    assert came.versions == always.versions == tuple(range(1, 8))
    dtype = torch.bfloat16 if kind == "quantised" else late["q"].weight.dtype  # type: ignore[union-attr]
    expected, actual = outputs(one_by_one, dtype), outputs(late, dtype)  # type: ignore[arg-type]
    assert all(torch.equal(actual[m], expected[m]) for m in SIZES)
    with torch.no_grad():
        first = outputs(model(kind), dtype)["q"]  # type: ignore[arg-type]
    assert not torch.equal(actual["q"], first)
    came.add(shift(8))
    always.add(shift(8))
    assert all(torch.equal(a, b) for a, b in zip(outputs(late, dtype).values(), outputs(one_by_one, dtype).values(), strict=True))  # type: ignore[arg-type]


def sizes(held: tuple[int, ...], shifts: list[AdapterState]) -> dict[str, int]:
    content = MessageWriter(9, shifts, snapshot=Snapshots().of(shifts)).write(lora_state(), held=held)
    received = read_message(content)
    return {"snapshot": received.snapshot.nbytes if received.snapshot else 0, **{f"{s.spec.version}": s.nbytes for s in received.shifts}}


def test_a_new_client_gets_at_most_the_size_of_the_weights() -> None:
    many = [shift(v) for v in range(1, 61)]
    assert sizes((), many) == {"snapshot": 4 * (30 + 1200), **{str(v): 0 for v in range(1, 61)}}  # 60 shifts are 44,160 bytes
    assert sizes(tuple(range(1, 60)), many) == {"snapshot": 0, "60": 4 * (2 * 11 + 2 * 70)}  # a client that lacks one round gets its shift
    assert sizes((1, 2, 99), many) == sizes((), many)  # weights with unknown shifts are reset to W0
    assert sizes((), many[:1]) == {"snapshot": 0, "1": 4 * 162} and sizes(tuple(range(1, 61)), many) == {"snapshot": 0}


def test_a_run_resumed_from_an_older_round_rebuilds_the_sum() -> None:
    snapshots = Snapshots()
    snapshots.of(SHIFTS)
    again = snapshots.of(SHIFTS[:3])
    assert again is not None and again.spec.version == 3
    total = torch.zeros(6, 5)
    for one in SHIFTS[:3]:
        total += one.product("q")
    assert torch.equal(again["q.weight"], total) and set(again.tensors) == {"q.weight"}
    assert Snapshots().of(SHIFTS[:1]) is None and Snapshots().of([]) is None


def test_a_snapshot_that_does_not_fit_changes_nothing() -> None:
    layers = model("fp32")
    before, frozen = layers["q"].weight.clone(), FrozenWeights(layers)  # type: ignore[operator]
    for name, total in (("q.weight", torch.ones(5, 6)), ("norm.weight", torch.ones(3, 3)), ("nope.weight", torch.ones(6, 5))):
        with pytest.raises(ModelError, match="load the same checkpoint"):
            frozen.add(shift(1), snapshot=AdapterState({name: total}, AdapterSpec(method="sum", version=1)))
        assert torch.equal(layers["q"].weight, before) and frozen.versions == ()  # type: ignore[arg-type]


# -- offers -------------------------------------------------------------------------------------------------------------------------------

PLAN = Plan(round=8, client="c", base_version=7)


def test_an_offer_announces_the_message_and_has_no_tensors() -> None:
    writer = MessageWriter(8, SHIFTS)
    content = writer.write(lora_state(), held=(1, 2), plan=PLAN)
    offer = writer.offer(content, lora_state(), (1, 2))
    assert offer is not None and not offer.array_records
    received, nbytes = read_offer(offer)
    whole = read_message(content)
    assert nbytes == whole.nbytes == lora_state().nbytes + 5 * 4 * 162
    assert (received.plan, received.round, received.adapter.spec) == (PLAN, 8, whole.adapter.spec)
    assert {n: t.shape for n, t in received.adapter.tensors.items()} == {n: t.shape for n, t in whole.adapter.tensors.items()}
    assert writer.offer(content, lora_state(), tuple(range(1, 8))) is None  # the adapter alone needs no offer


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"bytes": -1, "shapes": {}}', '{"bytes": Infinity, "shapes": {}}', '{"bytes": 1, "shapes": {"a": [-2]}}']
)
def test_an_invalid_offer_is_refused(text: str) -> None:
    writer = MessageWriter(8, SHIFTS)
    offer = writer.offer(writer.write(lora_state(), held=(), plan=PLAN), lora_state(), ())
    assert offer is not None
    offer["offer"] = ConfigRecord({"json": text})
    with pytest.raises(PlanError, match="the server's offer cannot be read"):
        read_offer(offer)


def test_a_client_that_declines_an_offer_gets_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int, set[str]]] = []
    push = InProcessGrid.push_messages
    small = "c1"

    def listen(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        sent.extend((m.metadata.message_type, m.metadata.dst_node_id, set(m.content.array_records)) for m in messages)
        return push(self, messages)

    app = fake_client_app({"c0": 1, "c1": 1, "c2": 1})
    answer = app.__call__

    def decline_offer(message: Message, context: Any) -> Message:
        if message.metadata.message_type == OFFER and context.node_config["partition-id"] == 1:
            declined = ConfigRecord({"kind": "deadline", "why": "too large"})
            return Message(RecordDict({"declined": declined}), reply_to=message)
        return answer(message, context)

    monkeypatch.setattr(InProcessGrid, "push_messages", listen)
    quiet = config(rounds=3, clients_per_round=3, min_clients=2, eval=EvalConfig(clients=0))
    bridge, observer = fake_bridge(tmp_path / "r", app, 3, quiet, strategy=FLoRA())
    monkeypatch.setattr(bridge.grid, "_app", decline_offer)
    state = bridge.loop()
    assert [s.spec.version for s in state.shifts] == [1, 2, 3]
    turns = [(node, names) for kind, node, names in sent if kind == "train"]
    assert [node for node, _ in turns] == [1, 2, 3, 1, 3, 1, 3]  # round 1 has no shifts and no offers
    assert all(names <= {"adapter"} for kind, _, names in sent if kind == OFFER) and {n for k, n, _ in sent if k == OFFER} == {1, 2, 3}
    declined = [r for r in observer.clients if r["client"] == small and r["round"] > 1]
    assert [r["dropped"] for r in declined] == ["deadline: too large"] * 2
    others = [r for r in observer.clients if r["client"] != small and r["round"] > 1]
    assert len(declined) == 2 and len(others) == 4
    assert max(r["bytes_down"] for r in declined) < min(r["bytes_down"] for r in others)


class Space:
    """A host with only the methods for reading an offer; its devices accept up to `max_bytes` bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.ledgers, self.floor, self.client_ids = max_bytes, None, None, ["c"]
        self.config, self.asked = config(), list[int]()
        self.devices = self.space = self.storage = self

    def is_offline(self, client: str, round: int) -> bool:
        return False

    def loaded_model(self, client: str) -> LoadedModel:
        return None  # type: ignore[return-value]

    def examples(self, client: str, part: str) -> list[int]:
        return [1, 2, 3]

    def complete(self, client: str, received: Any) -> AdapterState:
        return received.adapter

    def fit(self, plan: Plan, start: AdapterState, nbytes: int) -> None:
        self.asked.append(nbytes)
        if nbytes > self.max_bytes:
            raise Decline("deadline", "too much")


def test_a_device_decides_by_the_announced_size() -> None:
    plan = base_plan(config(), 8, "c", 7)
    writer = MessageWriter(8, SHIFTS)
    offer = writer.offer(writer.write(lora_state(), held=(), plan=plan), lora_state(), ())
    assert offer is not None
    message = Message(offer, 1, OFFER)
    context: Any = type("Context", (), {"node_config": {"partition-id": 0}})()
    both_ways = 2 * lora_state().nbytes + 7 * 4 * 162  # the adapter both ways, the shifts down
    fits, small = Space(both_ways), Space(both_ways - 1)
    check_offer(fits, message, context)  # type: ignore[arg-type]
    assert fits.asked == [both_ways]
    with pytest.raises(Decline, match="too much"):
        check_offer(small, message, context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turn", "params", "sentence"),
    [("nobody_s", {}, "nobody_s"), ("fedprox", {"nu": 1.0}, "nu"), ("fedprox", {"mu": -1.0}, "mu=-1")],
)
def test_a_turn_that_a_client_cannot_take_is_refused_before_tensors_are_sent(turn: str, params: dict[str, float], sentence: str) -> None:
    plan = dataclasses.replace(base_plan(config(), 8, "c", 7), turn=turn, params=params)
    writer, context = MessageWriter(8, SHIFTS), type("Context", (), {"node_config": {"partition-id": 0}})()
    offer = writer.offer(writer.write(lora_state(), held=(), plan=plan), lora_state(), ())
    assert offer is not None
    with pytest.raises(PlanError, match=sentence):
        check_offer(Space(10**9), Message(offer, 1, OFFER), context)  # type: ignore[arg-type]
