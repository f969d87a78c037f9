"""Rounds with fewer updates than a robust rule needs: they do not count, and the run continues."""

from pathlib import Path

import pytest
import torch

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.strategies.bulyan import Bulyan
from fedtune.strategies.fedmedian import FedMedian
from fedtune.strategies.fedtrimmedavg import FedTrimmedAvg
from fedtune.strategies.krum import Krum
from fedtune.strategies.multikrum import MultiKrum
from tests.fakes import fail, fake_bridge, fake_client_app, lora_state
from tests.strategies.updates import close, random_adapter, update

RULES = [Krum(malicious=2), MultiKrum(malicious=2, select=3), Bulyan(malicious=1), FedMedian(), FedTrimmedAvg(beta=0.49)]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_any_number_of_updates_is_accepted(rule: Strategy, count: int) -> None:
    state, updates = (
        ServerState(adapter=random_adapter(0), shifts=(random_adapter(9),)),
        [update(f"c{i}", random_adapter(i + 1), i + 1) for i in range(count)],
    )
    after = rule.aggregate(1, state, iter(updates))  # the bridge aggregates before it counts updates, so this runs in every short round
    assert list(after.adapter.tensors) == list(state.adapter.tensors) and after.shifts == state.shifts
    assert all(torch.isfinite(t).all() and t.shape == state.adapter[n].shape for n, t in after.adapter.tensors.items())
    if count == 1 and not isinstance(rule, Bulyan):
        assert close(
            after.adapter, updates[0].adapter, atol=1e-6
        )  # so only `min_clients` prevents that one client's update becomes the model


@pytest.mark.parametrize("rule", [Krum(malicious=1), MultiKrum(malicious=1, select=2), Bulyan(malicious=0)], ids=lambda r: type(r).__name__)
def test_a_short_round_leaves_the_state_and_the_run_continues(rule: Strategy, tmp_path: Path) -> None:
    names = "abcdefg"
    away = {c: lambda round, arrays, text: fail("away")(round, arrays, text) if round == 2 else (arrays, text) for c in "abcdef"}
    config = Config(rounds=3, clients_per_round=7, min_clients=5)
    rule.check(config)
    clients = fake_client_app(dict.fromkeys(names, 2), away)
    bridge, observer = fake_bridge(tmp_path / "run", clients, 7, config, strategy=rule, initial=lora_state(fill=0.0))
    state = bridge.loop()
    bridge.run.close()
    assert [r["counted"] for r in observer.records[1:]] == [7, 1, 7]
    assert any("round 2 does not count: it has 1 good updates, fewer than min_clients=5" in n for n in observer.notes)
    # every client adds 2 in a round that counts
    assert all(bool((t == 4.0).all()) for t in state.adapter.tensors.values())
