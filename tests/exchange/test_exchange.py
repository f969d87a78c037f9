"""Exchanges with one or several messages per client, which control what the strategy sees of the replies."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save_file

from fedtune.clients.declining import decline_on_error
from fedtune.config import Config, PrivacyConfig
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import Decline
from fedtune.exchange import CentralDP, Channel, Exchange, LocalDP, NoUpdates, Plain, make_exchange
from fedtune.runs.directory import read_checkpoint
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedmedian import FedMedian
from tests.exchange.channel import FixedChannel
from tests.fakes import fake_bridge, fake_client_app, lora_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStages(Exchange):
    """Each client first sends a number; clients that did then train. The strategy sees their tensors' mean, weighted by the numbers."""

    def start(self) -> Mapping[str, torch.Tensor]:
        return {"rounds": torch.tensor(0)}

    def exclusions(self, round: int, clients: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        return {c: ("closed", "never on a second round") for c in clients if c == "z" and round == 2}

    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        ask = RecordDict({"ask": ConfigRecord({"round": round})})
        numbers = {c: float(str(reply["answer"]["number"])) for c, reply in channel.ask("number", dict.fromkeys(channel.cohort, ask))}  # type: ignore[index]
        total: dict[str, torch.Tensor] = {}
        for update in channel.train():
            for name, tensor in update.adapter.tensors.items():
                total[name] = total.get(name, torch.zeros(())) + tensor.double() * numbers.get(update.client, 0.0)
        after = strategy.aggregate_mean(round, state, {n: t / sum(numbers.values()) for n, t in total.items()})
        return dataclasses.replace(after, exchange={"rounds": state.exchange["rounds"] + 1})

    def figures(self, round: int, before: ServerState, after: ServerState) -> Mapping[str, float]:
        return {"stages": 2.0 * float(after.exchange["rounds"])}


def two_stage_app(examples: Mapping[str, int], mute: str = "") -> ClientApp:
    app, ids = fake_client_app(examples), sorted(examples)

    @app.query("number")
    @decline_on_error
    def number(message: Message, context: Context) -> Message:
        client = ids[int(context.node_config["partition-id"])]
        if client == mute:
            raise Decline("offline", "no number today")
        return Message(RecordDict({"answer": ConfigRecord({"number": str(10 * examples[client])})}), reply_to=message)

    return app


def test_an_exchange_of_two_stages(tmp_path: Path) -> None:
    clients = {"a": 1, "b": 3, "z": 5}
    at, observer = fake_bridge(
        tmp_path / "r", two_stage_app(clients, mute="b"), 3, Config(rounds=2, clients_per_round=3), exchange=TwoStages()
    )
    state = at.loop()
    # round 1: b sends no number and has no weight: (10·1 + 50·5) / 60 = 13/3; round 2: only a, which adds 1
    assert float(state.adapter["head.weight"][0, 0]) == pytest.approx(13 / 3 + 1)
    assert [r["stages"] for r in observer.records[1:]] == [2.0, 4.0] and int(state.exchange["rounds"]) == 2
    lines = {(r["round"], r["client"]): r for r in observer.clients}
    assert lines[1, "b"]["dropped"] == "offline: no number today"
    assert lines[2, "z"] == {"round": 2, "client": "z", "dropped": "closed: never on a second round"} | {
        k: v for k, v in lines[2, "z"].items() if k not in ("round", "client", "dropped")
    }
    # the first stage's messages are counted: the client sent more than one update
    alone, quiet = fake_bridge(tmp_path / "plain", fake_client_app(clients), 3, Config(rounds=1, clients_per_round=3))
    alone.loop()
    plain = {r["client"]: r for r in quiet.clients if r["round"] == 1}
    assert lines[1, "a"]["bytes_up"] > plain["a"]["bytes_up"] and lines[1, "a"]["bytes_down"] > plain["a"]["bytes_down"]


def test_a_resumed_run_keeps_the_exchange_s_state(tmp_path: Path) -> None:
    clients, config = {"a": 1, "b": 3, "z": 5}, Config(rounds=3, clients_per_round=3)
    whole = fake_bridge(tmp_path / "whole", two_stage_app(clients), 3, config, exchange=TwoStages())[0].loop()
    fake_bridge(tmp_path / "part", two_stage_app(clients), 3, dataclasses.replace(config, rounds=1), exchange=TwoStages())[0].loop()
    resumed = fake_bridge(tmp_path / "part", two_stage_app(clients), 3, config, exchange=TwoStages())[0].loop()
    assert int(resumed.exchange["rounds"]) == 3
    assert all(torch.equal(resumed.adapter[n], t) for n, t in whole.adapter.tensors.items())


@pytest.mark.parametrize("exchange", [Plain(), LocalDP(cohort=3)])
def test_a_round_without_replies_does_not_count(exchange: Exchange) -> None:
    with pytest.raises(NoUpdates):
        exchange.run(1, ServerState(adapter=lora_state()), FedAvg(), FixedChannel([]))


def updates(*fills: float) -> Iterator[Update]:
    for k, fill in enumerate(fills):
        yield Update(client=f"c{k}", round=1, base_version=0, adapter=lora_state(fill=fill), examples=1 + 9 * k)


def test_the_local_mean_divides_by_the_planned_cohort() -> None:
    state = ServerState(adapter=lora_state(fill=1.0))
    after = LocalDP(cohort=4).run(1, state, FedAvg(), FixedChannel([*updates(3.0, 6.0)]))
    assert float(after.adapter["head.weight"][0, 0]) == 1 + (2 + 5) / 4


def test_a_strategy_that_needs_each_update_has_no_mean() -> None:
    with pytest.raises(NotImplementedError, match="FedMedian needs each client's own update"):
        LocalDP(cohort=2).run(1, ServerState(adapter=lora_state()), FedMedian(), FixedChannel([*updates(3.0)]))


def test_the_config_selects_the_exchange() -> None:
    def exchange(**privacy: str | float | None) -> Exchange:
        return make_exchange(Config(clients_per_round=7, privacy=PrivacyConfig(**privacy)), 5, Path("x"))  # type: ignore[arg-type]

    assert type(exchange()) is type(exchange(kind="record")) is Plain
    assert exchange(kind="user", where="client") == LocalDP(cohort=5)
    central = exchange(kind="user", noise=1.0)
    assert isinstance(central, CentralDP) and central.cohort == 5


def test_a_checkpoint_of_version_0_1_keeps_its_clip_norm(tmp_path: Path) -> None:
    config = Config(rounds=1, clients_per_round=2, privacy=PrivacyConfig(kind="user", noise=0.1, epsilon=None, clip=0.7))
    exchange = make_exchange(config, 2, tmp_path / "privacy")
    fake_bridge(tmp_path / "r", fake_client_app({"a": 1, "b": 2}), 2, config, exchange=exchange)[0].loop()
    folder = tmp_path / "r" / "checkpoints" / "round-0001"
    assert float(read_checkpoint(folder).state.exchange["clip"]) == 0.7 and read_checkpoint(folder).state.memory == {}
    # format of version 0.1: the clip norm is in the strategy's memory
    (folder / "exchange.safetensors").unlink()
    save_file({**load_file(folder / "memory.safetensors"), "privacy.clip": torch.tensor(0.3)}, folder / "memory.safetensors")
    body = json.loads((folder / "checkpoint.json").read_text())
    del body["sha256"]["exchange.safetensors"], body["sha256"]["memory.safetensors"]
    (folder / "checkpoint.json").write_text(json.dumps(body))
    old = read_checkpoint(folder).state
    assert float(old.exchange["clip"]) == pytest.approx(0.3) and old.memory == {}
