"""Plans of a peer that may run another version, or be malicious."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import PlanError

PLAN = Plan(round=1, client="a", base_version=0)


def test_a_plan_survives_json() -> None:
    plan = dataclasses.replace(PLAN, train=("*.lora_B",), steps=3, epochs=None, clip_norm=None, lr=0.1)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"params": {"mu": [1]}}, "the plan's mu is \\[1\\]"),
        ({"optimizer": "lion"}, "the plan's optimizer=lion is not known: choose one of adamw, sgd"),
        ({"teleport": 1}, "the plan has the unknown field 'teleport'"),
        ({"steps": None, "epochs": None}, "neither steps nor epochs"),
        ({"steps": 0}, "the plan's steps=0 is out of range: it must be at least 1"),
        ({"batch_size": "8"}, "the plan's batch_size is '8', which is not of type"),
        ({"lr": float("nan")}, "the plan's lr is 'nan'"),
        ({"round": True}, "the plan's round is 'True'"),
        ({"train": "*"}, "the plan's train is '*'"),
        ({"train": [1]}, "the plan's train is"),
    ],
)
def test_an_invalid_plan_is_refused_by_name(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence.replace("*", r"\*")):
        Plan.from_json(json.dumps({**json.loads(PLAN.to_json()), **change}))


def test_a_plan_that_lacks_a_field_is_refused() -> None:
    with pytest.raises(PlanError, match="lacks the field 'client'"):
        Plan.from_json('{"round": 1, "base_version": 0}')


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=8)
)
def test_arbitrary_json_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(value))


def test_patterns_select_in_the_adapters_order() -> None:
    names = ["q.lora_A", "q.lora_B", "head.weight"]
    assert matching(names, ("head.*", "*.lora_B")) == ["q.lora_B", "head.weight"]


def test_seeds_depend_only_on_their_parts() -> None:
    assert derive_seed(0, "cohort", 1) == 7760491698977831147  # the same in every process, version and machine
    assert (
        len(
            {
                derive_seed(0, "cohort", 1),
                derive_seed(0, "cohort", 2),
                derive_seed(1, "cohort", 1),
                derive_seed(0, "cohort", "1"),
                derive_seed(0, "cohort1"),
            }
        )
        == 5
    )
    assert all(0 <= derive_seed(s) < 2**63 for s in range(100))
