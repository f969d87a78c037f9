"""Codecs between bridge and clients: the codec of each assignment, the traffic limit, and refused replies."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedtune.config import Config, TrafficConfig
from fedtune.config.compose import compose
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, ServerState
from fedtune.contracts.wire import MessageWriter, read_message
from fedtune.errors import ConfigError, UpdateError, UpdateMismatch
from fedtune.rounds.outbox import reply_bytes
from fedtune.rounds.reply import read_update
from fedtune.strategies.fedavg import FedAvg
from fedtune.traffic import Codec, broadcaster, decode_broadcast, encode_update, with_codec
from tests.fakes import fake_bridge, fake_client_app, lora_state


def codec_of(config: TrafficConfig, **plan: Any) -> str:
    assignment = Assignment(plan=Plan(round=1, client="a", base_version=0, **plan), adapter=lora_state())
    return with_codec(config, {"a": assignment})["a"].plan.codec


def test_the_codec_of_each_assignment() -> None:
    assert codec_of(TrafficConfig()) == ""
    assert codec_of(TrafficConfig(up="int8", topk=0.1, error_feedback=True, stochastic=True)) == "topk=0.1+int8+stochastic+feedback"
    assert (
        codec_of(TrafficConfig(down="int8", stochastic=True)) == "fp32"
    )  # a difference, so that the broadcast's rounding stays with the client
    looked = Assignment(plan=Plan(round=1, client="a", base_version=0), adapter=lora_state(), expect=lora_state())
    assert with_codec(TrafficConfig(up="int8"), {"a": looked})["a"].plan.codec == ""


@pytest.mark.parametrize("words", [["traffic=topk", "traffic.up=int8"], ["traffic.up=int8", "traffic=topk"],
                                   ["traffic=int8", "traffic.down=fp32", "traffic.topk=0.05", "traffic.error_feedback=true"]])  # fmt: skip
def test_choices_compose_in_any_order(words: list[str]) -> None:
    assert codec_of(compose(words)[0].config.traffic) == "topk=0.05+int8+feedback"


def test_settings_without_an_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="^traffic.stochastic=true has no effect with fp32"):
        compose(["traffic.stochastic=true"])
    with pytest.raises(ConfigError, match="^traffic.error_feedback=true has no effect, because updates are sent exactly"):
        compose(["traffic.error_feedback=true"])


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "fedsvd"])
def test_strategies_with_new_factors_refuse_error_feedback(strategy: str) -> None:
    from fedtune.rounds.find_strategy import make_strategy

    with pytest.raises(ConfigError, match="computes new factors in every round, .* set traffic.error_feedback=false$"):
        make_strategy(compose([f"strategy={strategy}", "traffic=topk"])[0].config)
    make_strategy(compose([f"strategy={strategy}", "traffic=int8"])[0].config)


def test_a_broadcast_is_encoded_once_and_read_back() -> None:
    adapter, first = lora_state(seed=1, version=3), lora_state(seed=2)
    writer = MessageWriter(4, [], broadcaster(TrafficConfig(down="int8"), first, 0, 4))
    one, two = (writer.write(adapter, held=()) for _ in range(2))
    assert one["adapter"] is two["adapter"]
    received = read_message(one)
    decoded = decode_broadcast(received.encoding, received.adapter, first.tensors)
    assert list(decoded.tensors) == list(adapter.tensors) and decoded.spec == adapter.spec
    assert all(0 < (decoded[n] - t).abs().max() < 0.03 for n, t in adapter.tensors.items())  # blocks of absmax 3: half a step is 0.012
    assert broadcaster(TrafficConfig(up="int8"), first, 0, 4) is None


def reply_of(assignment: Assignment, adapter: AdapterState) -> RecordDict:
    plan = assignment.plan
    update = Update(
        client=plan.client,
        round=plan.round,
        base_version=plan.base_version,
        adapter=adapter,
        examples=3,
        measurements={"steps": 2, "lr_sum": 2.0},
    )
    return RecordDict({"adapter": adapter.to_arrays(), "update": ConfigRecord({"json": update.to_json(), "spec": adapter.spec.to_json()})})


def assignment_of(codec: str) -> Assignment:
    return Assignment(plan=Plan(round=1, client="a", base_version=0, codec=codec, lr=1.0, lr_last=1.0, steps=2), adapter=lora_state())


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8+stochastic", "nf4", "topk=0.2+int8"])
def test_a_reply_is_decoded_before_it_counts(name: str) -> None:
    start, given = lora_state(), assignment_of(name)
    trained = start.replace({n: t + 0.25 for n, t in start.tensors.items()})
    sent, _ = encode_update(Codec.from_name(name), trained, start.tensors, {}, 0)
    content = reply_of(given, sent)
    update = read_update(content, given)
    assert {n: t.shape for n, t in update.adapter.tensors.items()} == {n: t.shape for n, t in start.tensors.items()}
    moved = torch.cat([(update.adapter[n] - start[n]).flatten() for n in start.tensors])
    if name.startswith("topk"):
        assert int((moved.abs() > 0.2).sum()) == 11 and int((moved == 0).sum()) == 43  # ⌈0.2 · 54⌉ = 11
    else:
        assert torch.allclose(moved, torch.tensor(0.25), rtol=1e-5)
    assert 0 <= reply_bytes(given) - flower.Meter()(content) < 1000  # the estimate is sufficient and close


@pytest.mark.parametrize("down", ["fp16", "bf16", "int8", "nf4"])
def test_the_broadcasts_rounding_stays_out_of_the_servers_state(down: str) -> None:
    config, server, first = TrafficConfig(down=down), lora_state(seed=1), lora_state(seed=2)
    given = with_codec(config, {"a": assignment_of("")})["a"]
    given = dataclasses.replace(given, adapter=server)
    encode = broadcaster(config, first, 0, 1)
    assert encode is not None
    sent, header = encode(server)
    client = decode_broadcast(header, sent, first.tensors)  # it starts at the rounded state; here it trains nothing
    assert not any(torch.equal(client[n], t) for n, t in server.tensors.items())
    reply, _ = encode_update(Codec.from_name(given.plan.codec), client, client.tensors, {}, 0)
    kept = read_update(reply_of(given, reply), given).adapter
    assert all(torch.equal(kept[n], t) for n, t in server.tensors.items())
    # if the client sent its tensors instead of a difference, the rounding would return
    plain = read_update(reply_of(assignment_of(""), client), assignment_of("")).adapter
    assert not any(torch.equal(plain[n], t) for n, t in server.tensors.items())


def test_a_reply_in_another_codec_is_refused() -> None:
    given = assignment_of("int8")
    with pytest.raises(UpdateMismatch, match="array '#q' of the encoded tensors is missing"):
        read_update(reply_of(given, lora_state()), given)
    other, _ = encode_update(Codec(values="nf4"), lora_state(seed=1), lora_state().tensors, {}, 0)
    with pytest.raises(UpdateMismatch, match=r"array '#q' of the encoded tensors is torch.uint8 \(\d+,\), wanted torch.int8"):
        read_update(reply_of(given, other), given)
    with pytest.raises(UpdateError, match="tensor 'q.lora_A' is missing"):
        read_update(reply_of(assignment_of(""), other), assignment_of(""))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frugal(FedAvg):
    """Sends client a only the head."""

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        whole, head = super().plan(round, plans, state), state.adapter.subset(["head.weight"])
        return {**whole, "a": Assignment(plan=dataclasses.replace(whole["a"].plan, send=("head.weight",)), adapter=head)}


def limit_config(limit: float | None) -> Config:
    return Config(rounds=1, clients_per_round=2, traffic=TrafficConfig(max_mb_per_round=limit))


def megabytes_of(tmp_path: Path) -> dict[str, float]:
    bridge, observer = fake_bridge(tmp_path / "free", fake_client_app({"a": 1, "b": 3}), 2, limit_config(None), strategy=Frugal())
    bridge.loop()
    return {c["client"]: (c["bytes_up"] + c["bytes_down"]) / 1e6 for c in observer.clients if c["round"] == 1}


def test_the_metrics_report_the_bytes_on_the_wire(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, limit_config(None), strategy=Frugal())
    grid: Any = bridge.grid
    push, pull, down, up = grid.push_messages, grid.pull_messages, dict[int, int](), dict[int, int]()

    def length(message: Any) -> int:
        return len(recorddict_to_proto(message.content).SerializeToString())

    def record_push(messages: Any) -> Any:
        sent = list(messages)
        down.update({m.metadata.dst_node_id: length(m) for m in sent if m.metadata.message_type == "train"})
        return push(sent)

    def record_pull(ids: Any) -> Any:
        came = list(pull(ids))
        up.update({m.metadata.src_node_id: length(m) for m in came if m.metadata.message_type == "train"})
        return came

    grid.push_messages, grid.pull_messages = record_push, record_pull
    bridge.loop()
    lines = [c for c in observer.clients if c["round"] == 1]
    assert sorted(c["bytes_down"] for c in lines) == sorted(down.values()) and sorted(c["bytes_up"] for c in lines) == sorted(up.values())
    assert len(down) == len(up) == 2
    assert observer.records[1]["bytes_down"] == sum(down.values()) and observer.records[1]["bytes_up"] == sum(up.values())


def test_a_client_over_the_limit_is_dropped(tmp_path: Path) -> None:
    cost = megabytes_of(tmp_path)
    between = (cost["a"] + cost["b"]) / 2 + 0.0007  # the estimate of a reply allows for some text
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, limit_config(between), strategy=Frugal())
    state = bridge.loop()
    a, b = (c for c in observer.clients if c["round"] == 1)
    assert observer.records[1]["dropped"] == {"traffic": 1} and "dropped" not in a and b["bytes_down"] == 0
    assert b["dropped"].startswith("traffic: ") and "exceed traffic.max_mb_per_round=" in b["dropped"]
    assert torch.equal(state.adapter["head.weight"], torch.ones(4, 7))  # only a's reply


def test_a_limit_below_all_clients_stops_the_run_at_its_start(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}), 2, limit_config(0.001), strategy=Frugal())
    with pytest.raises(ConfigError, match="^no client could take part: .* MB down and .* MB up exceed traffic.max_mb_per_round=0.001"):
        bridge.loop()
    assert all(c["round"] == 0 for c in observer.clients)


def test_a_reply_over_the_limit_is_refused(tmp_path: Path) -> None:
    def enlarge_reply(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        return ArrayRecord({**arrays, "more": Array(torch.zeros(9000))}), text

    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 3}, {"b": enlarge_reply}), 2, limit_config(0.03))
    bridge.loop()
    (b,) = (c for c in observer.clients if c["round"] == 1 and c["client"] == "b")
    assert b["dropped"].startswith("refused: 0.00") and "0.039" not in b["dropped"].split(" MB down")[0]
    assert b["bytes_up"] > 36_000 and observer.records[1]["counted"] == 1
