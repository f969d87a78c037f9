"""One range check and one form of error for settings, options, plans and turns."""

import math
from typing import Any

import pytest

from fedtune.config.bounds import require
from fedtune.errors import ConfigError, PlanError


@pytest.mark.parametrize(
    ("name", "value", "bounds", "sentence"),
    [
        ("client.lr", 0.0, {"gt": 0}, "client.lr=0.0 is out of range: it must be greater than 0"),
        ("client.lr", math.nan, {"gt": 0}, "client.lr=nan is out of range: it must be greater than 0"),
        ("rounds", -1, {"ge": 0}, "rounds=-1 is out of range: it must be at least 0"),
        ("share", 1.5, {"ge": 0, "le": 1}, "share=1.5 is out of range: it must be at most 1"),
        ("delta", 1.0, {"gt": 0, "lt": 1}, "delta=1.0 is out of range: it must be less than 1"),
        ("timeout", math.inf, {"lt": math.inf}, "timeout=inf is out of range: it must be finite"),
        ("kind", "x", {"choices": ("a", "b")}, "kind=x is not known: choose one of a, b"),
        ("kind", "\x1b[2J" + "x" * 60, {"choices": ("a",)}, f"kind= [2J{'x' * 36}… is not known: choose one of a"),
        ("--seed", -1, {"ge": 0}, "--seed -1 is out of range: it must be at least 0"),
        ("--delta", 1.0, {"lt": 1}, "--delta 1 is out of range: it must be less than 1"),
    ],
)
def test_a_value_out_of_range_gives_a_one_sentence_error(name: str, value: Any, bounds: dict[str, Any], sentence: str) -> None:
    for error in (ConfigError, PlanError):
        with pytest.raises(error) as caught:
            require(name, value, error, **bounds)
        assert str(caught.value) == sentence


def test_a_value_in_range_passes() -> None:
    require("a", 0, ge=0, le=0)
    require("a", 0.5, gt=0, lt=1)
    require("a", 1e300, lt=math.inf)
    require("a", "b", choices=("a", "b"))
    require("a", None, ge=1, choices=("a",))  # not set
