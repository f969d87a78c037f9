"""A client that does not answer holds up its round until the deadline: it is paused for longer each time, with a note."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedtune.config import Config
from fedtune.rounds.membership import Client
from fedtune.rounds.silence import LONGEST_PAUSE, paused_clients, record_miss
from fedtune.simulations.engines.grid import InProcessGrid
from tests.fakes import fake_bridge, fake_client_app

CLIENTS = {"a": 1, "b": 3}


class Deaf(InProcessGrid):
    """Node 2 answers the train message of round r only once the newest round is `when(r)`."""

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
        return super().pull_messages([i for i in message_ids if not (i in self._waiting and self._is_silent(self._waiting[i]))])

    def _is_silent(self, message: Message) -> bool:
        about = message.metadata
        return about.dst_node_id == 2 and about.message_type == "train" and self.newest < self.when(int(about.group_id))


def run(path: Path, rounds: int, when: Callable[[int], float] | None = None) -> tuple[Deaf, Any]:
    app = fake_client_app(CLIENTS)
    bridge, observer = fake_bridge(path, app, 2, Config(rounds=rounds, clients_per_round=10, round_timeout_s=0.05))
    grid = Deaf(app, 2)
    if when:
        grid.when = when  # type: ignore[method-assign]
    dataclasses.replace(bridge, grid=grid).loop()
    return grid, observer


def training_rounds(grid: Deaf) -> list[int]:
    return [round for kind, round in grid.asked if kind == "train"]


def test_a_client_that_hangs_costs_one_deadline_and_is_reported(tmp_path: Path) -> None:
    grid, observer = run(tmp_path / "r", 8)
    assert training_rounds(grid) == [1]
    # it is not asked for evaluations while its turn is unanswered
    assert [round for kind, round in grid.asked if kind == "evaluate"] == [0]
    assert [r["cohort"] for r in observer.records[1:]] == [2, 1, 1, 1, 1, 1, 1, 1]
    # by hand: pauses of 1, 2 and 4 rounds; the server looks for its reply in rounds 3, 5 and 9
    assert [n for n in observer.notes if "did not answer" in n] == [
        "client b did not answer in round 1: it is paused until round 3",
        "client b did not answer in round 2: it is paused until round 5",
        "client b did not answer in round 4: it is paused until round 9",
    ]


def test_a_client_that_is_always_late_has_growing_pauses(tmp_path: Path) -> None:
    grid, _ = run(tmp_path / "r", 12, when=lambda round: round + 1)
    assert training_rounds(grid) == [1, 3, 6, 11]  # with pauses of 1, 2 and 4 rounds


def test_a_client_that_was_late_once_is_asked_again_every_round(tmp_path: Path) -> None:
    grid, _ = run(tmp_path / "r", 6, when=lambda round: 2 if round == 1 else 0)
    assert training_rounds(grid) == [1, 3, 4, 5, 6]


def test_pauses_have_an_upper_limit(tmp_path: Path) -> None:
    client = Client(node=1, device_class="", examples=1, held=(), remembers=True)
    pauses = []
    for round in range(1, 10):
        record_miss("a", client, round, "x", lambda _: None)
        pauses.append(client.paused_until - round - 1)
    assert pauses == [1, 2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    grid = Deaf(fake_client_app(CLIENTS), 2)
    assert paused_clients(grid, {"a": client}, client.paused_until - 1, lambda _: None) == {"a"}
