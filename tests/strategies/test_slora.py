"""SLoRA on numbers that can be checked by hand, and its switch from the sparse stage to LoRA on random ones."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.config import Config, DeviceClass, DevicesConfig, EvalConfig, ModelConfig, PeftConfig
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState, random_mask
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.experiment import simulate
from fedtune.rounds.find_strategy import make_strategy
from fedtune.runs.report import read_metrics
from fedtune.strategies import slora
from fedtune.strategies.slora import SLoRA
from tests.quick import quick
from tests.tiny import tiny_config


def lora(shapes: Mapping[str, tuple[int, int]], *, rank: int = 1, scaling: float = 4.0, method: str = "lora") -> AdapterState:
    """A fresh adapter: A of ones, B = 0, and a head."""
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors |= {f"{module}.lora_A": torch.ones(rank, columns), f"{module}.lora_B": torch.zeros(rows, rank)}
    spec = AdapterSpec(method=method, base="b", ranks=dict.fromkeys(shapes, rank), scaling=dict.fromkeys(shapes, scaling))
    return AdapterState({**tensors, "score.weight": torch.zeros(2)}, spec)


def reply(strategy: SLoRA, state: ServerState, client: str, n: int, values: Mapping[str, Any], round: int = 1) -> Update:
    """A client's update: the requested tensors with these values."""
    plan, given = assign(strategy, state, round)
    requested = given.expect or given.adapter.subset(matching(given.adapter.tensors, plan.send))
    tensors = {k: torch.as_tensor(values.get(k, t), dtype=t.dtype).expand(t.shape) for k, t in requested.tensors.items()}
    return Update(client=client, round=round, base_version=0, adapter=requested.replace(tensors), examples=n)


def assign(strategy: SLoRA, state: ServerState, round: int = 1) -> tuple[Plan, Any]:
    assignments = strategy.plan(round, [Plan(round=round, client="c", base_version=0)], state)["c"]
    return assignments.plan, assignments


def product(state: AdapterState, module: str) -> Tensor:
    return state.spec.scaling[module] * state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()


def switched_state(dense: Tensor, *, rank: int, mode: str = "corrected", scaling: float = 0.5) -> ServerState:
    """The state after a whole sparse stage that taught a matrix `dense`: one client, one round, every entry under the mask."""
    strategy = SLoRA(rounds=1, seed=3, density=1.0, mode=mode)
    start = strategy.start(lora({"q": (dense.shape[0], dense.shape[1])}, rank=rank, scaling=scaling))
    return strategy.aggregate(1, start, iter([reply(strategy, start, "c", 5, {"q.sparse": dense.flatten()})]))


def keeps_everything(dense: Tensor, rank: int) -> bool:
    """Whether D = s·B·A + the shift, and the shift is as small as Eckart and Young allow."""
    after = switched_state(dense, rank=rank)
    left = dense.double() - product(after.adapter, "q")
    tail = torch.linalg.svdvals(dense.double())[rank:].square().sum().sqrt()
    moved = sum((product(s, "q") for s in after.shifts), torch.zeros_like(left))
    scale = 1e-6 * float(1 + dense.norm())
    return bool((left - moved).abs().max() < scale and (left.norm() - tail).abs() < scale)


@pytest.mark.parametrize("mode", ["corrected", "paper"])
def test_without_training_nothing_changes(mode: str) -> None:
    """Sparse values stay 0, the switch sets B = 0, and LoRA rounds return their assignments."""
    strategy = SLoRA(rounds=20, seed=0, density=0.5, mode=mode)
    state = strategy.start(lora({"q": (2, 3), "v": (4, 3)}, rank=2))
    for round in range(1, 6):
        state = strategy.aggregate(round, state, iter([reply(strategy, state, c, n, {}, round) for c, n in (("a", 1), ("b", 6))]))
    assert state.adapter.spec.method == "lora"
    for module in ("q", "v"):
        moved = sum((product(s, module) for s in state.shifts), product(state.adapter, module))
        assert moved.abs().max() == 0, module
    assert state.adapter["score.weight"].abs().max() == 0 and state.adapter["q.lora_A"].abs().max() > 0


def test_values_are_averaged_by_examples() -> None:
    strategy = SLoRA(rounds=20, seed=0, density=0.5)  # 10 % of 20: rounds 1 and 2 are sparse
    state = strategy.start(lora({"q": (2, 3)}))
    assert state.adapter.spec.method == "sparse" and state.adapter["q.sparse"].tolist() == [0, 0, 0]
    one = reply(strategy, state, "c1", 1, {"q.sparse": [1, 0, 0], "score.weight": [8, 0]})
    two = reply(strategy, state, "c2", 3, {"q.sparse": [5, 4, 0], "score.weight": [0, 4]})
    after = strategy.aggregate(1, state, iter([one, two])).adapter
    # by hand: (1*1 + 3*5)/4 = 4, 3*4/4 = 3; head 8/4 = 2, 3*4/4 = 3
    assert after["q.sparse"].tolist() == [4, 3, 0] and after["score.weight"].tolist() == [2, 3]


def test_the_switch_by_hand() -> None:
    after = switched_state(torch.tensor([[3.0, 0, 0], [0, 2, 0]]), rank=1, scaling=4.0)
    # sigma = 3, 2: s·B·A holds the 3, the shift the 2; B = ±sqrt(3)/sqrt(4); energy 9 / (9 + 4)
    assert after.adapter.spec.method == "lora" and list(after.adapter.tensors) == ["q.lora_A", "q.lora_B", "score.weight"]
    torch.testing.assert_close(product(after.adapter, "q"), torch.tensor([[3.0, 0, 0], [0, 0, 0]]).double())
    assert after.adapter["q.lora_B"].abs().flatten().tolist() == pytest.approx([3**0.5 / 2, 0])
    torch.testing.assert_close(product(after.shifts[0], "q"), torch.tensor([[0.0, 0, 0], [0, 2, 0]]).double())
    assert after.shifts[0].spec.version == 1 and after.shifts[0].spec.ranks == {"q": 1}
    assert after.memory["energy/q"].item() == pytest.approx(9 / 13)
    assert switched_state(torch.tensor([[3.0, 0, 0], [0, 2, 0]]), rank=1, mode="paper").shifts == ()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_switch_loses_the_tail_and_the_shift_has_it(rows: int, columns: int, rank: int, seed: int) -> None:
    assert keeps_everything(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), rank)


def test_the_check_of_the_switch_detects_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    right = slora._split

    def without_scaling(d: Tensor, start: Tensor, scaling: float) -> Any:
        return right(d, start, 1.0)

    def transpose(d: Tensor, start: Tensor, scaling: float) -> Any:
        return right(d.reshape(d.shape[::-1]).T.contiguous(), start, scaling)

    def without_tail(d: Tensor, start: Tensor, scaling: float) -> Any:
        factors, (a, b), energy = right(d, start, scaling)
        return factors, (a[1:], b[:, 1:]), energy

    assert keeps_everything(dense, 2)
    for wrong in (without_scaling, transpose, without_tail):
        monkeypatch.setattr(slora, "_split", wrong)
        assert not keeps_everything(dense, 2), wrong.__name__


def test_directions_unused_in_the_sparse_stage_can_still_be_learned() -> None:
    dense = torch.zeros(3, 4)
    dense[1, 2] = 5.0
    after = switched_state(dense, rank=3).adapter
    torch.testing.assert_close(product(after, "q"), dense.double())
    assert after["q.lora_A"][1:].eq(1).all() and not after["q.lora_B"][:, 1:].any()  # rows of the first A, B = 0
    nothing = switched_state(torch.zeros(3, 4), rank=2)
    assert nothing.adapter["q.lora_A"].eq(1).all() and not nothing.adapter["q.lora_B"].any()
    assert nothing.shifts == () and nothing.memory["energy/q"] == 1


def test_rounding_errors_are_not_directions_of_the_sparse_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randint(-3, 4, size, generator=generator).float() for size in ((120, 2), (2, 150)))
    after = switched_state(b @ a, rank=5)  # exactly of rank 2, but the other singular values are computed as about σ₁ · 1e-16
    assert after.adapter["q.lora_A"][2:].eq(1).all() and not after.adapter["q.lora_B"][:, 2:].any()  # rows of the first A, B = 0
    assert after.adapter["q.lora_B"][:, :2].any(0).all() and after.shifts == ()


def test_the_mask_is_the_same_on_every_machine() -> None:
    # drawn in another process: the mask is never sent, so a change of these numbers would break every running client
    assert random_mask("0", "q", 35, 6).tolist() == [5, 8, 10, 13, 29, 30]


def test_masked_entries_are_written_at_the_masks_positions() -> None:
    strategy = SLoRA(rounds=1, seed=7, density=0.4)
    start = strategy.start(lora({"q": (3, 5)}, rank=3))
    after = strategy.aggregate(1, start, iter([reply(strategy, start, "c", 1, {"q.sparse": [1, 2, 3, 4, 5, 6]})]))
    expected = torch.zeros(15, dtype=torch.float64)
    expected[random_mask("7", "q", 15, 6)] = torch.arange(1.0, 7.0, dtype=torch.float64)
    torch.testing.assert_close(product(after.adapter, "q"), expected.view(3, 5))  # rank 3: nothing is lost
    assert after.memory["energy/q"].item() == pytest.approx(1)


def test_payloads_hold_the_masked_entries_and_the_head() -> None:
    shapes = {"q": (30, 50), "up": (70, 30)}
    state = SLoRA(rounds=9, seed=0).start(lora(shapes, rank=2))
    plan, given = assign(SLoRA(rounds=9, seed=0), state)
    assert (plan.turn, plan.params) == ("slora", {"stage": "sparse"})
    assert list(given.adapter.tensors) == ["q.sparse", "up.sparse", "score.weight"]
    # 1 % of 1500 and of 2100 entries, and 2 of the head, in float32
    assert given.adapter.nbytes == (15 + 21 + 2) * 4
    assert matching(given.adapter.tensors, plan.send) == list(given.adapter.tensors) and given.expect is None
    budget = SLoRA(rounds=9, seed=0, density=None).start(lora(shapes, rank=2)).adapter
    assert (len(budget["q.sparse"]), len(budget["up.sparse"])) == (2 * 80, 2 * 100)  # r (in + out)


def test_a_mask_by_gradient_takes_the_largest_of_the_mean() -> None:
    strategy = SLoRA(rounds=10, seed=0, density=0.34, mask="gradient")
    state = strategy.start(lora({"q": (2, 3)}))
    assert state.adapter.spec.method == "lora" and strategy.last_sparse_round == 2  # one round for the gradients, and 10 % of 10 rounds
    plan, assignment = assign(strategy, state)
    assert (plan.turn, plan.params) == ("slora", {"stage": "gradient"}) and not assignment.adapter.tensors
    assert {n: t.shape for n, t in assignment.expect.tensors.items()} == {
        "q.gradient": (2, 3)
    } and assignment.expect.spec == state.adapter.spec
    one = reply(strategy, state, "c1", 1, {"q.gradient": [[9, 0, 0], [0, 0, 4]]})
    two = reply(strategy, state, "c2", 3, {"q.gradient": [[0, 3, 0], [2, 0, 1]]})
    after = strategy.aggregate(1, state, iter([one, two]))
    # by hand, times 4: [[9, 9, 0], [6, 0, 7]]; round(.34 * 6) = 2 entries
    assert after.adapter["q.index"].tolist() == [0, 1] and after.adapter["q.index"].dtype == torch.int32
    plan, given = assign(strategy, after, 2)
    assert (plan.turn, given.adapter.spec.mask) == ("slora", "")
    assert list(given.adapter.tensors) == ["q.index", "q.sparse", "score.weight"]
    assert matching(given.adapter.tensors, plan.send) == ["q.sparse", "score.weight"]
    done = strategy.aggregate(2, after, iter([reply(strategy, after, "c", 1, {"q.sparse": [3, 4]}, 2)]))
    torch.testing.assert_close(product(done.adapter, "q"), torch.tensor([[3.0, 4, 0], [0, 0, 0]]).double())
    assert list(done.adapter.tensors) == ["q.lora_A", "q.lora_B", "score.weight"]


def test_a_lost_sparse_round_is_repeated_and_then_rounds_are_fedavg() -> None:
    strategy = SLoRA(rounds=10, seed=0, density=1.0)  # only round 1 is sparse, but it does not count
    state = strategy.start(lora({"q": (2, 3)}, rank=2, method="rslora"))
    after = strategy.aggregate(4, state, iter([reply(strategy, state, "c", 1, {"q.sparse": torch.ones(6)}, 4)]))
    assert after.adapter.spec.method == "rslora" and after.adapter.spec.mask == "" and set(after.memory) == {"energy/q"}
    assert "keeps 100% of the energy" in strategy.notes(4, state, after)[0] and "q 100%" in strategy.notes(4, state, after)[0]
    plan, given = assign(strategy, after, 5)
    assert plan.turn == "plain" and given.adapter is after.adapter
    ones, fives = ({n: torch.full(t.shape, v) for n, t in after.adapter.tensors.items()} for v in (1.0, 5.0))
    last = strategy.aggregate(5, after, iter([reply(strategy, after, "a", 1, ones, 5), reply(strategy, after, "b", 3, fives, 5)]))
    assert all(t.eq(4).all() for t in last.adapter.tensors.values())  # (1*1 + 3*5) / 4
    assert set(last.memory) == {"energy/q"} and strategy.notes(5, after, last) == []


def test_memory_survives_a_checkpoint(tmp_path: Path) -> None:
    strategy = SLoRA(rounds=1, seed=0, density=1.0)
    state = strategy.start(lora({"q": (2, 3), "a": (4, 2)}, rank=2))
    save_file({n: t.contiguous() for n, t in state.memory.items()}, tmp_path / "memory.safetensors")
    state.adapter.save(tmp_path / "adapter.safetensors")
    again = ServerState(adapter=AdapterState.load(tmp_path / "adapter.safetensors"), memory=load_file(tmp_path / "memory.safetensors"))
    move = {"q.sparse": torch.arange(6.0), "a.sparse": torch.arange(8.0)}
    first, second = (strategy.aggregate(1, s, iter([reply(strategy, s, "c", 1, move)])).adapter for s in (state, again))
    assert list(first.tensors) == list(second.tensors) and all(torch.equal(first[n], second[n]) for n in first.tensors)


def test_the_config_gives_rounds_and_seed() -> None:
    config = compose(["strategy=slora", "devices=none", "rounds=30", "seed=4"])[0].config
    strategy = make_strategy(config)
    assert strategy == SLoRA(rounds=30, seed=4) and isinstance(strategy, SLoRA) and strategy.last_sparse_round == 3


@pytest.mark.parametrize(
    ("strategy", "config", "words"),
    [
        (SLoRA(rounds=9, seed=0, mask="best"), Config(rounds=9), "strategy.mask=best is not known"),
        (SLoRA(rounds=9, seed=0, mode="best"), Config(rounds=9), "strategy.mode=best is not known"),
        (SLoRA(rounds=9, seed=0, density=0.0), Config(rounds=9), "strategy.density=0.0 is out of range"),
        (SLoRA(rounds=9, seed=0, sparse_share=1.5), Config(rounds=9), "strategy.sparse_share=1.5 is out of range"),
        (SLoRA(rounds=9, seed=0), Config(rounds=9, peft=PeftConfig(method="dora")), "does not work with peft.method=dora"),
        (SLoRA(rounds=1, seed=0, mask="gradient"), Config(rounds=1), "ends its sparse stage with round 2, but rounds=1: set more rounds"),
        (
            SLoRA(rounds=9, seed=0),
            Config(rounds=9, model=ModelConfig(precision="nf4")),
            "cannot be trained: set model.precision=bf16",
        ),
        (
            SLoRA(rounds=9, seed=0),
            Config(rounds=9, devices=DevicesConfig(classes={"big": DeviceClass(), "small": DeviceClass(memory_mb=9.0)})),
            "set devices.classes.small.precision=bf16, and so for each class, or devices=none",
        ),
    ],
)
def test_invalid_settings_are_refused(strategy: SLoRA, config: Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strategy.check(config)


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "mode"), quick([("random", "paper"), ("gradient", "corrected")], ("gradient", "corrected")))
def test_a_run_has_both_stages_and_a_resumed_one_ends_alike(tmp_path: Path, mask: str, mode: str) -> None:
    target = {"_target_": "fedtune.strategies.slora.SLoRA", "rounds": 4, "seed": 0, "sparse_share": 0.5, "mask": mask, "mode": mode}
    config = tiny_config(tmp_path, rounds=4, strategy=target, eval=EvalConfig(where="server", clients=-1), keep_checkpoints=9)
    run = simulate(config)
    last = 2 if mask == "random" else 3
    kept = [AdapterState.load(run / f"checkpoints/round-{i:04d}/adapter.safetensors") for i in range(5)]
    assert [k.spec.method for k in kept[last - 2 :]] == ["sparse"] * 2 + ["lora"] * (5 - last)
    lines = [line for line in read_metrics(run) if line["client"] is None]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["clients_mean"]) for line in lines)
    losses = [line["loss"] for line in lines[last - 2 :]]  # from the first mask on, every round changes the model
    assert len(set(losses)) == 7 - last and losses[-1] < losses[0]
    # clients send one entry in a hundred of two layers' seven matrices, and LoRA's factors of rank 2 after the switch
    sparse_up, lora_up = (sum(t.numel() for n, t in k.tensors.items() if not n.endswith(".index")) * 4 for k in (kept[last - 1], kept[-1]))
    for line, size in ((lines[last], sparse_up), (lines[-1], lora_up)):
        assert size * 4 < line["bytes_up"] < size * 4 + 4 * 14 * 1000  # four clients; names, headers and numbers beside the values
    stopped = simulate(dataclasses.replace(config, rounds=last))
    again = simulate(dataclasses.replace(config, resume=str(stopped)))
    end = AdapterState.load(again / "checkpoints/round-0004/adapter.safetensors")
    assert all(torch.equal(end[n], kept[-1][n]) for n in kept[-1].tensors)


def test_ranks_by_device_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank"):
        make_strategy(compose(["strategy=slora", "devices.classes.phone.rank=2"])[0].config)
