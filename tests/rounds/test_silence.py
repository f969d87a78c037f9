"""A client that does not answer costs its round the whole deadline: it is asked less and less often, and it is said."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedtune.config import Config
from fedtune.rounds.membership import Client
from fedtune.rounds.silence import LONGEST, miss, resting
from fedtune.simulations.engines.grid import InProcessGrid
from tests.fakes import bridge, fake_client_app

CLIENTS = {"a": 1, "b": 3}


class Deaf(InProcessGrid):
    """Node 2 answers what it was asked in round r to train once the newest round is `when(r)`, and nothing before that."""

    when: Callable[[int], float] = staticmethod(lambda round: float("inf"))
    newest = 0
    asked: list[tuple[str, int]]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        abouts = [m.metadata for m in messages]
        self.asked = [*getattr(self, "asked", []), *((m.message_type, int(m.group_id)) for m in abouts if m.dst_node_id == 2)]
        self.newest = max([self.newest, *(int(m.group_id) for m in abouts)])
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([i for i in message_ids if not (i in self._waiting and self._silent(self._waiting[i]))])

    def _silent(self, message: Message) -> bool:
        about = message.metadata
        return about.dst_node_id == 2 and about.message_type == "train" and self.newest < self.when(int(about.group_id))


def run(path: Path, rounds: int, when: Callable[[int], float] | None = None) -> tuple[Deaf, Any]:
    app = fake_client_app(CLIENTS)
    made, ear = bridge(path, app, 2, Config(rounds=rounds, clients_per_round=10, round_timeout_s=0.05))
    grid = Deaf(app, 2)
    if when:
        grid.when = when  # type: ignore[method-assign]
    dataclasses.replace(made, grid=grid).loop()
    return grid, ear


def trained(grid: Deaf) -> list[int]:
    return [round for kind, round in grid.asked if kind == "train"]


def test_a_client_that_hangs_costs_one_deadline_and_is_named(tmp_path: Path) -> None:
    grid, ear = run(tmp_path / "r", 8)
    assert trained(grid) == [1]
    assert [round for kind, round in grid.asked if kind == "evaluate"] == [0]  # nor is it asked to evaluate while it is at its turn
    assert [r["cohort"] for r in ear.records[1:]] == [2, 1, 1, 1, 1, 1, 1, 1]
    # by hand: it sits out 1 round, then 2, then 4: looked for in rounds 3, 5 and 9
    assert [n for n in ear.notes if "did not answer" in n] == [
        "client b did not answer in round 1: it is not asked before round 3",
        "client b did not answer in round 2: it is not asked before round 5",
        "client b did not answer in round 4: it is not asked before round 9",
    ]


def test_a_client_that_is_always_late_is_asked_less_and_less_often(tmp_path: Path) -> None:
    grid, _ = run(tmp_path / "r", 12, when=lambda round: round + 1)
    assert trained(grid) == [1, 3, 6, 11]  # 1, 2 and 4 rounds in between


def test_a_client_that_was_late_once_is_asked_as_before(tmp_path: Path) -> None:
    grid, _ = run(tmp_path / "r", 6, when=lambda round: 2 if round == 1 else 0)
    assert trained(grid) == [1, 3, 4, 5, 6]


def test_no_pause_is_longer_than_the_longest(tmp_path: Path) -> None:
    client = Client(node=1, device_class="", examples=1, held=(), remembers=True)
    pauses = []
    for round in range(1, 10):
        miss("a", client, round, "x", lambda _: None)
        pauses.append(client.back - round - 1)
    assert pauses == [1, 2, 4, 8, LONGEST, LONGEST, LONGEST, LONGEST, LONGEST]
    grid = Deaf(fake_client_app(CLIENTS), 2)
    assert resting(grid, {"a": client}, client.back - 1, lambda _: None) == {"a"}
