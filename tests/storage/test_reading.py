"""The reader of untrusted JSON: exact types, finite numbers, no unknown fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.contracts.hello import ClientHello, ServerHello
from fedtune.errors import PlanError
from fedtune.storage.reading import read_fields, read_object


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    rate: float
    kind: Literal["a", "b"] = "a"
    rank: int | None = None
    names: tuple[str, ...] = ()
    pair: tuple[str, int] = ("", 0)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner(name="x")  # noqa: RUF009  frozen
    many: tuple[Inner, ...] = ()
    free: Any = None


GOOD = {"count": 1, "rate": 2}


def test_every_type_of_field_is_read() -> None:
    document = {
        **GOOD,
        "kind": "b",
        "rank": 3,
        "names": ["x"],
        "pair": ["y", 2],
        "shapes": {"q": [2, 3]},
        "scores": {"s": 1},
        "inner": {"name": "i"},
        "many": [{"name": "m", "size": 2}],
        "free": {"any": [None]},
    }
    assert read_object(Outer, json.dumps(document), ValueError, "thing") == Outer(
        count=1,
        rate=2,
        kind="b",
        rank=3,
        names=("x",),
        pair=("y", 2),
        shapes={"q": (2, 3)},
        scores={"s": 1},
        inner=Inner(name="i"),
        many=(Inner(name="m", size=2),),
        free={"any": [None]},
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": True}, r"the thing's count is 'True', which is not of type int$"),
        ({"count": 1.0}, "the thing's count is '1.0'"),
        ({"rate": float("nan")}, "the thing's rate is 'nan'"),
        ({"rate": float("inf")}, "the thing's rate is 'inf'"),
        ({"kind": "c"}, "the thing's kind is 'c'"),
        ({"kind": 1}, "the thing's kind is '1'"),
        ({"rank": "3"}, "the thing's rank is '3'"),
        ({"names": "x"}, "the thing's names is 'x'"),
        ({"names": [1]}, "the thing's names is '1'"),
        ({"pair": ["y"]}, "the thing's pair is"),
        ({"pair": ["y", 2, 3]}, "the thing's pair is"),
        ({"shapes": {"q": [2.5]}}, "the thing's q is 2.5"),
        ({"shapes": []}, "the thing's shapes is"),
        ({"scores": {"s": float("nan")}}, "the thing's s is nan"),
        ({"scores": {"\x1b[2J": "x"}}, "the thing's  .2J is x"),
        ({"inner": {"name": 1}}, "the thing's inner is"),
        ({"inner": {"name": "i", "other": 1}}, "the thing's inner is"),
        ({"many": [{"size": 1}]}, "the thing's many is"),
        ({"extra": 1}, "the thing has the unknown field 'extra'"),
    ],
)
def test_an_invalid_field_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        read_object(Outer, json.dumps({**GOOD, **change}), PlanError, "thing")


def test_unknown_fields_can_be_ignored() -> None:
    assert read_fields(Inner, {"name": "i", "note": 1}, ValueError, "file", others=True) == {"name": "i"}
    with pytest.raises(ValueError, match="the file lacks the field 'name'"):
        read_fields(Inner, {"note": 1}, ValueError, "file", others=True)


@given(
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=8)
)
def test_arbitrary_json_is_refused(value: object) -> None:
    for kind in (ClientHello, ServerHello):
        with pytest.raises((ValueError, PlanError)):
            kind.from_json(json.dumps(value))


def test_a_client_hello_survives_json_and_its_counts_are_checked() -> None:
    hello = ClientHello(client="a", device_class="", examples=3, held_out=0, base="b", shifts=(1, 2), remembers=True, rank=2)
    assert ClientHello.from_json(hello.to_json()) == hello and "device" not in json.loads(hello.to_json())
    for wrong in ({"examples": -1}, {"held_out": -1}, {"rank": 0}, {"remembers": 1}, {"shifts": [1.5]}):
        with pytest.raises(ValueError, match="hello"):
            ClientHello.from_json(json.dumps({**json.loads(hello.to_json()), **wrong}))


def test_a_server_hello_without_an_experiment_is_refused() -> None:
    for text in ("", "[]", "{}", '{"config": [], "run": "r", "labels": []}', '{"config": {}, "run": 7, "labels": []}'):
        with pytest.raises(PlanError, match="the server's hello cannot be read"):
            ServerHello.from_json(text)
