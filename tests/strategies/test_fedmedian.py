"""FedMedian on numbers that can be checked by hand."""

import itertools
from collections.abc import Callable
from random import Random

import pytest
import torch
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.contracts.strategy import ServerState
from fedtune.errors import UpdateMismatch
from fedtune.strategies import fedmedian as module
from fedtune.strategies.fedmedian import FedMedian
from tests.strategies.updates import close, plain, random_adapter, update, with_other_factors

START = ServerState(adapter=plain(0.0, 0.0))


def check_by_hand() -> None:
    updates = [update("a", plain(1.0, 9.0), 1), update("b", plain(2.0, -3.0), 1), update("c", plain(1000.0, 4.0), 98)]
    assert FedMedian().aggregate(1, START, iter(updates)).adapter["w"].tolist() == [2.0, 4.0]  # the mean would be 980 and 4
    assert FedMedian().aggregate(1, START, iter(updates[:2])).adapter["w"].tolist() == [1.5, 3.0]


def test_by_hand_for_any_number_of_examples() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(flower.FedAvg, id="the mean"),
        pytest.param(lambda: flower.FedTrimmedAvg(beta=0.0), id="nothing cut"),
        pytest.param(lambda: flower.Krum(num_malicious_nodes=1), id="the median client, not each coordinate's"),
    ],
)
def test_another_rule_is_caught(wrong: Callable[[], flower.FedAvg], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.flower, "FedMedian", wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], random: Random) -> None:
    updates = [update(f"c{i}", plain(v, -v)) for i, v in enumerate(values)]
    shuffled = random.sample(updates, len(updates))
    outs = [FedMedian().aggregate(1, START, iter(c)).adapter["w"] for c in (updates, shuffled)]
    assert torch.equal(outs[0], outs[1])


def test_any_malicious_minority_keeps_the_result_within_the_honest_values() -> None:
    state, honest = ServerState(adapter=random_adapter(0)), [update(f"c{i}", random_adapter(i + 1)) for i in range(3)]
    out = FedMedian().aggregate(1, state, [*honest, update("x", random_adapter(8, 1e6)), update("y", random_adapter(9, 1e6))]).adapter
    for name, t in out.tensors.items():
        seen = torch.stack([u.adapter[name] for u in honest])
        assert (t >= seen.min(0).values).all() and (t <= seen.max(0).values).all()


def test_the_median_depends_on_the_choice_of_factors() -> None:
    state, came = ServerState(adapter=random_adapter(0)), [random_adapter(i + 1) for i in range(3)]

    def product(adapters) -> torch.Tensor:
        out = FedMedian().aggregate(1, state, [update(f"c{i}", a) for i, a in enumerate(adapters)]).adapter
        return out["q.lora_B"] @ out["q.lora_A"]

    assert not torch.allclose(product(came), product([with_other_factors(a, i) for i, a in enumerate(came)]), atol=0.1)


def test_shifts_and_memory_stay() -> None:
    state = ServerState(adapter=random_adapter(0), memory={"x": torch.zeros(1)}, shifts=(random_adapter(3),))
    out = FedMedian().aggregate(1, state, [update("a", random_adapter(1))])
    assert out.shifts == state.shifts and out.memory == state.memory and close(out.adapter, random_adapter(1), atol=0)


def test_mixed_ranks_are_refused() -> None:
    short = random_adapter(1).replace({**random_adapter(1).tensors, "q.lora_B": random_adapter(1)["q.lora_B"][:, :1]})
    for order in itertools.permutations([update("a", random_adapter(2)), update("b", short)]):
        with pytest.raises(UpdateMismatch, match=r"client b: tensor 'q.lora_B' is \(3, 1\) instead of \(3, 2\)"):
            FedMedian().aggregate(1, ServerState(adapter=random_adapter(0)), iter(order))
