"""Which nodes join when some connect late, do not answer, or claim another client's id."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.contracts import flower
from fedtune.errors import RunError
from fedtune.rounds import membership
from fedtune.rounds.membership import JoinPolicy, Membership

Answers = Callable[[int], dict[str, Any] | str | None]
HELLO = {"base": "b", "device_class": "", "examples": 3, "held_out": 1, "shifts": [], "remembers": True}


class Nodes:
    """A grid whose nodes connect after given seconds and give the answers of a function; None is no answer."""

    def __init__(self, answers: Answers, connect_s: dict[int, float]) -> None:
        flower.identify_process(1)
        self._answers, self._connect_s, self._began = answers, connect_s, time.monotonic()
        self.asked: list[int] = []
        self._sent: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [n for n, after in self._connect_s.items() if time.monotonic() - self._began >= after]

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        for message in messages:
            self.asked.append(message.metadata.dst_node_id)
            name = flower.stamp(message)
            self._sent[name] = message
            yield name

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        out = []
        for i in ids:
            answer = self._answers(self._sent[i].metadata.dst_node_id)
            if answer is not None:
                if isinstance(answer, dict) and "declined" in answer:
                    declined = {"kind": "failed", "why": answer["declined"], **{k: v for k, v in answer.items() if k == "client"}}
                    out.append(Message(RecordDict({"declined": ConfigRecord(declined)}), reply_to=self._sent[i]))
                    continue
                text = answer if isinstance(answer, str) else json.dumps({**HELLO, **answer})
                out.append(Message(RecordDict({"hello": ConfigRecord({"json": text})}), reply_to=self._sent[i]))
        return out


class Notes:
    """A run observer that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.known: list[str] = []

    def client_known(self, client: str, node: int, device_class: str) -> None:
        self.known.append(client)

    def note(self, text: str) -> None:
        self.notes.append(text)


def make_members(answers: Answers, connect_s: dict[int, float], min_clients: int = 2, **policy: Any) -> tuple[Membership, Nodes, Notes]:
    grid, notes = Nodes(answers, connect_s), Notes()
    join = JoinPolicy(**{"patience_s": 0.4, "retry_s": math.inf, **policy})
    return Membership(grid, "b", min_clients, join, notes, 1000), grid, notes  # type: ignore[arg-type]


def hello_of(node: int) -> dict[str, Any]:
    return {"client": f"c{node}"}


def test_fewer_clients_than_expected_suffice_after_the_timeout() -> None:
    members, _, _ = make_members(hello_of, {1: 0.0, 2: 0.0}, expected_clients=3)
    assert sorted(members.gather(1)) == ["c1", "c2"]


def test_the_wait_ends_once_all_clients_are_connected() -> None:
    began = time.monotonic()
    members, _, _ = make_members(hello_of, {1: 0.0, 2: 0.1, 3: 0.2}, expected_clients=3, patience_s=20.0)
    assert sorted(members.gather(1)) == ["c1", "c2", "c3"] and time.monotonic() - began < 20.0


def test_a_rejected_node_among_the_first_does_not_end_the_run() -> None:
    keys = {1: "mallory", 2: "c2", 3: "c3"}
    members, _, notes = make_members(hello_of, {1: 0.0, 2: 0.0, 3: 0.2}, expected_clients=2, patience_s=20.0, names=lambda: keys)
    assert sorted(members.gather(1)) == ["c2", "c3"]
    assert notes.notes.count("rejected: a client has the key of 'mallory' but the id 'c1': correct its --client-id or its key") == 1


def test_a_silent_node_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_STRAGGLERS_S", 0.1)
    members, _, notes = make_members(
        lambda n: None if n == 1 else hello_of(n), {1: 0.0, 2: 0.0, 3: 0.0}, expected_clients=2, patience_s=20.0
    )
    assert sorted(members.gather(1)) == ["c2", "c3"]
    assert "rejected: node 1: no reply" in notes.notes


@pytest.mark.parametrize("reply", ["{", {"declined": "no rows"}, None])
def test_a_rejected_node_is_named_by_its_key(reply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_STRAGGLERS_S", 0.1)
    node, keys = 4611686018427387904, {4611686018427387904: "anna", 2: "c2"}
    answer = lambda n: reply if n == node else hello_of(n)  # noqa: E731
    members, _, notes = make_members(answer, {node: 0.0, 2: 0.0}, 1, expected_clients=1, patience_s=2.0, names=lambda: keys)
    members.gather(1)
    rejected = [n for n in notes.notes if n.startswith("rejected")]
    assert rejected and all(n.startswith("rejected: client anna: ") and str(node) not in n for n in rejected)


def test_without_keys_a_decline_gives_the_name_and_a_known_client_keeps_its_name() -> None:
    answers: dict[int, list[Any]] = {7: [{"declined": "no rows", "client": "bo\x1bb"}], 8: [hello_of(8), "{"]}
    members, _, notes = make_members(lambda n: answers[n].pop(0), {7: 0.0, 8: 0.0}, 1, patience_s=2.0)
    members.gather(1)
    members._rejected[8] = -math.inf, ""  # the server asks again, as after a restart
    members._nodes.discard(8)
    members.wait_for_clients(2)
    assert notes.notes == ["rejected: client bo b: no rows", "rejected: client c8: its hello cannot be read"]


def test_an_engine_waits_for_all_nodes_and_fails_at_once_with_too_few() -> None:
    members, _, _ = make_members(hello_of, {1: 0.0, 2: 0.0, 3: 0.0}, min_clients=1, patience_s=20.0)
    assert sorted(members.gather(1)) == ["c1", "c2", "c3"]
    members, _, _ = make_members(lambda n: {"client": f"c{n}", "base": "x"}, {1: 0.0, 2: 0.0}, patience_s=20.0)
    with pytest.raises(RunError, match="0 clients can take part, min_clients=2: client c1 has backbone x, but the run has b"):
        members.gather(1)


def test_a_lost_hello_is_sent_again() -> None:
    nodes: list[int] = []
    answer = lambda n: None if n == 3 and nodes.count(3) < 2 else hello_of(n)  # noqa: E731
    members, grid, _ = make_members(answer, {1: 0.0, 2: 0.0, 3: 0.0}, expected_clients=2, retry_s=5.0)
    grid.asked = nodes
    members.gather(1)
    end = time.monotonic() + 10
    while "c3" not in members.clients and time.monotonic() < end:
        members.wait_for_clients(1)
    assert nodes.count(3) == 2 and "c3" in members.clients and nodes.count(1) == 1


@pytest.mark.parametrize(
    "reply",
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
def test_a_node_with_an_invalid_hello_is_rejected_by_name(reply: Any) -> None:
    members, _, notes = make_members(lambda n: reply if n == 3 else hello_of(n), {1: 0.0, 2: 0.0, 3: 0.0}, patience_s=20.0)
    assert sorted(members.gather(1)) == ["c1", "c2"]
    assert notes.notes == ["rejected: node 3: its hello cannot be read"]


@pytest.mark.parametrize(
    ("client", "why"),
    [
        ("x" * 201, "its client id '" + "x" * 40 + "…' has 201 characters, more than the limit of 200"),
        ("a\tb", "its client id 'a b' has an unprintable character (U+0009)"),
        ("a\u00a0b", "its client id 'a b' has an unprintable character (U+00A0)"),
        ("", "its client id '' is empty"),
    ],
)
def test_a_hello_with_an_unprintable_or_oversized_id_is_rejected(client: str, why: str) -> None:
    members, _, notes = make_members(
        lambda n: {**hello_of(n), "client": client} if n == 3 else hello_of(n), {1: 0.0, 2: 0.0, 3: 0.0}, patience_s=20.0
    )
    assert sorted(members.gather(1)) == ["c1", "c2"]
    assert notes.notes == [f"rejected: node 3: {why}: give it another"]


@pytest.mark.parametrize("claim", [{"examples": 10**9}, {"examples": 1001}, {"held_out": 10**400}])
def test_a_hello_that_reports_too_many_rows_is_rejected(claim: dict[str, Any]) -> None:
    members, _, notes = make_members(
        lambda n: {**hello_of(n), **claim} if n == 3 else {**hello_of(n), "examples": 1000}, {1: 0.0, 2: 0.0, 3: 0.0}
    )
    assert sorted(members.gather(1)) == ["c1", "c2"]
    assert len(notes.notes) == 1 and "more than weights.max_examples=1000" in notes.notes[0]
