"""The list of allowed clients is reloaded while the server runs: added, removed and rotated keys apply from the next request."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedtune.errors import LinkLost, NetworkError
from fedtune.network import allowed
from fedtune.network.allowed import AllowedClientsWatcher
from fedtune.network.keys import read_allowed
from fedtune.network.public import PULL, PublicPort
from tests.network.echo import Key, new_key, public_text
from tests.network.test_linkstate import empty, make_registrar  # noqa: F401
from tests.network.test_public_port import MAX, Inside, call, sign_headers
from tests.network.waiting import wait_until

A, B, C = new_key(), new_key(), new_key()


def names(**keys: Key) -> dict[str, str]:
    return {name: public_text(key) for name, key in keys.items()}


class Server:
    """Records the reports of the watcher of one file."""

    def __init__(self, file: Path, first: Mapping[str, str]) -> None:
        self.file, self.lists, self.notes, self.away = file, list[Mapping[str, str]](), list[str](), False
        self.write(json.dumps(dict(first)))
        self.watcher = AllowedClientsWatcher(file, first, read_allowed, self.change, self.notes.append)

    def change(self, keys: Mapping[str, str]) -> None:
        if self.away:
            raise LinkLost("it does not answer")
        self.lists.append(keys)

    def write(self, text: str) -> None:
        """Replace the file atomically, as an operator would."""
        beside = self.file.with_suffix(".tmp")
        beside.write_text(text)
        os.replace(beside, self.file)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "allowed.json", names(a=A, b=B))


def test_each_change_of_the_file_is_reported_once(server: Server) -> None:
    server.watcher.check()
    assert not server.lists and not server.notes
    server.write(json.dumps(names(a=C, c=B)))
    for _ in range(3):
        server.watcher.check()
    assert server.lists == [names(a=C, c=B)]
    assert server.notes == [f"{server.file} has changed: c added; b removed; a with a new key"]


def test_an_unusable_list_keeps_the_previous_one(server: Server) -> None:
    for text in ("{", "{}", json.dumps({"a": "no key"})):
        server.write(text)
        server.watcher.check()
        server.watcher.check()
    server.file.unlink()
    server.watcher.check()
    assert not server.lists and len(server.notes) == 4
    assert all(note.endswith("; the previous list of 2 clients stays in force") for note in server.notes)
    server.write(json.dumps(names(a=A)))
    server.watcher.check()
    assert server.lists == [names(a=A)]


def test_a_change_while_the_superlink_is_down_is_applied_later(server: Server) -> None:
    server.away = True
    server.write(json.dumps(names(a=A)))
    server.watcher.check()
    assert not server.lists and not server.notes
    server.away = False
    server.watcher.check()
    assert server.lists == [names(a=A)]


def test_the_file_is_checked_periodically(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed, "CHECK_S", 0.01)
    with server.watcher:
        server.write(json.dumps(names(a=A)))
        wait_until(lambda: server.lists)
    assert not server.watcher._thread.is_alive()


def test_keys_are_added_and_removed_while_the_port_is_open(tmp_path: Path, empty: Path) -> None:  # noqa: F811
    registrar = make_registrar(tmp_path, names(a=A, b=B), empty)
    registrar.sync_nodes()
    port = PublicPort(Inside(), max_body=MAX, keys=registrar._keys)

    def statuses() -> list[int]:
        return [call(port, PULL, [b""], headers=sign_headers(key))[0] for key in (A, B, C)]

    ids = {n["name"]: n["node_id"] for n in registrar.nodes()["nodes"]}
    assert statuses() == [200, 200, 401]
    registrar.allow(names(a=A, b=C))  # b's key was rotated
    assert statuses() == [200, 401, 200]
    now = {n["name"]: n["node_id"] for n in registrar.nodes()["nodes"]}
    assert now["a"] == ids["a"] and set(now) == {"a", "b"} and now["b"] != ids["b"]
    assert registrar._state.get_node_id_by_public_key(public_key_to_bytes(B.public_key())) is None
    registrar.allow(names(a=A))
    assert statuses() == [200, 401, 401]
    with pytest.raises(NetworkError, match="cannot be read"):
        registrar.allow({"a": "no key"})
    assert statuses() == [200, 401, 401]
