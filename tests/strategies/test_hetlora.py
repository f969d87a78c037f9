"""HetLoRA: truncation, padding and weights by the product's norm, on numbers that can be checked by hand."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import hetlora
from fedtune.strategies.hetlora import HetLoRA, padded, ranks_of, truncated
from tests.fakes import fake_bridge, fake_client_app, lora_state


def module(a: list[list[float]], b: list[list[float]], s: float = 1.0) -> AdapterState:
    return AdapterState(
        {"q.lora_A": torch.tensor(a), "q.lora_B": torch.tensor(b)}, AdapterSpec(method="lora", ranks={"q": len(a)}, scaling={"q": s})
    )


def update(client: str, adapter: AdapterState, n: int = 1) -> Update:
    return Update(client=client, round=1, base_version=0, adapter=adapter, examples=n)


def plans(**ranks: int | None) -> list[Plan]:
    return [Plan(round=1, client=c, base_version=0, rank=r) for c, r in ranks.items()]


def dense(adapter: AdapterState, name: str = "q") -> Tensor:
    return adapter.spec.scaling[name] * adapter[f"{name}.lora_B"].double() @ adapter[f"{name}.lora_A"].double()


# -- the server's half --------------------------------------------------------------------------------------------------------------------


def by_hand(variant: str = "paper") -> float:
    """Distance of the aggregate of a rank-1 and a rank-2 client from the result by hand."""
    state = HetLoRA().start(module([[9.0, 9.0, 9.0], [9.0, 9.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]]))
    small = update("a", module([[1.0, 0.0, 0.0]], [[3.0], [0.0]]), n=1000)  # ‖BA‖ = 3; its examples do not count
    large = update("b", module([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]], [[0.0, 0.0], [0.0, 0.5]]))  # BA = [[0 0 0], [0 0 1]]: 1
    out = HetLoRA(variant=variant).aggregate(1, state, iter([small, large])).adapter
    # weights 3/4 and 1/4: A = [[.75 .25 0], [0 0 .5]], B = [[2.25 0], [0 .125]]
    a, b = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.5]]), torch.tensor([[2.25, 0.0], [0.0, 0.125]])
    if variant == "covered":  # only the large client has the second component
        a[1], b[:, 1] = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 0.5])
    return max(float((out["q.lora_A"] - a).abs().max()), float((out["q.lora_B"] - b).abs().max()))


@pytest.mark.parametrize("variant", ["covered", "paper"])
def test_a_small_and_a_large_client_by_hand(variant: str) -> None:
    assert by_hand(variant) == 0.0


@pytest.mark.parametrize("variant", ["covered", "paper"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda term: 1.0,  # no weights
        lambda term: float((term[2] @ term[1]).square().sum()),  # the norm's square
        lambda term: float(term[1].norm() * term[2].norm()),  # ‖B‖‖A‖, an easy mistake
    ],
)
def test_the_check_notices_wrong_weights(variant: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hetlora, "norm", wrong)
    assert by_hand(variant) > 0.01


def test_heads_are_averaged_by_examples() -> None:
    state = HetLoRA().start(lora_state())
    ones, fives = (lora_state(seed=3).replace({**lora_state(seed=3).tensors, "head.weight": torch.full((4, 7), v)}) for v in (1.0, 5.0))
    out = HetLoRA().aggregate(1, state, iter([update("a", ones, 1), update("b", fives, 3)])).adapter
    assert torch.equal(out["head.weight"], torch.full((4, 7), 4.0))  # (1*1 + 3*5) / 4


def test_equal_ranks_and_norms_give_the_plain_mean() -> None:
    first = lora_state(seed=1)
    turned = first.replace({n: -t for n, t in first.tensors.items()})  # (-B)(-A): the same product
    swapped = first.replace({n: t.flip(-1) if n.endswith("lora_A") else t.flip(0) for n, t in first.tensors.items()})  # the same norm
    state, clients = HetLoRA().start(lora_state()), [first, turned, swapped]
    out = HetLoRA().aggregate(1, state, iter([update(f"c{i}", a, n) for i, (a, n) in enumerate(zip(clients, (1, 9, 90), strict=True))]))
    for name in ("q.lora_A", "q.lora_B", "up.lora_A", "up.lora_B"):
        expected = sum((c[name].double() for c in clients), torch.zeros(())) / 3
        torch.testing.assert_close(out.adapter[name].double(), expected, atol=1e-6, rtol=0)


@given(st.integers(0, 5), st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_padding_and_rescaling_leave_the_product_alone(more: int, own: float, slot: float, seed: int) -> None:
    adapter = lora_state(seed=seed)
    adapter = adapter.replace(scaling={"q": own, "up": own})
    a, b = padded(adapter, "q", 2 + more, slot)
    assert a.shape == (2 + more, 5) and b.shape == (3, 2 + more)
    torch.testing.assert_close(slot * b @ a, dense(adapter), atol=1e-12, rtol=1e-12)


def test_zero_products_have_equal_and_negligible_weights() -> None:
    state = HetLoRA().start(module([[9.0]], [[9.0]]))
    both = HetLoRA().aggregate(1, state, iter([update("a", module([[1.0]], [[0.0]])), update("b", module([[3.0]], [[0.0]]))])).adapter
    assert (both["q.lora_A"].item(), both["q.lora_B"].item()) == (2.0, 0.0)
    one = HetLoRA().aggregate(1, state, iter([update("a", module([[1.0]], [[0.0]])), update("b", module([[3.0]], [[5.0]]))])).adapter
    assert (one["q.lora_A"].item(), one["q.lora_B"].item()) == (3.0, 5.0)


@pytest.mark.parametrize(("variant", "column"), [("covered", 6.0), ("paper", 0.0)])
def test_rows_that_nobody_trained_can_still_learn(variant: str, column: float) -> None:
    state = HetLoRA().start(module([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]))
    out = HetLoRA(variant=variant).aggregate(1, state, iter([update("a", module([[7.0, 8.0]], [[9.0]]))])).adapter
    # if both this row and B's column were zero, neither would ever have a gradient
    assert out["q.lora_A"].tolist() == [[7.0, 8.0], [3.0, 4.0]]
    assert out["q.lora_B"].tolist() == [[9.0, column]]


# -- assignments to clients, and pruning ---------------------------------------------------------------------------------------------------


def test_each_client_gets_the_first_rows_of_its_rank() -> None:
    state = HetLoRA().start(lora_state())
    assignments = HetLoRA(tail_penalty=0.5, tail_share=0.8).plan(1, plans(a=1, b=None, c=1, d=64), state)
    assert assignments["b"].adapter is state.adapter and assignments["d"].adapter is state.adapter  # the global rank is the maximum
    assert assignments["a"].adapter is assignments["c"].adapter  # encoded once
    small = assignments["a"].adapter
    assert dict(small.spec.ranks) == {"q": 1, "up": 1} and small.spec.scaling == state.adapter.spec.scaling
    assert list(small.tensors) == list(state.adapter.tensors)  # the client receives and, with send="*", returns these names
    assert torch.equal(small["q.lora_A"], state.adapter["q.lora_A"][:1])
    assert torch.equal(small["q.lora_B"], state.adapter["q.lora_B"][:, :1])
    expected = ("hetlora", {"penalty": 0.5, "share": 0.8}, ("*",), True)
    assert all((g.plan.turn, g.plan.params, g.plan.send, g.may_prune) == expected for g in assignments.values())


def test_cutting_what_padding_added_is_the_identity() -> None:
    adapter = lora_state(seed=4)
    a, b = padded(adapter, "q", 6, 2.0)
    wide = adapter.replace({**adapter.tensors, "q.lora_A": a.float(), "q.lora_B": b.float()}, ranks={"q": 6, "up": 1})
    back = truncated(wide, {"q": 2, "up": 1})
    assert all(torch.equal(back[n], adapter[n]) for n in adapter.tensors) and back.spec == adapter.spec


def test_a_pruned_rank_is_permanent(tmp_path: Path) -> None:
    strategy, state = HetLoRA(tail_penalty=1e-3), HetLoRA().start(lora_state())
    pruned = truncated(lora_state(seed=2), {"q": 1, "up": 1})
    state = strategy.aggregate(1, state, iter([update("a", pruned), update("b", lora_state(seed=3))]))
    assert dict(state.adapter.spec.ranks) == {"q": 2, "up": 1}  # the global ranks
    # a checkpoint keeps names sorted, so that spec.ranks comes back in another order
    AdapterState(dict(state.memory), AdapterSpec(method="memory")).save(tmp_path / "memory")
    swapped = state.adapter.replace(ranks=dict(sorted(state.adapter.spec.ranks.items(), reverse=True)))
    state = ServerState(adapter=swapped, memory=AdapterState.load(tmp_path / "memory").tensors)
    assignments = strategy.plan(2, plans(a=None, b=None, c=None), state)
    assert [assignments[c].adapter.spec.ranks["q"] for c in "abc"] == [1, 2, 2]
    state = strategy.aggregate(2, state, iter([update("b", lora_state(seed=3))]))  # a is not sampled, but its rank stays
    assert ranks_of(plans(a=None)[0], state) == {"q": 1, "up": 1}


def test_without_pruning_no_ranks_are_stored() -> None:
    strategy = HetLoRA(tail_penalty=0.0)
    state = strategy.aggregate(1, strategy.start(lora_state()), iter([update("a", truncated(lora_state(seed=2), {"q": 1, "up": 1}))]))
    assert not state.memory and dict(ranks_of(plans(a=None)[0], state)) == {"q": 2, "up": 1}


def test_two_rounds_over_the_wire_by_hand(tmp_path: Path) -> None:
    config = Config(rounds=2, clients_per_round=2)
    pruning = HetLoRA(tail_penalty=1e-3)
    bridge, observer = fake_bridge(
        tmp_path / "run", fake_client_app({"a": 2, "b": 2}), 2, config, strategy=pruning, initial=lora_state(fill=0.0)
    )
    state = bridge.loop()
    assert [r["dropped"] for r in observer.records[1:]] == [{}, {}]
    assert all(bool((t == 4.0).all()) for t in state.adapter.tensors.values())  # two equal clients add 2 a round
    assert sorted(state.memory) == ["rank/a", "rank/b"]


@pytest.mark.parametrize(
    ("strategy", "config", "sentence"),
    [
        (HetLoRA(), Config(peft=PeftConfig(method="dora")), "strategy=hetlora does not work with peft.method=dora"),
        (HetLoRA(variant="x"), Config(), "strategy.variant=x is not known: choose covered or paper"),
        (HetLoRA(tail_penalty=-1.0), Config(), "tail_penalty=-1.0"),
        (HetLoRA(tail_penalty=math.nan), Config(), "tail_penalty=nan"),
        (HetLoRA(tail_share=1.0), Config(), "tail_share=1.0"),
    ],
)
def test_invalid_settings_are_refused(strategy: HetLoRA, config: Config, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        strategy.check(config)
