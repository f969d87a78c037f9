import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Config, WeightsConfig
from fedtune.contracts.plan import LateUpdate, Update
from fedtune.contracts.strategy import ServerState
from fedtune.rounds.staleness import LateUpdates
from fedtune.rounds.weights import largest_share, max_weight
from fedtune.strategies.fedavg import FedAvg
from tests.fakes import fail, fake_bridge, fake_client_app, lora_state

HOMES = {f"h{i:02}": 10 for i in range(11)}


@pytest.mark.parametrize(
    ("counts", "share", "most"),
    [
        ([1, 3], Fraction(1), 3),  # no client is cut
        ([1, 3], Fraction(1, 2), 1),  # two clients and half each: equal
        ([10] * 11 + [10**9], Fraction(1, 4), 36),  # τ = ¼·110 / (1 − ¼) = 36.7
        ([10, 10, 500, 1000], Fraction(2, 5), 40),  # two are cut: τ = ⅖·20 / (1 − ⅘) = 40
        ([5, 7, 9], Fraction(1, 3), 5),  # equal shares: all as the smallest
        ([0, 4, 8], Fraction(1, 2), 4),  # a client without rows has no weight
        ([0], Fraction(1), 0),
        ([], Fraction(1), 0),
    ],
)
def test_the_largest_weight_by_hand(counts: list[int], share: Fraction, most: int) -> None:
    assert max_weight(counts, share) == most
    weights = [min(n, most) for n in counts]
    assert all(w <= share * sum(weights) for w in weights)


def test_the_default_share_is_unlimited_on_an_engine_and_at_most_half_on_a_network() -> None:
    free = WeightsConfig()
    assert largest_share(free, 12, engine=True) is None
    assert [largest_share(free, m, engine=False) for m in (1, 2, 4, 12)] == [1, Fraction(1, 2), Fraction(1, 2), Fraction(1, 4)]
    assert largest_share(WeightsConfig(max_share=0.125), 12, engine=True) == Fraction(1, 8)
    assert largest_share(WeightsConfig(max_share=0.125), 4, engine=False) == Fraction(1, 4)  # an equal share is always allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(FedAvg):
    """FedAvg that records the weights of its updates."""

    seen: dict[str, int] = dataclasses.field(default_factory=dict)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        def record_weights() -> Iterable[Update]:
            for update in updates:
                self.seen[update.client] = update.examples
                yield update

        return super().aggregate(round, state, record_weights())


def run(path: Path, faults: dict[str, Any] | None = None, **changes: Any) -> tuple[Remembering, torch.Tensor, Any]:
    strategy, config = Remembering(), Config(rounds=1, clients_per_round=12, weights=changes.pop("weights", WeightsConfig()))
    bridge, observer = fake_bridge(path, fake_client_app({**HOMES, "liar": 99_000}, faults), 12, config, strategy=strategy, **changes)
    config = dataclasses.replace(
        bridge.config, client=dataclasses.replace(bridge.config.client, lr=1e6)
    )  # its step is as large as the number of rows it claims
    state = dataclasses.replace(bridge, config=config).loop()
    return strategy, state.adapter["head.weight"], observer


def test_a_client_on_a_network_cannot_choose_its_own_share(tmp_path: Path) -> None:
    strategy, head, observer = run(tmp_path / "r", expected_clients=12)
    assert strategy.seen == {**HOMES, "liar": 36}
    # by hand: eleven homes send 0 + 10 with weight 10, the liar 0 + 99000 with weight 36 of 146
    assert torch.allclose(head, torch.full_like(head, (11 * 10 * 10 + 36 * 99_000) / 146))
    line = next(r for r in observer.clients if r["client"] == "liar" and r["round"] == 1)
    assert line["weight"] == 36 and line["examples"] == 99_000
    assert "a client has at most 0.25 of the weight of a round of 12 clients (weights.max_share)" in observer.notes[0]
    assert "round 1: client liar has weight 36 instead of its 99000 examples (weights.max_share)" in observer.notes
    assert observer.records[1]["train_loss"] == 1.0


def test_an_engine_s_clients_weigh_all_their_rows_unless_a_share_is_set(tmp_path: Path) -> None:
    strategy, _, observer = run(tmp_path / "free")
    assert strategy.seen == {**HOMES, "liar": 99_000} and observer.notes == []
    strategy, _, observer = run(tmp_path / "set", weights=WeightsConfig(max_share=0.25))
    assert strategy.seen["liar"] == 36


def test_a_late_reply_has_the_weight_of_the_round_that_it_counts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Belated(LateUpdates):
        def take(self, round: int) -> Iterator[LateUpdate]:
            update = Update(client="liar", round=0, base_version=0, adapter=lora_state(fill=0.0), examples=99_000)
            yield LateUpdate(update=update, due=round)

    monkeypatch.setattr("fedtune.rounds.bridge.LateUpdates", Belated)
    strategy, _, observer = run(tmp_path / "r", {"liar": fail("not in time")}, expected_clients=12)
    assert strategy.seen == {**HOMES, "liar": 36} and observer.records[1]["counted"] == 11
