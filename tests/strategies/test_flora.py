"""FLoRA: the weights become the mean of the clients' weights, for any ranks, counts and scalings."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import METHODS, Config, DeviceClass, DevicesConfig, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.errors import ConfigError
from fedtune.strategies import _lowrank, flora
from fedtune.strategies.flora import FLoRA
from tests.strategies.lowrank import (
    SHAPES,
    adapter,
    assert_equal,
    assert_exact_on_conv1d,
    change,
    cohort,
    delta,
    in_bf16,
    mean,
    swap_if_square,
    zero_adapter,
)


def test_the_product_is_the_weighted_mean_by_hand() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 1.0})

    def rank_one(n: int, a: float, b: float) -> Update:
        state = AdapterState({"q.lora_A": torch.tensor([[float(a)]]), "q.lora_B": torch.tensor([[float(b)]])}, spec)
        return Update(client=str(n), round=1, base_version=0, adapter=state, examples=n)

    updates = [rank_one(1, a=1, b=1), rank_one(3, a=5, b=5)]
    after = FLoRA().aggregate(1, FLoRA().start(updates[0].adapter), iter(updates))
    # by hand: (1*1*1 + 3*5*5) / 4 = 19; averaging a and b separately gives 4 * 4 = 16
    (shift,) = after.shifts
    assert (shift["q.lora_B"] @ shift["q.lora_A"]).item() == 19.0 and shift.spec.scaling == {"q": 1.0} and shift.spec.version == 1
    assert after.adapter["q.lora_B"].item() == 0.0


@settings(deadline=None, max_examples=25)
@given(clients=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 1000)), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_mixed_ranks_counts_and_scalings_are_exact(clients: list[tuple[int, int]], seed: int) -> None:
    updates = cohort([r for r, _ in clients], [n for _, n in clients], seed=seed)
    after = FLoRA().aggregate(1, FLoRA().start(zero_adapter(4)), iter(updates))
    assert_equal(change(after), mean(updates))
    # the stack itself if it is no larger than the layer; else its singular vectors above float32's resolution
    total = sum(r for r, _ in clients)
    for module, rank in after.shifts[0].spec.ranks.items():
        assert rank == total if total <= min(SHAPES[module]) else rank <= min(SHAPES[module])


def test_the_result_is_exact_on_gpt2_layers() -> None:
    assert_exact_on_conv1d(FLoRA())


def test_a_bf16_adapter_is_exact_too() -> None:
    (start,) = in_bf16(cohort([2], [1]))
    updates = in_bf16(cohort())
    after = FLoRA().aggregate(1, FLoRA().start(start.adapter), iter(updates))
    assert_equal(change(after), mean(updates))  # the shift stays float32
    assert {t.dtype for t in after.adapter.tensors.values()} == {torch.bfloat16}


def test_one_client_keeps_its_own_update() -> None:
    (alone,) = cohort([3], [5])
    assert_equal(change(FLoRA().aggregate(1, FLoRA().start(adapter(rank=3)), iter([alone]))), delta(alone.adapter))


def test_the_order_of_clients_changes_nothing() -> None:
    start, updates = FLoRA().start(adapter()), cohort()
    for some in itertools.permutations(updates):
        after = FLoRA().aggregate(1, start, iter(some))
        assert_equal(change(after), mean(updates))
        assert torch.allclose(
            after.adapter["score.weight"], sum((u.examples / 48 * u.adapter["score.weight"] for u in updates), torch.zeros(2, 7)), atol=1e-6
        )


def test_a_client_that_missed_rounds_replays_them_to_the_same_weights() -> None:
    strategy, state = FLoRA(), FLoRA().start(adapter())
    w = {m: torch.zeros(shape) for m, shape in SHAPES.items()}  # a client's float32 weights minus W0

    def replay(seen: int) -> None:
        for shift in state.shifts:
            if shift.spec.version > seen:
                for module, part in delta(shift).items():
                    w[module] += part.float()

    expected = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    for round in (1, 2, 3, 4):
        updates = cohort(seed=10 * round)
        state = strategy.aggregate(round, state, iter(updates))
        expected = {m: expected[m] + part for m, part in mean(updates).items()}
        if round == 1:
            replay(seen=0)  # the client was in round 1's cohort, then absent for two rounds
    replay(seen=1)
    assert [s.spec.version for s in state.shifts] == [1, 2, 3, 4]
    assert_equal({m: x.double() for m, x in w.items()}, expected)


def test_a_client_gets_the_rank_of_its_device() -> None:
    state = FLoRA().aggregate(1, FLoRA().start(adapter(rank=4, alpha=6.0)), iter(cohort([4, 1], [1, 2])))
    plans = [Plan(round=2, client=c, base_version=1, rank=r) for c, r in (("laptop", None), ("phone", 3), ("watch", 1))]
    assignments = FLoRA().plan(2, plans, state)
    assert assignments["laptop"].adapter is state.adapter
    for client, rank, s in (("phone", 3, 2.0), ("watch", 1, 6.0)):  # s_k = alpha / r_k
        sent = assignments[client].adapter
        for module, (rows, columns) in SHAPES.items():
            assert sent.spec.ranks[module] == rank and sent.spec.scaling[module] == pytest.approx(s)
            assert (
                torch.equal(sent[f"{module}.lora_A"], state.adapter[f"{module}.lora_A"][:rank])
                and columns == sent[f"{module}.lora_A"].shape[1]
            )
            assert sent[f"{module}.lora_B"].shape == (rows, rank) and not sent[f"{module}.lora_B"].any()


def test_a_new_a_is_kaiming_and_depends_on_round_module_and_initial_adapter() -> None:
    updates = cohort()

    def fresh(round: int, seed: int) -> list[torch.Tensor]:
        after = FLoRA().aggregate(round, FLoRA().start(adapter(seed)), iter(updates)).adapter
        return [after[f"{m}.lora_A"] for m in SHAPES]

    first = fresh(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, fresh(1, 0), strict=True))
    assert not any(torch.equal(a, b) for other in (fresh(2, 0), fresh(1, 1)) for a, b in zip(first, other, strict=True))
    draws = [fresh(round, 0) for round in range(1, 21)]
    for a, (_, columns) in zip(zip(*draws, strict=True), SHAPES.values(), strict=True):
        assert 0.97 / math.sqrt(columns) < torch.stack(a).abs().max() <= 1 / math.sqrt(columns)  # kaiming_uniform(a=√5) is U(±1/√in)


def test_the_largest_stack_of_a_cohort_is_checked_before_the_run() -> None:
    phones = DevicesConfig(classes={"phone": DeviceClass(rank=4)})
    FLoRA(max_rank=80).check(Config(clients_per_round=10, peft=PeftConfig(rank=8)))
    FLoRA(max_rank=40).check(Config(clients_per_round=10, peft=PeftConfig(rank=8), devices=phones))
    with pytest.raises(ConfigError, match="clients_per_round=10 of rank 8 stack to 80 rows, but strategy.max_rank=79: raise it, or lower"):
        FLoRA(max_rank=79).check(Config(clients_per_round=10, peft=PeftConfig(rank=8)))
    with pytest.raises(ConfigError, match="rank 16 stack to 160 rows"):
        FLoRA(max_rank=80).check(Config(clients_per_round=10, peft=PeftConfig(rank=8, rank_pattern={"q": 16})))


@pytest.mark.parametrize("method", METHODS)
def test_only_plain_lora_is_accepted(method: str) -> None:
    config = Config(peft=PeftConfig(method=method))
    if method in ("lora", "rslora"):
        FLoRA().check(config)
    else:
        with pytest.raises(ConfigError, match=rf"strategy=flora does not work with peft.method={method}: .*take peft=lora or peft=rslora"):
            FLoRA().check(config)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda terms: swap_if_square(_lowrank.stack(terms)), id="A and B swapped"),
        pytest.param(lambda terms: _lowrank.stack([(1 / len(terms), a, b) for _, a, b in terms]), id="weights dropped"),
        pytest.param(lambda terms: _lowrank.stack([(w / 3 * len(a), a, b) for w, a, b in terms]), id="scalings dropped"),  # s = 3/r
    ],
)
def test_a_wrong_stack_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = cohort([1, 2, 1])
    monkeypatch.setattr(flora, "stack", wrong)
    after = FLoRA().aggregate(1, FLoRA().start(adapter()), iter(updates))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(change(after), mean(updates))
