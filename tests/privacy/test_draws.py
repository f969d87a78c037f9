"""The noise and accounting of private turns: separate noise in each turn, the rate of a whole step, a client's sensitivity."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedtune.config import ClientConfig, Config, PrivacyConfig, check
from fedtune.contracts.strategy import ServerState
from fedtune.errors import UpdateError
from fedtune.exchange import make_exchange
from fedtune.experiment import simulate
from fedtune.privacy.accounting import Spend, epsilon, solve_noise
from fedtune.privacy.dpsgd import PrivateGradient
from fedtune.privacy.turn import turn_privacy
from fedtune.privacy.user import moved
from fedtune.privacy.verify import verify
from fedtune.rounds.planning import base_plan
from fedtune.rounds.reply import read_update
from fedtune.runs.report import read_metrics
from fedtune.strategies.fedavg import FedAvg
from tests.exchange.channel import FixedChannel
from tests.exchange.test_central_dp import update
from tests.fakes import lora_state
from tests.quick import quick
from tests.tiny import tiny_config

RECORD = PrivacyConfig(kind="record", epsilon=8.0, clip=0.5, accountant="rdp")
LOCAL = PrivacyConfig(kind="user", where="client", epsilon=8.0, clip=0.5, accountant="rdp")


def smallest_distance(drawn: list[Tensor]) -> float:
    """The smallest distance between two results, relative to the mean distance of independent ones of their size."""
    return min(float((a - b).norm() / (a.norm() ** 2 + b.norm() ** 2).sqrt()) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("kind", quick(["record", "user"], "user"))
def test_every_client_round_and_step_has_its_own_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # the noise is a thousand times the effect of the rows: two results with the same noise are equal to three digits
    loud = dataclasses.replace(RECORD if kind == "record" else LOCAL, epsilon=None, noise=1000.0, clip=1e-3)
    drawn, right = list[Tensor](), PrivateGradient.step

    def step(self: PrivateGradient) -> dict[str, Tensor]:
        out = right(self)
        drawn.append(torch.cat([t.flatten().double() for t in out.values()]))
        return out

    def read(content: RecordDict, assignment: Any, **rest: Any) -> Any:
        got = read_update(content, assignment, **rest)
        drawn.append(torch.cat([t.flatten() for t in moved(got.adapter.tensors, assignment.adapter.tensors).values()]))
        return got

    if kind == "record":
        monkeypatch.setattr(PrivateGradient, "step", step)
    else:
        monkeypatch.setattr("fedtune.rounds.round.read_update", read)
    simulate(check(tiny_config(tmp_path, privacy=loud)))
    assert len(drawn) == (16 if kind == "record" else 8)  # four clients, two rounds, and two steps each
    assert smallest_distance(drawn) > 0.8


def test_the_server_s_noise_differs_by_round_and_run(tmp_path: Path) -> None:
    config = Config(rounds=3, clients_per_round=4, privacy=PrivacyConfig(kind="user", clip=1.0, noise=1.0, epsilon=None))
    sent, drawn = [update("a", lora_state(fill=0.0))], list[Tensor]()
    for seed, round in itertools.product((0, 1), (1, 2, 3)):
        exchange = make_exchange(dataclasses.replace(config, seed=seed), 4, tmp_path / f"{seed}-{round}")
        begin = ServerState(adapter=lora_state(fill=0.0), exchange=exchange.start())
        after = exchange.run(round, begin, FedAvg(), FixedChannel(sent))
        drawn.append(torch.cat([t.flatten() for t in after.adapter.tensors.values()]))
    assert smallest_distance(drawn) > 0.5  # few entries


def test_every_turn_has_its_own_seed() -> None:
    turns = list(itertools.product((0, 1), (1, 2, 3), ("a", "b", "c0", "c1")))
    seeds = {base_plan(Config(seed=seed), round, client, 0).seed for seed, round, client in turns}
    assert len(seeds) == len(turns) == 24


@pytest.mark.slow
def test_the_sampling_rate_covers_a_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, right = list[float](), PrivateGradient.step

    def step(self: PrivateGradient) -> dict[str, Tensor]:
        rates.append(self.rate)
        return right(self)

    monkeypatch.setattr(PrivateGradient, "step", step)
    client = ClientConfig(steps=2, epochs=None, batch_size=2, accumulate=2, lr=1e-2, schedule="constant")
    run = simulate(check(tiny_config(tmp_path, privacy=RECORD, client=client, rounds=1)))
    reported = [r["dp_sample_rate"] for r in read_metrics(run) if r["client"] is not None and r["round"] == 1]
    # two batches of two of a client's eight rows make a step: q = 4 / 8, both in sampling and in accounting
    assert reported == [0.5] * 4 and rates == [0.5] * 8


def test_noise_at_the_client_counts_half() -> None:
    plan = base_plan(Config(rounds=2, privacy=dataclasses.replace(LOCAL, epsilon=None, noise=6.0)), 1, "c0", 0)
    fixed = turn_privacy(plan, 8, 2)
    # any other data of a client moves its update by up to 2C: noise of 6C is 3 times that
    assert fixed is not None and fixed.noise == 6.0 and fixed.cost == Spend(noise=3.0, rate=1.0, steps=1)
    solved = turn_privacy(base_plan(Config(rounds=2, privacy=LOCAL), 1, "c0", 0), 8, 2)
    alone = solve_noise(8.0, 1e-5, 1.0, 2, "rdp")
    assert solved is not None and solved.noise == 2 * alone and solved.cost == Spend(noise=alone, rate=1.0, steps=1)
    record = turn_privacy(base_plan(Config(rounds=2, privacy=dataclasses.replace(RECORD, epsilon=None, noise=6.0)), 1, "c0", 0), 100, 2)
    assert record is not None and record.noise == record.cost.noise == 6.0 and record.cost.steps == 2


def test_an_epsilon_of_sensitivity_c_is_refused_at_the_client() -> None:
    plan = base_plan(Config(rounds=2, privacy=LOCAL), 1, "c0", 0)
    metrics = {"steps": 2.0, "dp_clip": 0.5, "dp_noise": 6.0, "dp_sample_rate": 1.0, "dp_steps": 1.0}
    right, half = (epsilon([Spend(noise=z, rate=1.0, steps=1)], 1e-5) for z in (3.0, 6.0))
    verify(plan, {**metrics, "epsilon": right})
    with pytest.raises(UpdateError, match="with which a single step costs more"):
        verify(plan, {**metrics, "epsilon": half})
