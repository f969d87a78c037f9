"""FedPepTAO: the phases, the sent tensors, and the server's rule on numbers that can be checked by hand."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import Assignment, ServerState, Strategy
from fedtune.errors import UpdateError
from fedtune.strategies import fedpeptao
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedpeptao import FedPepTAO

SPEC = AdapterSpec(method="ptuning_v2", base="b" * 64)
PROMPTS = [f"model.layers.{i}.prompt" for i in range(11)]  # sorted by name, layer 10 would follow layer 1
HEAD = "score.weight"


def adapter(seed: int = 0, layers: int = 11) -> AdapterState:
    gen = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(2, 3, 5, generator=gen) for n in PROMPTS[:layers]} | {HEAD: torch.randn(3, 7, generator=gen)}
    return AdapterState(tensors, SPEC)


def reply(given: Assignment, examples: int) -> Update:
    """A possible reply of a client with this many examples: its own scores, or the received tensors with noise."""
    plan = given.plan
    gen = torch.Generator().manual_seed(derive_seed(plan.round, plan.client))
    if given.expect is not None:
        sent = given.expect.replace({n: torch.rand(t.shape, generator=gen, dtype=t.dtype) for n, t in given.expect.tensors.items()})
    else:
        names = matching(given.adapter.tensors, plan.send)
        sent = given.adapter.replace({n: given.adapter[n] + 0.1 * torch.randn(given.adapter[n].shape, generator=gen) for n in names})
    metrics = {"steps": 1.0 + examples % 3, "lr_sum": 0.1 * (1 + examples % 3)}
    return Update(client=plan.client, round=plan.round, base_version=0, adapter=sent, examples=examples, measurements=metrics)


def one_round(strategy: Strategy, round: int, state: ServerState, clients: dict[str, int]) -> tuple[ServerState, dict[str, Assignment]]:
    plans = [Plan(round=round, client=c, base_version=state.adapter.spec.version) for c in sorted(clients)]
    assignments = dict(strategy.plan(round, plans, state))
    after = strategy.aggregate(round, state, iter([reply(assignments[c], clients[c]) for c in sorted(clients)]))
    return dataclasses.replace(after, adapter=after.adapter.replace(version=round)), assignments


def run(strategy: Strategy, cohorts: Sequence[dict[str, int]], start: AdapterState | None = None) -> list[ServerState]:
    states = [strategy.start(start or adapter())]
    for round, clients in enumerate(cohorts, 1):
        states.append(one_round(strategy, round, states[-1], clients)[0])
    return states


# -- the phases ---------------------------------------------------------------------------------------------------------------------------


def test_phases_follow_each_other_in_one_run() -> None:
    strategy = FedPepTAO(warmup_rounds=2)
    states = run(strategy, [{"a": 1, "b": 3}] * 6)
    assert [strategy.phase(s) for s in states] == ["warmup", "warmup", "scores", *["partial"] * 4]
    assert strategy.rounds_before_partial == 3
    assert FedPepTAO(ratio=0.5, warmup_rounds=0).rounds_before_partial == 1
    assert FedPepTAO(ratio=1.0, warmup_rounds=0).rounds_before_partial == 0
    (note,) = [n for r in range(6) for n in strategy.notes(r + 1, states[r], states[r + 1])]
    assert note.startswith(f"from now on {11 - len(strategy.local(states[3]))} of 11 layers are exchanged (estimated share 0.")


def test_the_warm_up_is_fedavg_from_the_first_round() -> None:
    cohorts = [{"a": 1, "b": 7}, {"b": 7, "c": 40}, {"a": 1, "c": 40}, {"c": 40}]
    ours, plain = run(FedPepTAO(warmup_rounds=3), cohorts), run(FedAvg(), cohorts)
    for a, b in zip(ours[:4], plain[:4], strict=True):
        assert all(torch.equal(a.adapter[n], b.adapter[n]) for n in a.adapter.tensors)
    assert "layers" in ours[4].memory and all(torch.equal(ours[4].adapter[n], ours[3].adapter[n]) for n in ours[3].adapter.tensors)


def test_a_run_of_an_earlier_version_continues_after_its_scores() -> None:
    """Its scores came from a separate round, which may have been the first. The missing ones are measured again, together."""
    strategy, layers = FedPepTAO(warmup_rounds=2), torch.arange(11, dtype=torch.float64)
    state = ServerState(adapter=adapter(), memory={"layers": layers, "warmups": torch.tensor(1)})
    phases = []
    for round in range(3, 6):
        phases.append(strategy.phase(state))
        state, _ = one_round(strategy, round, state, {"a": 1, "b": 3})
    assert phases == ["warmup", "scores", "partial"] and not torch.equal(state.memory["layers"], layers)
    known = ServerState(adapter=adapter(), memory={"layers": layers, "warmups": torch.tensor(2), "ratio": torch.tensor([0.5])})
    assert strategy.phase(known) == "partial" and FedPepTAO(warmup_rounds=0, ratio=0.5).phase(state) == "partial"


def test_score_turns_declare_their_reply_and_change_no_weight() -> None:
    strategy, state = FedPepTAO(warmup_rounds=0, score_rows=9), ServerState(adapter=adapter())
    after, given = one_round(strategy, 1, state, {"a": 1, "b": 3})
    ask = given["a"]
    assert (ask.plan.turn, ask.plan.params, ask.plan.batch_size, ask.plan.client) == ("fedpeptao", {"share": True}, 9, "a")
    assert ask.expect is not None and ask.expect.spec.method == "scores" and ask.adapter is state.adapter
    assert {n: t.shape for n, t in ask.expect.tensors.items()} == {"layers": (11,), "ratio": (1,)}
    assert all(torch.equal(after.adapter[n], state.adapter[n]) for n in state.adapter.tensors)
    after, given = one_round(FedPepTAO(warmup_rounds=0, ratio=0.5), 1, state, {"a": 1, "b": 3})
    ask = given["b"]
    assert ask.plan.params == {"share": False} and not ask.adapter.tensors  # layers are scored without prompts
    assert ask.expect is not None and list(ask.expect.tensors) == ["layers"] and "ratio" not in after.memory


def scores_of(client: str, examples: int, **values: list[float]) -> Update:
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    state = AdapterState(tensors, AdapterSpec(method="scores", base="b" * 64))
    return Update(client=client, round=1, base_version=0, adapter=state, examples=examples)


def test_scores_are_weighted_by_examples_and_shares_are_not() -> None:
    strategy, state = FedPepTAO(warmup_rounds=0), ServerState(adapter=adapter(layers=2))
    updates = [scores_of("a", 1, layers=[1.0, 2.0], ratio=[0.2]), scores_of("b", 3, layers=[5.0, 6.0], ratio=[7.0])]
    state = strategy.aggregate(1, state, iter(updates))
    assert state.memory["layers"].tolist() == [4.0, 5.0]  # (1 + 3·5) / 4, (2 + 3·6) / 4
    assert state.memory["ratio"].tolist() == pytest.approx([0.6])  # (.2 + 1) / 2: a share is at most 1


@pytest.mark.parametrize(
    ("order", "ratio", "kept"),
    [
        ("redundant", 0.2, {1, 10, 4}),  # ⌈2.2⌉ = 3
        ("diverse", 0.2, {0, 2, 3}),
        ("redundant", 1e-6, {10}),
        ("redundant", 3 / 11, {1, 10, 4}),  # a rounding error must not add a fourth layer
        ("redundant", 1.0, set(range(11))),
    ],
)
def test_selection_takes_the_first_by_score(order: str, ratio: float, kept: set[int]) -> None:
    scores = torch.tensor([0.0, 9.0, 1.0, 2.0, 8.0, 3.0, 3.0, 3.0, 3.0, 3.0, 99.0], dtype=torch.float64)
    state = ServerState(adapter=adapter(), memory={"layers": scores})
    local = FedPepTAO(order=order, ratio=ratio, warmup_rounds=0).local(state)
    assert local == [n for i, n in enumerate(PROMPTS) if i not in kept]


@pytest.mark.parametrize("variant", ["scaled", "paper", "code"])
@pytest.mark.parametrize("personal", [True, False])
def test_without_training_nothing_changes(variant: str, personal: bool) -> None:
    """With nonzero rates and unchanged tensors, through all phases, with new clients and clients of several sizes."""
    strategy = FedPepTAO(warmup_rounds=2, variant=variant, personal=personal, server_lr=0.5)
    state = start = strategy.start(adapter())
    for round, cohort in enumerate([{"a": 1, "b": 7}] * 4 + [{"a": 1, "c": 3}, {"b": 7, "c": 3, "d": 2}], 1):
        plans = [Plan(round=round, client=c, base_version=round - 1) for c in sorted(cohort)]
        assignments = strategy.plan(round, plans, state)
        replies = []
        for client, assignment in assignments.items():
            update = reply(assignment, cohort[client])  # scores, or the tensors unchanged
            held = assignment.adapter.subset(matching(assignment.adapter.tensors, assignment.plan.send))
            replies.append(update if assignment.expect is not None else dataclasses.replace(update, adapter=held))
        state = strategy.aggregate(round, state, iter(replies))
    assert strategy.phase(state) == "partial" and 0 < len(strategy.local(state)) < len(PROMPTS)
    for name, tensor in start.adapter.tensors.items():
        torch.testing.assert_close(state.adapter[name], tensor, rtol=0, atol=1e-6)


# -- sent tensors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("personal", [True, False])
def test_the_payload_holds_only_the_selected_layers_and_the_head(personal: bool) -> None:
    strategy = FedPepTAO(ratio=0.25, warmup_rounds=1, personal=personal)
    state = run(strategy, [{"a": 1, "b": 3}, {"a": 1, "b": 3}])[-1]
    local = strategy.local(state)
    chosen = [*(n for n in PROMPTS if n not in local), HEAD]
    assert len(local) == 8
    after, first = one_round(strategy, 3, state, {"a": 1})
    assert list(first["a"].adapter.tensors) == [*PROMPTS, HEAD]  # the first message also has the other layers, from the warm-up
    later = strategy.plan(4, [Plan(round=4, client=c, base_version=3) for c in "ab"], after)
    assert list(later["a"].adapter.tensors) == chosen and list(later["b"].adapter.tensors) == [*PROMPTS, HEAD]
    for given in (first["a"], later["a"], later["b"]):
        assert matching(given.adapter.tensors, given.plan.send) == chosen
        assert list(given.plan.keep) == local
        assert matching([*PROMPTS, HEAD], given.plan.train) == ([*PROMPTS, HEAD] if personal else chosen)
    assert all(torch.equal(after.adapter[n], state.adapter[n]) for n in local)
    assert not any(torch.equal(after.adapter[n], state.adapter[n]) for n in chosen)
    assert {n.split("/")[-1] for n in after.memory if n.startswith(("c/", "drift/", "v/", "delta/"))} == set(chosen)


def test_without_a_warm_up_the_clients_draw_the_other_layers_themselves() -> None:
    strategy = FedPepTAO(ratio=0.25, warmup_rounds=0)
    state = run(strategy, [{"a": 1}])[-1]
    (assignment,) = strategy.plan(2, [Plan(round=2, client="z", base_version=1)], state).values()
    assert len(assignment.adapter.tensors) == 4 and all(assignment.adapter[n] is state.adapter[n] for n in assignment.adapter.tensors)


# -- the rule -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 2])
def test_all_layers_without_momentum_are_fedavg_bit_for_bit(warmup: int) -> None:
    cohorts = [{"a": 1, "b": 7}, {"b": 7, "c": 40}, {"a": 1, "b": 7, "c": 40}, {"c": 40}]
    ours = run(FedPepTAO(ratio=1.0, server_lr=0.0, warmup_rounds=warmup), cohorts)
    plain = run(FedAvg(), cohorts)
    for a, b in zip(ours, plain, strict=True):
        assert all(torch.equal(a.adapter[n], b.adapter[n]) for n in a.adapter.tensors)
    assert not any(n.startswith(("c/", "v/")) for n in ours[-1].memory)


def test_identical_clients_at_full_participation_have_the_common_drift() -> None:
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=0)
    state = strategy.start(adapter())
    for round in (1, 2, 3):
        plans = [Plan(round=round, client=c, base_version=round - 1) for c in "abc"]
        assignments = strategy.plan(round, plans, state)
        one = reply(assignments["a"], 5)
        state = strategy.aggregate(round, state, iter([dataclasses.replace(one, client=c) for c in "abc"]))
        for name in state.adapter.tensors:
            c = state.memory[f"drift/{name}"]
            assert c.abs().max() > 0.01
            assert all(torch.allclose(state.memory[f"c/{client}/{name}"], c, atol=1e-6) for client in "abc")


def scalar(client: str, examples: int, w: float, steps: float, lr_sum: float) -> Update:
    state = AdapterState({"l.prompt": torch.tensor([w], dtype=torch.float64)}, SPEC)
    metrics = {"steps": steps, "lr_sum": lr_sum}
    return Update(client=client, round=1, base_version=0, adapter=state, examples=examples, measurements=metrics)


def two_rounds(variant: str) -> tuple[ServerState, ServerState]:
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=0, server_lr=0.1, momentum=0.5, variant=variant)
    start = strategy.start(AdapterState({"l.prompt": torch.zeros(1, dtype=torch.float64)}, SPEC))
    first = strategy.aggregate(1, start, iter([scalar("a", 1, 1.0, 1, 0.5), scalar("b", 3, 2.0, 3, 1.5)]))
    return first, strategy.aggregate(2, first, iter([scalar("a", 1, 2.75, 1, 0.5), scalar("b", 3, 1.75, 3, 1.5)]))


def check_by_hand(variant: str, w: float, v: float) -> None:
    first, second = two_rounds(variant)
    one, two = ({n: t.item() for n, t in s.memory.items()} for s in (first, second))
    # t = 1: w̄ = (1 + 3·2)/4, Δ = 0 − w̄; c_a = (0 − 1)/.5, c_b = (0 − 2)/1.5; c = 1/4·(−2) + 3/4·(−4/3)
    assert first.adapter["l.prompt"].item() == pytest.approx(1.75) and one["delta/l.prompt"] == pytest.approx(-1.75)
    assert [one["c/a/l.prompt"], one["c/b/l.prompt"], one["drift/l.prompt"]] == pytest.approx([-2.0, -4 / 3, -1.5])
    # t = 2: w̄ = (2.75 + 3·1.75)/4 = 2, Δ = −.25; c_a = −2 + 1.5 − 1/.5, c_b = −4/3 + 1.5 + 0; c = −1.5 + 1/4·(−.5) + 3/4·1.5
    assert [two["c/a/l.prompt"], two["c/b/l.prompt"], two["drift/l.prompt"]] == pytest.approx([-2.5, 1 / 6, -0.5])
    assert two["delta/l.prompt"] == pytest.approx(-0.25) and two["server_lr"] == pytest.approx(0.099)
    assert two["v/l.prompt"] == pytest.approx(v) and second.adapter["l.prompt"].item() == pytest.approx(w)


def test_two_rounds_by_hand() -> None:
    # g = −1.75 + .25 = −1.5; v_a = −.75 − .5 + 2.5 = 1.25, v_b = −.75 − .5 − 1/6 = −17/12; v = (1.25 − 3·17/12)/4; w = 2 + .099·.75
    check_by_hand("paper", v=-0.75, w=2.07425)


def test_two_rounds_in_units_of_the_clients_step_by_hand() -> None:
    first, second = two_rounds("scaled")
    one, two = ({n: t.item() for n, t in s.memory.items()} for s in (first, second))
    # t = 1: u_a = (0 − 1)/.5, u_b = (0 − 2)/1.5, c is their mean; T = (.5 + 3·1.5)/4 = 1.25, Δ/T = −1.75/1.25
    assert [one["c/a/l.prompt"], one["c/b/l.prompt"], one["drift/l.prompt"]] == pytest.approx([-2.0, -4 / 3, -5 / 3])
    assert first.adapter["l.prompt"].item() == pytest.approx(1.75) and one["delta/l.prompt"] == pytest.approx(-1.4)
    # t = 2: u_a = −1/.5, u_b = 0; Δ/T = −.25/1.25; g = −1.4 + .2; v_a = −.6 − 1 + 2, v_b = −.6 − 1; v = (.4 − 3·1.6)/4
    assert [two["c/a/l.prompt"], two["c/b/l.prompt"], two["drift/l.prompt"]] == pytest.approx([-2.0, 0.0, -1.0])
    assert two["delta/l.prompt"] == pytest.approx(-0.2) and two["v/l.prompt"] == pytest.approx(-1.1)
    assert second.adapter["l.prompt"].item() == pytest.approx(2.1375)  # 2 + .1·1.25·1.1
    assert "server_lr" not in two


def opposites(variant: str, rate: float, rounds: int = 60) -> list[float]:
    """The path of the server if three clients move up and three down by `rate` a step, and each sample of two has one kind."""
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=0, variant=variant)
    state = strategy.start(AdapterState({"l.prompt": torch.zeros(1, dtype=torch.float64)}, SPEC))
    pull, path = {"a": 1, "b": 1, "c": 1, "x": -1, "y": -1, "z": -1}, []
    for round in range(1, rounds + 1):
        w = state.adapter["l.prompt"].item()
        cohort = ("ab", "xy", "bc", "yz", "ca", "zx")[round % 6]
        state = strategy.aggregate(round, state, iter([scalar(c, 1, w + 4 * rate * pull[c], 4, 4 * rate) for c in cohort]))
        path.append(state.adapter["l.prompt"].item())
    return path


@pytest.mark.parametrize("rate", [4e-2, 8e-3, 1e-5])
def test_the_server_moves_in_units_of_the_clients_step_and_no_further(rate: float) -> None:
    path = opposites("scaled", rate)
    assert max(abs(w) for w in path) < 3 * 4 * rate  # the clients' updates cancel; no client moves more than 4 steps a round
    assert path == pytest.approx([w * rate / 4e-2 for w in opposites("scaled", 4e-2)])


def test_the_paper_s_server_rate_does_not_follow_the_clients() -> None:
    assert max(abs(w) for w in opposites("paper", 8e-3)) > 3 * 4 * 8e-3  # so the test above can fail


def test_c_is_the_mean_of_the_clients_that_have_one() -> None:
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=1)
    start = strategy.start(AdapterState({"l.prompt": torch.zeros(1, dtype=torch.float64)}, SPEC))
    state = strategy.aggregate(1, start, iter([scalar(c, 1, 0.0, 1, 0.5) for c in "abcd"]))
    for round, moves in enumerate(({"a": 1.0}, {"b": 3.0, "c": 5.0}, {"a": 9.0, "b": 3.0}), 2):
        w = state.adapter["l.prompt"].item()
        state = strategy.aggregate(round, state, iter([scalar(c, 1, w - m, 1, 0.5) for c, m in moves.items()]))
    assert state.memory["drift/l.prompt"].item() == pytest.approx((9 + 3 + 5) / 3 / 0.5)  # d has trained only in the warm-up


def test_rates_of_zero_move_nothing() -> None:
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=0)
    state = strategy.start(AdapterState({"l.prompt": torch.ones(1, dtype=torch.float64)}, SPEC))
    for round in (1, 2, 3):
        state = strategy.aggregate(round, state, iter([scalar(c, 1, 1.0, 1, 0.0) for c in "ab"]))
    assert state.adapter["l.prompt"].item() == 1.0


def test_the_public_code_passes_the_momentum_from_client_to_client() -> None:
    # v_a = 1.25 as above; v_b = .5·1.25 − 17/12 = −19/24; v = (1.25 − 3·19/24)/4 = −.28125; w = 2 + .099·.28125
    check_by_hand("code", v=-0.28125, w=2.02784375)


def no_learning_rate(update: Update, values: Mapping[str, float], name: str) -> float:
    return values["steps"]


def sign_of_c(self: FedPepTAO, average: Any, old: Any, c: Any, *others: Any) -> Any:
    return STEP(self, average, old, {n: -t for n, t in c.items()}, *others)


STEP = FedPepTAO._step


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [(fedpeptao, "measured", no_learning_rate), (FedPepTAO, "_step", sign_of_c), (fedpeptao, "_DECAY", 1.0)],
)
def test_the_check_by_hand_catches_a_wrong_formula(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Callable[..., Any]
) -> None:
    check_by_hand("paper", v=-0.75, w=2.07425)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_by_hand("paper", v=-0.75, w=2.07425)


def test_c_moves_by_the_share_of_the_clients_that_have_answered() -> None:
    strategy = FedPepTAO(ratio=0.5, warmup_rounds=0, variant="paper")
    start = ServerState(adapter=AdapterState({"l.prompt": torch.zeros(1), "m.prompt": torch.zeros(1)}, SPEC))
    state = strategy.aggregate(1, start, iter([scores_of(c, 1, layers=[1.0, 2.0]) for c in "abcd"]))  # the lowest score first
    state = strategy.aggregate(2, state, iter([scalar("a", 1, 1.0, 1, 0.5)]))
    # N = 4 have answered, 1 of them now: c = 1/4 · (0 − 1)/.5
    assert state.memory["drift/l.prompt"].item() == pytest.approx(-0.5) and state.memory["c/a/l.prompt"].item() == pytest.approx(-2.0)
    assert state.adapter["m.prompt"].item() == 0.0 and "drift/m.prompt" not in state.memory


def test_the_server_s_rate_falls_to_its_floor() -> None:
    states = run(FedPepTAO(ratio=1.0, warmup_rounds=1, server_lr=1.03e-4, variant="paper"), [{"a": 1}] * 7)
    rates = [s.memory["server_lr"].item() for s in states[2:]]
    assert rates == pytest.approx([1.03e-4, 1.0197e-4, 1.009503e-4, 1e-4, 1e-4, 1e-4])


def test_a_client_at_rate_zero_keeps_its_c_and_a_missing_measurement_is_named() -> None:
    first, _ = two_rounds("paper")
    strategy = FedPepTAO(ratio=1.0, warmup_rounds=0, server_lr=0.1, momentum=0.5)
    after = strategy.aggregate(2, first, iter([scalar("a", 1, 1.75, 1, 0.0)]))
    assert torch.equal(after.memory["c/a/l.prompt"], first.memory["c/a/l.prompt"])
    assert math.isfinite(after.adapter["l.prompt"].item())
    with pytest.raises(UpdateError, match="client a sent lr_sum=None instead of a number >= 0: run the same version"):
        strategy.aggregate(2, first, iter([dataclasses.replace(scalar("a", 1, 1.75, 1, 0.0), measurements={"steps": 1.0})]))
