"""Checks of privacy terms: a client checks the plan, the server checks each update, and the config is checked."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from fedtune.clients.app import make_client_app
from fedtune.clients.turns import check_private
from fedtune.config import Config, PrivacyConfig, check
from fedtune.config.compose import compose
from fedtune.contracts.plan import Plan
from fedtune.contracts.privacy_terms import check_terms, terms
from fedtune.errors import ConfigError, PlanError, UpdateError
from fedtune.experiment import simulate
from fedtune.privacy.verify import verify
from fedtune.rounds.planning import base_plan
from tests.privacy.test_private_runs import LOCAL, RECORD, lines, tiny
from tests.working import host_for

# -- checks of client and server ----------------------------------------------------------------------------------------------------------


def plan_of(config: Config) -> Plan:
    plan = base_plan(config, 1, "c0", 0)
    assert Plan.from_json(plan.to_json()) == plan
    return plan


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy": "none"}, "the plan asks for privacy=none, but this client's config has record"),
        ({"dp_clip": 5.0}, "dp_clip=5.0, but this client's config has 0.5"),
        ({"dp_epsilon": 80.0}, "dp_epsilon=80.0, but this client's config has 8.0"),
        ({"dp_noise": 0.01}, "dp_noise=0.01, but this client's config has None"),
        ({"dp_turns": 1}, "dp_turns=1, but this client's config has 2"),
        ({"turn": "fedpeptao", "params": {"share": False}}, "the turn 'fedpeptao', which privacy=record does not cover"),
        ({"turn": "slora", "params": {"stage": "sparse"}}, "the turn 'slora', which privacy=record does not cover"),
        ({"measure": ("start_loss",)}, "asks for start_loss, an exact loss"),
    ],
)
def test_a_client_refuses_a_plan_that_is_less_private_than_its_config(changes: dict[str, Any], sentence: str) -> None:
    config = Config(rounds=2, privacy=RECORD)
    check_terms(plan_of(config), config)
    check_private(plan_of(config))
    with pytest.raises(PlanError, match=sentence):
        plan = dataclasses.replace(plan_of(config), **changes)
        check_terms(plan, config)
        check_private(plan)


def test_a_client_without_privacy_refuses_a_private_plan() -> None:
    with pytest.raises(PlanError, match="privacy=record, but this client's config has none"):
        check_terms(plan_of(Config(rounds=2, privacy=RECORD)), Config(rounds=2))


REPORTED = {"steps": 2.0, "dp_clip": 0.5, "dp_noise": 1.3, "dp_sample_rate": 0.2, "dp_steps": 2.0, "epsilon": 3.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dp_clip": None}, "does not report dp_clip"),
        ({"dp_clip": 50.0}, "reports dp_clip=50"),
        ({"dp_noise": 0.0}, "reports dp_noise=0"),
        ({"dp_noise": None}, "does not report dp_noise"),
        ({"dp_sample_rate": 1.5}, "reports dp_sample_rate=1.5"),
        ({"dp_steps": 1.0}, "reports dp_steps=1"),
        ({"epsilon": 8.5}, "reports epsilon=8.5"),
        ({"epsilon": None}, "does not report epsilon"),
    ],
)
def test_the_bridge_refuses_an_update_that_does_not_report_its_privacy(changes: dict[str, Any], sentence: str) -> None:
    plan = plan_of(Config(rounds=2, privacy=RECORD))
    verify(plan, REPORTED)
    with pytest.raises(UpdateError, match=f"must be private .privacy=record., but it {sentence}"):
        verify(plan, {n: v for n, v in {**REPORTED, **changes}.items() if v is not None})
    verify(plan_of(Config()), {})


@pytest.mark.parametrize("privacy", [RECORD, LOCAL], ids=["record", "user at the client"])
def test_an_epsilon_that_the_noise_does_not_give_is_refused(privacy: PrivacyConfig) -> None:
    plan = plan_of(Config(rounds=2, privacy=privacy))
    metrics = {**REPORTED, "dp_noise": 6.0, **({"dp_sample_rate": 1.0, "dp_steps": 1.0} if privacy.kind == "user" else {})}
    verify(plan, metrics)
    with pytest.raises(UpdateError, match="reports epsilon=3 with dp_noise=0.05, with which a single step costs more"):
        verify(plan, {**metrics, "dp_noise": 0.05})
    if privacy.kind == "user":
        with pytest.raises(UpdateError, match="reports dp_sample_rate=0.2"):
            verify(plan, {**metrics, "dp_sample_rate": 0.2})


def test_a_fixed_noise_must_equal_the_plan_s() -> None:
    plan = plan_of(Config(privacy=dataclasses.replace(RECORD, noise=1.3, epsilon=None)))
    verify(plan, {**REPORTED, "epsilon": 99.0})
    with pytest.raises(UpdateError, match="reports dp_noise=1.2"):
        verify(plan, {**REPORTED, "dp_noise": 1.2})


def test_an_update_without_its_clip_is_dropped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.clients.app.privacy_measurements", lambda *args: {})  # a client that reports no privacy
    # fixed noise, because solving for ε takes two seconds
    run = simulate(tiny(tmp_path, dataclasses.replace(RECORD, epsilon=None, noise=1.0), rounds=1))
    dropped = [r["dropped"] for r in lines(run) if r["client"] is not None and r["round"] == 1]
    assert len(dropped) == 4 and all("refused: the update must be private (privacy=record)" in d for d in dropped)


def test_a_private_turn_needs_a_ledger(tmp_path: Path) -> None:
    host = host_for(tiny(tmp_path, RECORD))
    with pytest.raises(PlanError, match="what it has spent would be forgotten"):
        host.ledger("c0")
    assert make_client_app(host) and RecordDict() is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy": "secret"}, "the plan's privacy=secret is not known: choose one of none, record, user"),
        ({"dp_accountant": "gdp"}, "the plan's dp_accountant=gdp is not known: choose one of prv, rdp"),
        ({"dp_clip": 0.0}, "the plan's dp_clip=0.0 is out of range: it must be greater than 0"),
        ({"dp_noise": -1.0}, "the plan's dp_noise=-1.0 is out of range: it must be greater than 0"),
        ({"dp_epsilon": None}, "sets neither dp_noise nor dp_epsilon"),
        ({"dp_delta": 1.0}, "the plan's dp_delta=1.0 is out of range: it must be less than 1"),
        ({"dp_turns": 0}, "the plan's dp_turns=0 is out of range: it must be at least 1"),
    ],
)
def test_a_private_plan_without_noise_and_epsilon_is_refused(changes: dict[str, Any], sentence: str) -> None:
    text = json.dumps({**json.loads(plan_of(Config(privacy=RECORD)).to_json()), **changes})
    with pytest.raises(PlanError, match=sentence):
        Plan.from_json(text)


def test_an_epsilon_without_privacy_is_refused() -> None:
    with pytest.raises(ConfigError, match="^privacy.epsilon has no effect with privacy=none: add privacy=record or privacy=user$"):
        compose(["privacy.epsilon=8", "privacy.delta=1e-5"])
    assert compose(["privacy=record", "privacy.epsilon=8", "privacy.delta=1e-5"])[0].config.privacy.kind == "record"


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (PrivacyConfig(kind="record", where="client"), "with privacy=record clients always add the noise"),
        (PrivacyConfig(kind="record", epsilon=None), "neither an epsilon nor a noise level"),
        (PrivacyConfig(kind="record", adaptive=True), "needs privacy=user"),
        (PrivacyConfig(kind="user", adaptive=True, where="client"), "needs privacy.where=server"),
        (PrivacyConfig(kind="record", delta=1.0), "privacy.delta=1.0 is out of range: it must be less than 1"),
        (PrivacyConfig(kind="record", noise=0.0), "privacy.noise=0.0 is out of range: it must be greater than 0"),
    ],
)
def test_invalid_privacy_settings_are_refused(privacy: PrivacyConfig, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(Config(privacy=privacy))


def test_per_row_clipping_replaces_gradient_clipping() -> None:
    assert plan_of(Config(privacy=RECORD)).clip_norm is None and plan_of(Config()).clip_norm == 1.0
    assert terms(Config(privacy=PrivacyConfig(kind="user"))) == {"privacy": "none"}  # only the server acts
