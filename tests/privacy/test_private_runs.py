"""Whole runs with privacy=record and privacy=user where=client: reported values, refusals, and costs."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from fedtune.clients import app, trainer
from fedtune.config import ClientConfig, Config, EngineConfig, EvalConfig, PrivacyConfig, TrafficConfig, check, to_dict
from fedtune.config.compose import choices, compose
from fedtune.experiment import simulate
from fedtune.privacy import dpsgd
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.privacy.user import moved, norm
from fedtune.rounds.planning import base_plan
from fedtune.rounds.reply import read_update
from fedtune.runs.directory import RunDirectory
from fedtune.runs.report import read_metrics
from tests.tiny import tiny_config
from tests.working import work_in

RECORD = PrivacyConfig(kind="record", epsilon=8.0, clip=0.5, accountant="rdp")
LOCAL = PrivacyConfig(kind="user", where="client", epsilon=8.0, clip=0.5, accountant="rdp")


def lines(run: Path) -> list[dict[str, Any]]:
    return list(read_metrics(run))


def adapter(run: Path) -> dict[str, torch.Tensor]:
    run_directory = RunDirectory.open(run)
    state = run_directory.newest()[0]
    run_directory.close()
    assert state is not None
    return dict(state.state.adapter.tensors)


def tiny(tmp_path: Path, privacy: PrivacyConfig, **changes: Any) -> Config:
    # of 8 rows; with a rate of 1/2 Opacus would take seconds
    six = ClientConfig(steps=2, epochs=None, batch_size=6, lr=1e-2, schedule="constant")
    return check(tiny_config(tmp_path, privacy=privacy, **{"client": six, **changes}))


def test_a_record_level_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, RECORD)
    run = simulate(config)
    turns = [r for r in lines(run) if r["client"] is not None and r["round"] > 0 and "steps" in r]
    assert len(turns) == 8  # four clients, two rounds
    for r in turns:
        assert r["dp_clip"] == 0.5 and r["dp_noise"] > 0 and r["dp_steps"] == r["steps"] == 2 and 0 < r["dp_sample_rate"] <= 1
        assert "train_loss" not in r and "start_loss" not in r
        # the reported ε equals an independent sum over the client's turns
        cost = Spend(noise=r["dp_noise"], rate=r["dp_sample_rate"], steps=2)
        assert r["epsilon"] == epsilon([cost] * r["round"], 1e-5, "rdp") <= 8.0
        assert Ledger(ledger_file(run / "privacy", str(r["client"]))).spent() == [cost] * 2
    rounds = [r for r in lines(run) if r["client"] is None]
    assert "train_loss" not in rounds[1] and rounds[2]["epsilon"] == max(r["epsilon"] for r in turns)
    card = (run / "adapter" / "README.md").read_text()
    assert f"(ε, δ) = ({rounds[2]['epsilon']:.3g}, 1e-05)" in card
    assert all(s in card for s in ("accountant: RDP", "one training row", "Poisson sampling", "clipped to norm 0.5", "can subtract it"))
    assert "Privacy spent" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_the_system_does_not(tmp_path: Path) -> None:
    a, b = (adapter(simulate(tiny(tmp_path, RECORD))) for _ in range(2))
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    c = adapter(simulate(tiny(tmp_path, dataclasses.replace(RECORD, secure_rng=True))))
    assert not all(torch.equal(t, c[n]) for n, t in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [RECORD, LOCAL], ids=["record", "user at the client"])
def test_a_client_without_budget_declines_with_a_reason(tmp_path: Path, privacy: PrivacyConfig) -> None:
    run = simulate(tiny(tmp_path, dataclasses.replace(privacy, turns=1), rounds=2))
    second = [r for r in lines(run) if r["client"] is not None and r["round"] == 2]
    assert len(second) == 4 and all(r["dropped"].startswith("privacy: its privacy budget is spent: ε = ") for r in second)
    rounds = [r for r in lines(run) if r["client"] is None]
    assert rounds[2]["counted"] == 0 and rounds[2]["dropped"] == {"privacy": 4} and rounds[2]["epsilon"] <= 8.0


@pytest.mark.slow
def test_the_cost_of_a_failed_turn_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, taken = dpsgd.PrivateGradient.step, []

    def breaks(self: dpsgd.PrivateGradient) -> dict[str, torch.Tensor]:
        taken.append(1)
        if len(taken) == 2:  # the first client's second step of round 1
            raise ValueError("broken")
        return right(self)

    monkeypatch.setattr(dpsgd.PrivateGradient, "step", breaks)
    run = simulate(tiny(tmp_path, dataclasses.replace(RECORD, epsilon=None, noise=1.0)))
    (lost,) = [r for r in lines(run) if r.get("dropped") == "failed: ValueError: broken"]
    (others,) = {r["dp_sample_rate"] for r in lines(run) if "dp_sample_rate" in r}  # all have the same number of rows
    cost = Spend(noise=1.0, rate=others, steps=2)
    assert lost["epsilon"] == epsilon([cost], 1e-5, "rdp")
    (after,) = [r for r in lines(run) if r["client"] == lost["client"] and r["round"] == 2 and "steps" in r]
    assert after["epsilon"] == epsilon([cost, cost], 1e-5, "rdp")


@pytest.mark.parametrize(("message", "cost"), [(1.5, 1.5), (-1.0, None), (float("nan"), None), (float("inf"), None), ("1", None)])
def test_the_epsilon_of_a_declining_client_is_checked(message: Any, cost: float | None) -> None:
    from flwr.app import ConfigRecord, Message

    from fedtune.rounds.outcome import epsilon_of

    assert epsilon_of(Message(RecordDict({"declined": ConfigRecord({"epsilon": message})}), 0, "train")) == cost


@pytest.mark.slow
def test_a_resumed_run_keeps_its_privacy_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = dataclasses.replace(RECORD, epsilon=None, noise=1.0)
    whole = adapter(simulate(tiny(tmp_path, privacy)))
    right, taken = dpsgd.PrivateGradient.step, []

    def kill(self: dpsgd.PrivateGradient) -> dict[str, torch.Tensor]:
        taken.append(1)
        if len(taken) == 13:  # in round 2, the third client's first step
            raise KeyboardInterrupt
        return right(self)

    monkeypatch.setattr(dpsgd.PrivateGradient, "step", kill)
    with pytest.raises(KeyboardInterrupt):
        simulate(tiny(tmp_path, privacy))
    monkeypatch.setattr(dpsgd.PrivateGradient, "step", right)
    run = max((tmp_path / "outputs" / "tiny").iterdir(), key=lambda p: p.stat().st_mtime)
    counts = {f.stem: len(f.read_text().splitlines()) for f in (run / "privacy").iterdir()}
    assert sorted(counts.values()) == [1, 2, 2, 2]  # the third client had paid before the kill
    config = RunDirectory.open(run)
    config.close()
    resumed = simulate(dataclasses.replace(config.config, resume=str(run)))
    assert {f.stem: len(f.read_text().splitlines()) for f in (run / "privacy").iterdir()} == {c: n + 1 for c, n in counts.items()}
    assert all(torch.equal(t, whole[n]) for n, t in adapter(resumed).items())
    last = [r for r in lines(run) if r["client"] is not None and r["round"] == 2 and "steps" in r]
    for r in last:
        assert r["epsilon"] == epsilon([Spend(noise=1.0, rate=r["dp_sample_rate"], steps=2)] * (counts[str(r["client"])] + 1), 1e-5, "rdp")


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [RECORD, PrivacyConfig(kind="user", clip=0.1, accountant="rdp")], ids=["record", "user at the server"])
def test_resuming_from_an_older_checkpoint_keeps_all_privacy_costs(tmp_path: Path, privacy: PrivacyConfig) -> None:
    run = simulate(tiny(tmp_path, privacy))  # epsilon=8 is planned for these two rounds
    spent = lines(run)[-1]["epsilon"]
    shutil.rmtree(run / "checkpoints" / "round-0002")
    config = RunDirectory.open(run)
    config.close()
    simulate(dataclasses.replace(config.config, resume=str(run)))
    rounds = [r for r in lines(run) if r["client"] is None]
    assert rounds[2]["counted"] == 0 and rounds[2]["dropped"] == {"privacy": 4}  # the budget is spent, although round 2 is repeated
    assert f"(ε, δ) = ({spent:.3g}, 1e-05)" in (run / "adapter" / "README.md").read_text() and 7.5 < spent <= 8.0


def run_and_die(config: Config, point: str, begun: Path) -> None:
    """In a process of its own: run, and be killed at that point of round 2; each step leaves a trace."""

    def at(kind: Any, name: str, when: str, count: int) -> None:
        """kill -9 at the count-th call, before it or after it."""
        right, calls = getattr(kind, name), []

        def watch(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == count and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "step":
                with begun.open("a") as f:
                    f.write("step\n")
            out = right(*args, **kwargs)
            if len(calls) == count and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        setattr(kind, name, watch)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    at(dpsgd.PrivateGradient, "step", "after" if point == "in a step" else "never", 13)  # round 2, third client
    if point.endswith("the line"):
        at(Ledger, "spend", point.split()[0], 7)
    elif point == "before the reply":
        at(app, "finish", "before", 7)
    elif point == "before the checkpoint":
        at(RunDirectory, "save", "before", 3)
    simulate(config)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before the line", "after the line", "in a step", "before the reply", "before the checkpoint"])
def test_kill_9_at_any_point_of_a_turn_loses_no_privacy_cost(tmp_path: Path, point: str) -> None:
    privacy = dataclasses.replace(RECORD, epsilon=None, noise=1.0)
    config, begun = tiny(tmp_path, privacy), tmp_path / "begun"
    context = multiprocessing.get_context("forkserver")
    # as in tests/runs/test_resume.py, so that both share the server
    context.set_forkserver_preload(["fedtune.experiment", "transformers", "peft"])
    process = context.Process(target=run_and_die, args=(config, point, begun))
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    (run,) = (tmp_path / "outputs" / "tiny").iterdir()

    def count_costs() -> int:
        return sum(len(Ledger(f).spent()) for f in (run / "privacy").iterdir())

    before, steps = count_costs(), len(begun.read_text().splitlines())
    assert before >= -(-steps // 2)  # a turn has two steps; every step was paid for
    assert before == {"before the line": 6, "before the checkpoint": 8}.get(point, 7)
    simulate(dataclasses.replace(config, resume=str(run)))
    assert count_costs() == before + 4  # round 2 is paid for again, by all four
    turns = {c: len(Ledger(ledger_file(run / "privacy", c)).spent()) for c in ("c0", "c1", "c2", "c3")}
    rate = next(r["dp_sample_rate"] for r in lines(run) if "dp_sample_rate" in r)
    most = epsilon([Spend(noise=1.0, rate=rate, steps=2)] * max(turns.values()), 1e-5, "rdp")
    assert f"(ε, δ) = ({most:.3g}, 1e-05)" in (run / "adapter" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("choice", choices("traffic"))
@pytest.mark.parametrize(
    "privacy", [RECORD, LOCAL, PrivacyConfig(kind="user", clip=0.1, accountant="rdp")], ids=["record", "client", "server"]
)
def test_every_codec_works_with_privacy(tmp_path: Path, privacy: PrivacyConfig, choice: str) -> None:
    run = simulate(tiny(tmp_path, privacy, traffic=compose([f"traffic={choice}"])[0].config.traffic))
    rounds = [r for r in lines(run) if r["client"] is None]
    assert [r["counted"] for r in rounds[1:]] == [4, 4] and rounds[1]["epsilon"] < rounds[2]["epsilon"] <= 8.0


def record_norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """‖Δ_k‖ of each update as the server decodes it, in the order of arrival."""
    norms: list[float] = []

    def read(content: RecordDict, assignment: Any, **rest: Any) -> Any:
        update, base = read_update(content, assignment, **rest), assignment.adapter.tensors
        norms.append(norm(moved(update.adapter.tensors, base)))
        return update

    monkeypatch.setattr("fedtune.rounds.round.read_update", read)
    return norms


@pytest.mark.parametrize("up", ["bf16", "int8"])
def test_a_client_clips_and_adds_noise_before_it_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: str) -> None:
    norms = record_norms(monkeypatch)
    quiet = dataclasses.replace(LOCAL, epsilon=None, noise=1e-6, clip=0.01)
    simulate(tiny(tmp_path, quiet, rounds=1, traffic=TrafficConfig(up=up)))
    # with negligible noise, each update has the clip norm, up to the codec's rounding; if it were encoded first, it would be longer
    assert norms == pytest.approx([0.01] * 4, rel=0.01)


@pytest.mark.slow
def test_error_feedback_is_clipped_with_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = record_norms(monkeypatch)
    privacy = PrivacyConfig(kind="user", clip=0.01, noise=1e-6, epsilon=None, accountant="rdp")
    traffic = TrafficConfig(topk=0.2, error_feedback=True)
    rounds = [adapter(simulate(tiny(tmp_path, privacy, rounds=n, traffic=traffic))) for n in (0, 1, 2)]
    steps = [norm(moved(after, before)) for before, after in zip(rounds, rounds[1:], strict=False)]
    # residuals included, an update is far longer than C = .01; the mean of four, each clipped after decoding, is not
    assert min(norms) > 0.02 and all(0 < step <= 0.01 * 1.001 for step in steps)


def test_a_run_with_noise_at_the_clients(tmp_path: Path) -> None:
    run = simulate(tiny(tmp_path, LOCAL))
    turns = [r for r in lines(run) if r["client"] is not None and r["round"] > 0]
    assert len(turns) == 8 and not any("dropped" in r for r in turns)  # four clients, two rounds; a refused turn has no `steps`
    for r in turns:
        assert r["dp_clip"] == 0.5 and r["dp_steps"] == 1 and r["dp_sample_rate"] == 1.0 and "train_loss" not in r
        # any other data of a client moves its update by up to 2C: half the multiplier counts
        assert r["epsilon"] == epsilon([Spend(noise=r["dp_noise"] / 2, rate=1.0, steps=r["round"])], 1e-5, "rdp") <= 8.0
    card = (run / "adapter" / "README.md").read_text()
    assert "replaced by any other" in card and "no amplification" in card and "noise added by the client" in card


def test_a_run_with_noise_at_the_server(tmp_path: Path) -> None:
    privacy = PrivacyConfig(kind="user", epsilon=8.0, clip=0.1, accountant="rdp")
    run = simulate(tiny(tmp_path, privacy, eval=EvalConfig(where="none", clients=-1)))
    rounds = [r for r in lines(run) if r["client"] is None]
    assert rounds[2]["counted"] == 4 and 0 < rounds[1]["epsilon"] < rounds[2]["epsilon"] <= 8.0 and rounds[1]["dp_clip"] == 0.1
    assert not any("dp_noise" in r for r in lines(run) if r["client"] is not None)


@pytest.mark.parametrize(
    ("privacy", "unit"),
    [
        (RECORD, "its contribution replaced by zero; the number of rows n is fixed (zero-out adjacency)"),
        (PrivacyConfig(kind="user"), "its contribution replaced by zero; the planned cohort m is fixed (zero-out adjacency)"),
        (LOCAL, "one client with all its rows, replaced by any other"),
    ],
    ids=["record", "user at the server", "user at the client"],
)
def test_the_card_states_the_adjacency_that_is_proven(privacy: PrivacyConfig, unit: str) -> None:
    from fedtune.runs.report.card import _privacy

    (line,) = [s for s in _privacy(to_dict(Config(privacy=privacy))["privacy"], [1.0]) if "privacy unit" in s]
    # adding or removing a row changes q = B / n and the division by it, a client the division by m: neither is covered
    assert line.endswith(unit) and "added" not in line and "removed" not in line


@pytest.mark.slow
def test_batched_clients_take_private_turns_one_by_one(tmp_path: Path) -> None:
    alone = adapter(simulate(tiny(tmp_path, RECORD)))
    together = adapter(simulate(tiny(tmp_path, RECORD, engine=EngineConfig(threads=1, batched="4"))))
    assert all(torch.equal(t, together[n]) for n, t in alone.items())


def test_a_smaller_rank_gets_no_noise_beyond_it(tmp_path: Path) -> None:
    from fedtune.clients.workspace import Workspace
    from fedtune.privacy.turn import turn_privacy

    config = tiny(tmp_path, RECORD)
    space = Workspace(config)
    state = space.initial
    cut = {n: t[:1] if n.endswith("lora_A") else t[:, :1] if n.endswith("lora_B") else t for n, t in state.tensors.items()}
    small = state.replace(cut, ranks=dict.fromkeys(state.spec.ranks, 1))
    space.live.load(small)
    client = space.client_ids[0]
    rows, plan = space.examples(client, "train"), base_plan(config, 1, client, 0)
    trainer.train(work_in(space, plan), private=turn_privacy(plan, len(rows), 2))
    for n, p in space.live.parameters.items():
        beyond = p[1:] if n.endswith("lora_A") else p[:, 1:]
        assert not beyond.any() and p.any()
