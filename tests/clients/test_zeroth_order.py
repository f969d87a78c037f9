"""Zeroth-order turns by hand: MeZO's step, FedKSeed's replay, FwdLLM's forward gradients."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.clients.trainer import train
from fedtune.clients.turns import Work
from fedtune.clients.turns import fedkseed as module
from fedtune.clients.turns.fedkseed import FedKSeed, rebuild
from fedtune.clients.turns.fwdllm import FwdLLM, _cosine
from fedtune.clients.turns.mezo import MeZO
from fedtune.clients.workspace import Workspace
from fedtune.config import EvalConfig, ModelConfig, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.directions import SINCE, SUMS, TOTAL, candidate_seeds, direction, move, replay
from fedtune.contracts.plan import Plan
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import ServerState
from fedtune.data import collate
from fedtune.errors import ConfigError, PlanError
from fedtune.experiment import simulate
from fedtune.models import loss_sum
from fedtune.rounds.find_strategy import make_strategy
from fedtune.runs.directory import read_checkpoint
from fedtune.strategies.fedkseed import FedKSeed as Server
from fedtune.strategies.fedkseed import chances_of
from tests.clients.test_personal_turns import far, rows_of, same, still, take  # noqa: F401  `still` is a fixture
from tests.strategies.updates import random_adapter, update
from tests.tiny import tiny_config
from tests.working import work_in


def moved(space: Workspace, seed: int = 1) -> AdapterState:
    gen = torch.Generator().manual_seed(seed)
    return space.initial.replace({n: t + 0.05 * torch.randn(t.shape, generator=gen) for n, t in space.initial.tensors.items()})


def loss_of(space: Workspace, at: AdapterState, rows: list[int]) -> float:
    space.live.load(at)
    with torch.no_grad():
        batch = collate([space.examples("c0", "train")[i] for i in rows], space.pad_id)
        loss, count = loss_sum(space.live.model, batch, space.config.task)
    return loss.item() / count


def shifted(state: AdapterState, seed: int, by: float) -> AdapterState:
    return state.replace({n: t + by * direction(seed, n, t.shape) for n, t in state.tensors.items()})


def slope_of(space: Workspace, at: AdapterState, seed: int, eps: float, rows: list[int]) -> float:
    return (loss_of(space, shifted(at, seed, eps), rows) - loss_of(space, shifted(at, seed, -eps), rows)) / (2 * eps)


def test_directions_are_the_same_on_every_machine() -> None:
    """Server and clients draw them apart; another generator would end in other models without an error."""
    # torch draws fewer than 16 numbers, and more, in two ways
    small, large = direction(123, "layer.lora_A", (2, 3)), direction(123, "a", (20,))
    assert torch.allclose(small, torch.tensor([[-1.7209687, -0.79168397, 0.7299631], [0.12583432, -2.195089, 0.23590864]]), atol=1e-6)
    assert torch.allclose(large[:3], torch.tensor([-0.10525157, -0.067201, 0.32259646]), atol=1e-6)
    assert not torch.equal(direction(123, "a", (4,)), direction(123, "b", (4,)))
    many = direction(7, "x", (200, 500))
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1.0, abs=0.01)


def test_a_step_of_mezo_by_hand(still: Workspace) -> None:  # noqa: F811
    w, (rows,) = moved(still), rows_of(still, 1)
    more = {"lr": 0.02, "lr_last": 0.02, "steps": 1, "weight_decay": 0.5, "optimizer": "sgd", "clip_norm": None}
    got, _ = take(still, MeZO(eps=1e-2), w, **more)
    seed = derive_seed(0, "mezo", 0)
    d = slope_of(still, w, seed, 1e-2, rows)
    assert abs(d) > 1e-3
    assert far(got, w.replace({n: (1 - 0.02 * 0.5) * t - 0.02 * d * direction(seed, n, t.shape) for n, t in w.tensors.items()})) < 1e-6
    bounded, _ = take(still, MeZO(eps=1e-2), w, **{**more, "clip_norm": 1e-4, "weight_decay": 0.0})
    sign = 1 if d > 0 else -1
    assert far(bounded, shifted(w, seed, -0.02 * sign * 1e-4)) < 1e-6


def test_mezo_computes_no_gradient(still: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("a backward pass"))
    start = moved(still)
    got, _ = take(still, MeZO(eps=1e-2), start, steps=3)
    assert all(p.grad is None for p in still.live.parameters.values()) and far(got, start) > 0
    unmoved, _ = take(still, MeZO(eps=1e-2), start, lr=0.0, lr_last=0.0)
    assert far(unmoved, start) < 1e-6  # up to the rounding of w + εz − 2εz + εz


@dataclasses.dataclass
class Quadratic:
    """½‖θ − c‖² as a live slot and its minibatch."""

    c: Tensor
    parameters: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)

    def loss(self) -> float:
        return float((self.parameters["w"].detach() - self.c).square().sum() / 2)


def quadratic_work(size: int, seed: int) -> tuple[Any, Quadratic]:
    gen = torch.Generator().manual_seed(0)
    c, w = torch.randn(size, generator=gen), torch.randn(size, generator=gen)
    slot = Quadratic(c, {"w": nn.Parameter(w)})
    start, plan = AdapterState({}, AdapterSpec(method="x")), Plan(round=1, client="a", base_version=0, seed=seed, clip_norm=None, steps=1)
    given: Any = {"live": slot, "minibatch": slot, "task": None}
    return Work(start=start, plan=plan, examples=[], pad_id=0, **given), slot


def test_the_mean_of_many_directions_is_the_gradient() -> None:
    work, slot = quadratic_work(20, 3)
    turn = FwdLLM(eps=1e-3, perturbations=4000, most=4000, variance=0.0, candidates=1)
    turn.gradient(work, turn.begin(work))
    gradient = slot.parameters["w"].detach() - slot.c
    got = slot.parameters["w"].grad
    assert got is not None and float((got - gradient).norm() / gradient.norm()) < 0.12  # √((P + 1) / n) = 0.07


def test_forward_gradients_by_hand() -> None:
    work, slot = quadratic_work(5, 4)
    w = slot.parameters["w"].detach().clone()
    turn = FwdLLM(eps=1e-2, perturbations=3, most=6, variance=0.0, candidates=1)
    memory = turn.begin(work)
    turn.gradient(work, memory)
    mean = torch.zeros(5)
    for i in range(6):  # a variance above 0 doubles 3 to 6
        v = direction(derive_seed(4, "fwdllm", 0, i, 0), "w", (5,))
        mean += float(((w - slot.c) * v).sum()) * v / 6
    got = slot.parameters["w"].grad
    assert got is not None and torch.allclose(got, mean, atol=1e-2) and torch.allclose(slot.parameters["w"].detach(), w, atol=1e-6)
    work, slot = quadratic_work(5, 4)
    turn = FwdLLM(eps=1e-2, perturbations=3, most=6, variance=1e9, candidates=1)
    turn.gradient(work, turn.begin(work))
    three = sum(float(((w - slot.c) * (v := direction(derive_seed(4, "fwdllm", 0, i, 0), "w", (5,)))).sum()) * v / 3 for i in range(3))
    assert torch.allclose(slot.parameters["w"].grad, three, atol=1e-2)  # type: ignore[arg-type]


def test_the_variance_is_that_of_the_means_of_both_halves() -> None:
    sums = [{"w": torch.tensor([2.0, 4.0])}, {"w": torch.tensor([3.0, 1.0])}]
    # means (1, 2) of two and (3, 1) of one: variances of two numbers: (1 − 3)²/2 = 2 and (2 − 1)²/2 = 0.5
    assert FwdLLM._variance(sums, 3) == pytest.approx((2 + 0.5) / 2)


def test_later_directions_are_close_to_the_last_gradient() -> None:
    work, _ = quadratic_work(5, 4)
    turn = FwdLLM(eps=1e-2, perturbations=2, most=2, variance=0.0, candidates=8)
    memory = turn.begin(work)
    turn.gradient(work, memory)
    chosen = turn._choose(work, memory, 0)
    each = [derive_seed(4, "fwdllm", 1, 0, i) for i in range(8)]
    assert chosen in each and _cosine(memory.gradient, chosen) == max(_cosine(memory.gradient, s) for s in each)


# -- FedKSeed ------------------------------------------------------------------------------------------------------------------------------

K = 16
TURN = FedKSeed(seed=5, candidates=K, eps=1e-2, clip=0.5)


def walk(
    space: Workspace, start: AdapterState, extra: dict[str, Tensor] | None = None, **changes: Any
) -> tuple[AdapterState, AdapterState]:
    """One turn: (the tensors where it ended, its update)."""
    given = {"steps": 5, "epochs": None, "batch_size": 4, "lr": 1e-2, "lr_last": 1e-2, "clip_norm": None, "optimizer": "sgd", **changes}
    work = work_in(space, Plan(round=1, client="c0", base_version=0, **given), start=start, extra=extra or {})
    space.live.load(start)
    done = train(work, TURN)
    end = space.live.read(version=0)
    return end, TURN.finish(dataclasses.replace(work, memory=done.memory), end)


def test_the_update_alone_rebuilds_where_the_client_ended(still: Workspace) -> None:  # noqa: F811
    start = moved(still)
    end, sent = walk(still, start, steps=200)
    assert set(sent.tensors) == {SUMS} and sent[SUMS].shape == (3, K) and sent[SUMS][2].sum() == 200
    assert sent.nbytes == 12 * K  # whatever the size of the model
    seeds = candidate_seeds(5, K)
    assert far(start.replace(replay(start.tensors, sent[SUMS][0], seeds, 1e-2)), end) < 1e-5 < far(start, end)
    # with K = 16, seeds are used more than once and add; their order does not matter
    back = torch.arange(K).flip(0)
    turned = replay(start.tensors, sent[SUMS][0][back], [seeds[i] for i in back.tolist()], 1e-2)
    assert far(start.replace(turned), end) < 1e-5
    assert torch.all(sent[SUMS][1] <= 0.5 * sent[SUMS][2] + 1e-6)


def test_a_newcomer_has_the_bits_of_a_veteran(still: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Over three snapshots, a client that is in every round, one that joins late, and the server."""
    server = Server(candidates=K, snapshot=3, lr=1e-2, seed=5)
    state, gen = server.start(moved(still)), torch.Generator().manual_seed(0)
    start = state.adapter
    seeds, states = candidate_seeds(5, K), []
    for round in range(1, 9):
        extra = server.plan(round, [Plan(round=round, client="a", base_version=round - 1)], state)["a"].extra
        veteran = rebuild(start, extra.get(TOTAL), extra.get(SINCE), seeds, 1e-2)
        monkeypatch.setattr(module, "_last", {})
        newcomer = rebuild(start, extra.get(TOTAL), extra.get(SINCE), seeds, 1e-2)
        assert same(veteran, newcomer) and all(torch.equal(veteran[n], t) for n, t in state.adapter.tensors.items()), round
        assert len(extra.get(SINCE, ())) == (round - 1) % 3
        sums = torch.randn(3, K, generator=gen).abs() * (torch.rand(K, generator=gen) > 0.5)
        state = server.aggregate(round, state, [update("a", start.replace({SUMS: sums}), 2), update("b", start.replace({SUMS: -sums}), 1)])
        states.append(state.adapter)
        assert all(far(a, state.adapter) > 0 for a in states[:-1])
    # in all: w_0 − η·Σ (2·s − s) / 3·z
    total = state.memory[TOTAL] + state.memory[SINCE].sum(0)
    assert far(start.replace(replay(start.tensors, total, seeds, 1e-2)), state.adapter) < 1e-5


def test_a_round_of_the_server_by_hand() -> None:
    start, server = random_adapter(0), Server(candidates=2, lr=0.5, seed=9)
    first, second = candidate_seeds(9, 2)
    sums = [torch.tensor([[1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), torch.tensor([[-1.0, 4.0], [0.5, 0.5], [2.0, 1.0]])]
    state = server.start(start)
    after = server.aggregate(1, state, [update("a", start.replace({SUMS: sums[0]}), 1), update("b", start.replace({SUMS: sums[1]}), 3)])
    # a = (1·1 + 3·(−1)) / 4 = −0.5 and 3·4 / 4 = 3
    want = {n: t + 0.25 * direction(first, n, t.shape) - 1.5 * direction(second, n, t.shape) for n, t in start.tensors.items()}
    assert far(after.adapter, start.replace(want)) < 1e-6
    # the clients' mean |d| of seed 0: 0.5 / 1 and 0.5 / 2, of seed 1: 0.5 / 1 → 0.375 and 0.5 → minmax 0, 1 → softmax
    chances = chances_of(after.memory["fedkseed.sizes"])
    assert torch.allclose(chances, torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0), atol=1e-6)
    plan = dataclasses.replace(server, chances=True).plan(2, [Plan(round=2, client="a", base_version=1)], after)["a"]
    assert not plan.adapter.tensors and set(plan.extra) == {SINCE, "fedkseed.chances"} and plan.plan.turn == "fedkseed"
    none = server.aggregate(1, state, [update("a", start.replace({SUMS: torch.zeros(3, 2)}), 1)])
    assert same(none.adapter, start)


def test_likely_seeds_are_drawn_more_often(still: Workspace) -> None:  # noqa: F811
    chances = torch.full((K,), 1e-6)
    chances[3] = 1.0
    _, sent = walk(still, moved(still), {"fedkseed.chances": chances}, steps=20)
    assert sent[SUMS][2][3] == 20


@pytest.mark.parametrize(
    ("extra", "changes", "sentence"),
    [
        ({TOTAL: torch.zeros(K + 1)}, {}, r"fedkseed.total has the shape \(17,\), wanted \(16\)"),
        ({SINCE: torch.zeros(2, K - 1)}, {}, r"fedkseed.since has the shape \(2, 15\)"),
        ({TOTAL: torch.zeros(K, dtype=torch.bfloat16)}, {}, "fedkseed.total is torch.bfloat16, wanted float32"),
        ({"fedkseed.chances": torch.zeros(K)}, {}, "fedkseed.chances are not weights"),
        ({"fedkseed.chances": torch.full((K,), -1.0)}, {}, "fedkseed.chances are not weights"),
        ({}, {"lr_last": 1e-3}, "needs a constant learning rate"),
        ({}, {"weight_decay": 0.1}, "no weight decay"),
    ],
)
def test_a_message_that_does_not_fit_is_refused(
    still: Workspace,  # noqa: F811
    extra: dict[str, Tensor],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(PlanError, match=sentence):
        walk(still, moved(still), extra, **changes)


def test_a_client_that_lies_about_sizes_has_one_vote() -> None:
    start, server, steps = random_adapter(0), Server(candidates=4, chances=True), torch.full((4,), 5.0)
    honest = torch.stack([torch.zeros(4), steps * torch.tensor([0.1, 0.2, 0.3, 0.4]), steps])
    liar = torch.tensor([[0.0] * 4, [1e38, 0.0, -1e38, 0.0], [1.0, 1e38, 1.0, 0.0]])
    state = server.start(start)
    for round in range(1, 4):
        sent = [update(f"c{i}", start.replace({SUMS: honest})) for i in range(9)]
        state = server.aggregate(round, state, [*sent, update("liar", start.replace({SUMS: liar}))])
    means = state.memory["fedkseed.sizes"][0] / state.memory["fedkseed.sizes"][1]
    # nine honest votes and one of at most clip = 0.5
    assert torch.allclose(means, torch.tensor([0.14, 0.18, 0.27, 0.4], dtype=torch.float64), atol=1e-6)


def test_a_turn_in_the_next_round_applies_only_the_new_rows(still: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    start, seeds, calls = moved(still), candidate_seeds(5, K), list[int]()
    monkeypatch.setattr(module, "replay", lambda *given: calls.append(1) or replay(*given))
    monkeypatch.setattr(module, "_last", {})
    rows = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    counts = []
    for round in range(4):
        rebuild(start.replace(version=round), None, rows[:round], seeds, 1e-2)
        counts.append(len(calls))
    assert counts == [1, 2, 3, 4]


def test_candidates_have_a_bound() -> None:
    with pytest.raises(PlanError, match="candidates=2000000000 is out of range: it must be .*65536"):
        FedKSeed(seed=0, candidates=2_000_000_000, eps=1e-2, clip=0.5).check()


@pytest.mark.parametrize("name", ["a seed is used once", "the total is applied last", "the client's weight is ignored"])
def test_a_wrong_replay_is_detected(still: Workspace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    test: Any = test_the_update_alone_rebuilds_where_the_client_ended
    if name == "a seed is used once":
        monkeypatch.setattr(module, "move", lambda tensors, seed, by: move(tensors, seed, by / 2))
    elif name == "the total is applied last":
        test = lambda space: test_a_newcomer_has_the_bits_of_a_veteran(space, monkeypatch)  # noqa: E731
        real = rebuild

        def last(start: AdapterState, total: Tensor | None, since: Tensor | None, seeds: list[int], lr: float) -> AdapterState:
            return real(real(start, None, since, seeds, lr), total, None, seeds, lr)

        monkeypatch.setitem(globals(), "rebuild", last)
    else:
        test = lambda space: test_a_round_of_the_server_by_hand()  # noqa: E731
        monkeypatch.setattr("fedtune.strategies.fedkseed.candidate_seeds", lambda seed, count: candidate_seeds(seed + 1, count))
    with pytest.raises(AssertionError):
        test(still)


# -- runs ----------------------------------------------------------------------------------------------------------------------------------


KINDS = {"fedkseed": "FedKSeed", "fedmezo": "FedMeZO", "fwdllm": "FwdLLM"}


def run_of(folder: Path, name: str, **changes: Any) -> Any:
    strategy: dict[str, Any] = {"_target_": f"fedtune.strategies.{name}.{KINDS[name]}"}
    if name == "fedkseed":
        strategy |= {"candidates": 32, "lr": 1e-2, "snapshot": 2}
    values: dict[str, Any] = {"strategy": strategy, "rounds": 4, "eval": EvalConfig(where="server", clients=0)} | changes
    config = tiny_config(folder, **values)
    optimizer = "adamw" if name == "fwdllm" else "sgd"
    client = dataclasses.replace(config.client, optimizer=optimizer, clip_norm=None, steps=4, weight_decay=0.0)
    return dataclasses.replace(config, client=client)


def last_state(run: Path) -> ServerState:
    return read_checkpoint(max((run / "checkpoints").glob("round-*"))).state


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "ptuning_v2"])
def test_a_run_sends_kilobytes_and_resumes_to_the_same_bits(tmp_path: Path, method: str) -> None:
    config = run_of(tmp_path, "fedkseed", peft=PeftConfig(method=method, rank=2))
    run = simulate(config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    turns = [r for r in records if r["client"] and "bytes_up" in r and "steps" in r]
    assert len(turns) == 16 and max(r["bytes_up"] for r in turns) < 6_000 and max(r["bytes_down"] for r in turns) < 6_000
    assert all(r["steps"] == 4 and r["train_loss"] > 0 for r in turns)
    # another process rebuilds the adapter from the checkpoint's coefficients
    code = (
        "import sys, torch; from pathlib import Path; from fedtune.runs.directory import read_checkpoint;"
        "from fedtune.contracts.directions import replay; from fedtune.contracts.directions import candidate_seeds;"
        "m = read_checkpoint(max(Path(sys.argv[1]).glob('checkpoints/round-*'))).state; names = m.adapter.tensors;"
        "w = {n: m.memory['fedkseed.start/' + n] for n in names};"
        "w = replay(w, m.memory['fedkseed.total'], candidate_seeds(0, 32), 1e-2);"
        "print(all(torch.equal(w[n], t) for n, t in names.items()))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True).stdout.strip() == "True"
    half = simulate(dataclasses.replace(config, rounds=2, output_dir=str(tmp_path / "half")))
    simulate(dataclasses.replace(config, resume=str(half)))
    assert same(last_state(half).adapter, last_state(run).adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedkseed", "fedmezo", "fwdllm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_quantized_backbones(tmp_path: Path, name: str, precision: str) -> None:
    config = run_of(tmp_path, name, rounds=1)
    config = dataclasses.replace(config, model=ModelConfig(source="hub", name=config.model.name, precision=precision))
    if precision == "nf4":
        pytest.skip("the tiny model has no row length that is a multiple of 64")
    run = simulate(config)
    assert (run / "adapter" / "fedtune.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizer": "adamw"}, "set client.optimizer=sgd"),
        ({"schedule": "cosine"}, "client.schedule=constant"),
        ({"weight_decay": 0.1}, "client.weight_decay=0"),
        ({"lr": 0.5}, "strategy.lr=0.01 and client.lr=0.5 differ"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    config = run_of(tmp_path, "fedkseed")
    with pytest.raises(ConfigError, match=sentence):
        make_strategy(dataclasses.replace(config, client=dataclasses.replace(config.client, **change)))
    config.privacy.kind = "record"
    with pytest.raises(ConfigError, match="computes slopes of the loss, .* set privacy=none"):
        make_strategy(config)
