"""Who is let in where nodes come late, say nothing, or are not who they say they are."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.contracts import flower
from fedtune.errors import RunError
from fedtune.rounds import membership as roll
from fedtune.rounds.membership import Roll, Welcome

Said = Callable[[int], dict[str, Any] | str | None]
HELLO = {"base": "b", "device_class": "", "examples": 3, "held_out": 1, "shifts": [], "remembers": True}


class Nodes:
    """A grid of nodes that are there from some time on, and say what they are told to say; None says nothing."""

    def __init__(self, said: Said, come: dict[int, float]) -> None:
        flower.identify_process(1)
        self._said, self._come, self._began = said, come, time.monotonic()
        self.asked: list[int] = []
        self._sent: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [n for n, after in self._come.items() if time.monotonic() - self._began >= after]

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        for message in messages:
            self.asked.append(message.metadata.dst_node_id)
            name = flower.stamp(message)
            self._sent[name] = message
            yield name

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        out = []
        for i in ids:
            said = self._said(self._sent[i].metadata.dst_node_id)
            if said is not None:
                if isinstance(said, dict) and "declined" in said:
                    declined = {"kind": "failed", "why": said["declined"], **{k: v for k, v in said.items() if k == "client"}}
                    out.append(Message(RecordDict({"declined": ConfigRecord(declined)}), reply_to=self._sent[i]))
                    continue
                text = said if isinstance(said, str) else json.dumps({**HELLO, **said})
                out.append(Message(RecordDict({"hello": ConfigRecord({"json": text})}), reply_to=self._sent[i]))
        return out


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.known: list[str] = []

    def client_known(self, client: str, node: int, device_class: str) -> None:
        self.known.append(client)

    def note(self, text: str) -> None:
        self.notes.append(text)


def made(said: Said, come: dict[int, float], least: int = 2, **welcome: Any) -> tuple[Roll, Nodes, Notes]:
    grid, notes = Nodes(said, come), Notes()
    return Roll(grid, "b", least, Welcome(**{"patience_s": 0.4, "again_s": math.inf, **welcome}), notes, 1000), grid, notes  # type: ignore[arg-type]


def named(node: int) -> dict[str, Any]:
    return {"client": f"c{node}"}


def test_those_who_are_there_will_do_once_the_time_is_up() -> None:
    at_door, _, _ = made(named, {1: 0.0, 2: 0.0}, wanted=3)
    assert sorted(at_door.gather(1)) == ["c1", "c2"]


def test_nobody_waits_where_all_have_come() -> None:
    began = time.monotonic()
    at_door, _, _ = made(named, {1: 0.0, 2: 0.1, 3: 0.2}, wanted=3, patience_s=20.0)
    assert sorted(at_door.gather(1)) == ["c1", "c2", "c3"] and time.monotonic() - began < 20.0


def test_a_stranger_among_the_first_does_not_end_the_run() -> None:
    keys = {1: "mallory", 2: "c2", 3: "c3"}
    at_door, _, notes = made(named, {1: 0.0, 2: 0.0, 3: 0.2}, wanted=2, patience_s=20.0, names=lambda: keys)
    assert sorted(at_door.gather(1)) == ["c2", "c3"]
    assert notes.notes.count("left out, a client has the key of 'mallory' and calls itself 'c1': set its --client-id, or its key") == 1


def test_a_node_that_says_nothing_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "_STRAGGLERS_S", 0.1)
    at_door, _, notes = made(lambda n: None if n == 1 else named(n), {1: 0.0, 2: 0.0, 3: 0.0}, wanted=2, patience_s=20.0)
    assert sorted(at_door.gather(1)) == ["c2", "c3"]
    assert "left out, node 1: no reply" in notes.notes


@pytest.mark.parametrize("said", ["{", {"declined": "no rows"}, None])
def test_whoever_is_left_out_has_its_name_where_its_key_tells_it(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "_STRAGGLERS_S", 0.1)
    node, keys = 4611686018427387904, {4611686018427387904: "anna", 2: "c2"}
    answer = lambda n: said if n == node else named(n)  # noqa: E731
    at_door, _, notes = made(answer, {node: 0.0, 2: 0.0}, 1, wanted=1, patience_s=2.0, names=lambda: keys)
    at_door.gather(1)
    left = [n for n in notes.notes if n.startswith("left out")]
    assert left and all(n.startswith("left out, client anna: ") and str(node) not in n for n in left)


def test_without_keys_a_decline_brings_the_name_and_a_known_client_keeps_its_own() -> None:
    answers: dict[int, list[Any]] = {7: [{"declined": "no rows", "client": "bo\x1bb"}], 8: [named(8), "{"]}
    at_door, _, notes = made(lambda n: answers[n].pop(0), {7: 0.0, 8: 0.0}, 1, patience_s=2.0)
    at_door.gather(1)
    at_door._refused[8] = -math.inf, ""  # asked anew, as after a restart
    at_door._nodes.discard(8)
    at_door.present(2)
    assert notes.notes == ["left out, client bo b: no rows", "left out, client c8: its hello cannot be read"]


def test_an_engine_s_nodes_are_all_heard_and_too_few_are_too_few_at_once() -> None:
    at_door, _, _ = made(named, {1: 0.0, 2: 0.0, 3: 0.0}, least=1, patience_s=20.0)
    assert sorted(at_door.gather(1)) == ["c1", "c2", "c3"]
    at_door, _, _ = made(lambda n: {"client": f"c{n}", "base": "x"}, {1: 0.0, 2: 0.0}, patience_s=20.0)
    with pytest.raises(RunError, match="0 clients can take part, min_clients=2: client c1 holds another backbone"):
        at_door.gather(1)


def test_a_hello_that_was_lost_is_said_again() -> None:
    asked: list[int] = []
    at_door, grid, _ = made(lambda n: None if n == 3 and asked.count(3) < 2 else named(n), {1: 0.0, 2: 0.0, 3: 0.0}, wanted=2, again_s=5.0)
    grid.asked = asked
    at_door.gather(1)
    end = time.monotonic() + 10
    while "c3" not in at_door.clients and time.monotonic() < end:
        at_door.present(1)
    assert asked.count(3) == 2 and "c3" in at_door.clients and asked.count(1) == 1


@pytest.mark.parametrize(
    "said",
    [
        json.dumps({**HELLO, "client": "c3"}).replace('"examples": 3', '"examples": Infinity'),
        {"client": "c3", "examples": -5},
        {"client": "c3", "held_out": -1},
        {"client": "c3", "rank": 0},
        {"client": "c3", "shifts": 7},
        "[1]",
        "[" * 10000,
    ],
)
def test_a_hello_that_makes_no_sense_is_left_out_by_name(said: Any) -> None:
    at_door, _, notes = made(lambda n: said if n == 3 else named(n), {1: 0.0, 2: 0.0, 3: 0.0}, patience_s=20.0)
    assert sorted(at_door.gather(1)) == ["c1", "c2"]
    assert notes.notes == ["left out, node 3: its hello cannot be read"]


@pytest.mark.parametrize(
    ("client", "why"),
    [
        ("x" * 201, "its client id '" + "x" * 40 + "…' has 201 characters, at most 200 are allowed"),
        ("a\tb", "its client id 'a b' holds a character that cannot be printed (U+0009)"),
        ("a\u00a0b", "its client id 'a b' holds a character that cannot be printed (U+00A0)"),
        ("", "its client id '' is empty"),
    ],
)
def test_a_hello_with_an_id_that_no_table_can_show_is_left_out_for_that(client: str, why: str) -> None:
    roll, _, notes = made(lambda n: {**named(n), "client": client} if n == 3 else named(n), {1: 0.0, 2: 0.0, 3: 0.0}, patience_s=20.0)
    assert sorted(roll.gather(1)) == ["c1", "c2"]
    assert notes.notes == [f"left out, node 3: {why}: give it another"]


@pytest.mark.parametrize("claim", [{"examples": 10**9}, {"examples": 1001}, {"held_out": 10**400}])
def test_a_hello_cannot_claim_more_rows_than_are_believed(claim: dict[str, Any]) -> None:
    roll, _, notes = made(lambda n: {**named(n), **claim} if n == 3 else {**named(n), "examples": 1000}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert sorted(roll.gather(1)) == ["c1", "c2"]
    assert len(notes.notes) == 1 and "at most weights.max_examples=1000 are believed" in notes.notes[0]
