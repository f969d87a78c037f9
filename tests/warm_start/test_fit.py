"""An earlier adapter is fitted to a run without a change of the model, or refused with the setting to change."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.config import Config, ModelConfig, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.warm_start import WarmStart
from fedtune.errors import ConfigError, ModelError
from fedtune.models.adapter_folder import StoredAdapter
from fedtune.warm_start import Source, fit

IN, OUT = {"q": 5, "up": 3}, {"q": 3, "up": 7}


def lora(rank: int, alpha: float, seed: int, *, method: str = "lora", base: str = "b" * 64, zero: bool = False) -> AdapterState:
    """Two modules of this rank and a head of 4 classes."""
    gen, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for m in IN:
        tensors[f"{m}.lora_A"] = torch.randn(rank, IN[m], generator=gen)
        tensors[f"{m}.lora_B"] = torch.zeros(OUT[m], rank) if zero else torch.randn(OUT[m], rank, generator=gen)
    tensors["head.weight"] = torch.randn(4, 7, generator=gen)
    scaling = alpha / (rank**0.5 if method == "rslora" else rank)
    return AdapterState(tensors, AdapterSpec(method=method, base=base, ranks=dict.fromkeys(IN, rank), scaling=dict.fromkeys(IN, scaling)))


def source(state: AdapterState, config: Config | None = None, **more: Any) -> Source:
    labels = more.pop("labels", ())
    return Source(key="peft.from=X", name="X", sha256="0" * 64, adapter=StoredAdapter(state=state, **more), config=config, labels=labels)


def change(start: WarmStart, module: str) -> Tensor:
    """What the start's adapter and shifts together add to a module's weight."""
    return sum((s.product(module) for s in (start.adapter, *start.shifts) if module in s.spec.ranks), torch.zeros(()))


def begin(earlier: AdapterState, drawn: AdapterState, *, needs_zero: bool = False, **more: Any) -> WarmStart:
    return fit(source(earlier, **more), drawn, Config(), (), needs_zero=needs_zero)


def test_the_same_settings_continue_the_same_tensors() -> None:
    earlier, drawn = lora(2, 4.0, 1).replace(version=7), lora(2, 4.0, 2, zero=True)
    start = begin(earlier, drawn)
    assert all(torch.equal(start.adapter[n], t) for n, t in earlier.tensors.items()) and not start.shifts
    assert start.adapter.spec == drawn.spec and start.about == {"from": "X", "sha256": "0" * 64, "round": 7, "merged": False}


def test_cores_continue_between_their_own_bases() -> None:
    """Of a run with another seed, which would draw other bases."""
    earlier, drawn = (
        AdapterState({"q.core": torch.full((1, 2, 2), v)}, AdapterSpec(method="fedsb", basis=b)) for v, b in ((3.0, "1"), (0.0, "2"))
    )
    start = begin(earlier, drawn)
    assert start.adapter.spec.basis == "1" and torch.equal(start.adapter["q.core"], earlier["q.core"])


@pytest.mark.parametrize(("rank", "alpha", "method"), [(3, 4.0, "lora"), (2, 3.0, "lora"), (4, 8.0, "rslora")])
def test_a_larger_rank_and_another_scaling_leave_the_product(rank: int, alpha: float, method: str) -> None:
    earlier, drawn = lora(2, 4.0, 1), lora(rank, alpha, 2, zero=True, method=method)
    start = begin(earlier, drawn)
    for m in IN:
        torch.testing.assert_close(change(start, m), earlier.product(m), rtol=1e-6, atol=1e-6)
        # the new components can learn: A as drawn, and only B is zero
        assert torch.equal(start.adapter[f"{m}.lora_A"][2:], drawn[f"{m}.lora_A"][2:]) and not start.adapter[f"{m}.lora_B"][:, 2:].any()
    assert start.adapter.spec == drawn.spec and torch.equal(start.adapter["head.weight"], earlier["head.weight"])


@pytest.mark.parametrize("rank", [1, 2, 4])  # a merged start may have any rank
def test_a_strategy_that_assumes_a_zero_product_begins_with_it_merged(rank: int) -> None:
    earlier, drawn = lora(2, 4.0, 1), lora(rank, 4.0, 2, zero=True)
    start = begin(earlier, drawn, needs_zero=True)
    (shift,) = start.shifts
    assert shift.spec.version == 0 and shift.spec.base == drawn.spec.base and start.about["merged"] is True
    for m in IN:
        torch.testing.assert_close(change(start, m), earlier.product(m), rtol=1e-5, atol=1e-5)
        assert torch.equal(start.adapter[f"{m}.lora_A"], drawn[f"{m}.lora_A"]) and not start.adapter[f"{m}.lora_B"].any()
    assert torch.equal(start.adapter["head.weight"], earlier["head.weight"])


def test_an_adapter_with_a_zero_product_is_continued_by_every_strategy() -> None:
    earlier, drawn = lora(2, 4.0, 1, zero=True), lora(2, 4.0, 2, zero=True)  # the state that fedsa leaves on the server
    start = begin(earlier, drawn, needs_zero=True)
    assert torch.equal(start.adapter["q.lora_A"], earlier["q.lora_A"]) and not start.shifts


@pytest.mark.parametrize("needs_zero", [False, True])
def test_the_shifts_of_the_earlier_run_become_one(needs_zero: bool) -> None:
    earlier, drawn = lora(2, 4.0, 1), lora(2, 4.0, 2, zero=True)
    shifts = tuple(
        AdapterState(
            {n: t for n, t in lora(3, 3.0, 10 + i).tensors.items() if n.startswith("q.")},
            AdapterSpec(method="lora", base="b" * 64, version=i, ranks={"q": 3}, scaling={"q": 1.0}),
        )
        for i in (1, 2)
    )
    start = begin(earlier, drawn, shifts=shifts, needs_zero=needs_zero)
    expected = earlier.product("q") + shifts[0].product("q") + shifts[1].product("q")
    torch.testing.assert_close(change(start, "q"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(change(start, "up"), earlier.product("up"), rtol=1e-5, atol=1e-5)
    assert [s.spec.version for s in start.shifts] == [0]
    assert start.shifts[0].spec.ranks["q"] <= min(IN["q"], OUT["q"])  # not the sum of all ranks


def test_the_head_of_a_peft_folder_is_used_too() -> None:
    whole, drawn = lora(2, 4.0, 1, base=""), lora(2, 4.0, 2, zero=True)
    factors = whole.subset([n for n in whole.tensors if "lora" in n])
    start = begin(factors, drawn, heads={"head.weight": whole["head.weight"]})
    assert torch.equal(start.adapter["head.weight"], whole["head.weight"]) and start.adapter.spec.base == drawn.spec.base


def rename(state: AdapterState, old: str, new: str) -> AdapterState:
    put = {m.replace(old, new): m for m in state.spec.ranks}
    return AdapterState(
        {n.replace(old, new): t for n, t in state.tensors.items()},
        dataclasses.replace(
            state.spec, ranks={n: state.spec.ranks[m] for n, m in put.items()}, scaling={n: state.spec.scaling[m] for n, m in put.items()}
        ),
    )


DRAWN, EARLIER = lora(2, 4.0, 2, zero=True), lora(2, 4.0, 1)
BEFORE = Config(peft=PeftConfig(targets=["q", "up"]), model=ModelConfig(source="hub", name="some/model"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (source(EARLIER.replace(method="dora")), r"has peft\.method=dora, but this run has lora: set peft=dora"),
        (source(EARLIER.replace(base="c" * 64)), "belongs to the backbone cccccccccccc, but this run has bbbbbbbbbbbb: use the checkpoint"),
        (source(EARLIER.replace(base="c" * 64), BEFORE), "trained on, model.source=hub model.name=some/model"),
        (source(rename(EARLIER, "up", "down")), r"'down\.lora_A' \(2 such\), which this run's lacks: set peft\.targets=\[down,q\]"),
        (source(rename(EARLIER, "up", "down"), BEFORE), r'set peft\.targets=\["q","up"\], as its run did'),
        (source(EARLIER.subset(["q.lora_A", "q.lora_B", "up.lora_A", "up.lora_B"])), r"'head\.weight' \(1 such\), which it lacks"),
        (source(lora(3, 4.0, 1)), r"has rank 3 at 'q', but this run's rank is 2, and a smaller .*: set peft\.rank=3"),
        (source(EARLIER.replace({**EARLIER.tensors, "up.lora_A": torch.ones(2, 9)})), r"'up\.lora_A' of the shape \(2, 9\), .* \(2, 3\)"),
        (source(EARLIER.replace({**EARLIER.tensors, "head.weight": torch.ones(9, 7)})), r"'head\.weight' of the shape \(9, 7\)"),
        (source(EARLIER, over={"precision": "nf4", "compute": "bf16"}), "set peft.init=loftq model.precision=nf4 model.compute=bf16"),
        (source(EARLIER, labels=("a", "b", "c", "d")), "has a head for the classes a, b, c, d, but this run's classes are d, c, b, a"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_setting_to_change(given: Source, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^peft.from=X .*{sentence}"):
        fit(given, DRAWN, Config(), ("d", "c", "b", "a") if given.labels else (), needs_zero=False)


def test_loftq_needs_a_start_of_its_own() -> None:
    with pytest.raises(ConfigError, match="computes a start of its own, so peft.from=X cannot be one: set peft.init=default"):
        fit(source(EARLIER), DRAWN, Config(peft=PeftConfig(init="loftq")), (), needs_zero=False)


def test_a_method_that_cannot_be_merged_is_refused_where_the_product_must_be_zero() -> None:
    dora = [s.replace(method="dora") for s in (EARLIER, DRAWN)]
    with pytest.raises(ConfigError, match="assumes B·A = 0 .* peft.method=dora cannot be merged .*: take strategy=fedavg"):
        fit(source(dora[0]), dora[1], Config(peft=PeftConfig(method="dora")), (), needs_zero=True)


def test_values_that_are_not_finite_are_refused() -> None:
    bad = EARLIER.replace({**EARLIER.tensors, "q.lora_B": torch.full((3, 2), float("nan"))})
    with pytest.raises(ModelError, match=r"peft.from=X: 'q\.lora_B' has values that are not finite numbers"):
        fit(source(bad), DRAWN, Config(), (), needs_zero=False)


def test_the_classes_do_not_matter_without_a_head() -> None:
    factors = [s.subset([n for n in s.tensors if "lora" in n]) for s in (EARLIER, DRAWN)]
    fit(source(factors[0], labels=("a", "b")), factors[1], Config(), ("c", "d"), needs_zero=False)
