"""The SuperLink's state and application in this process: admission, a new run, a restarted node, a full disk."""

import asyncio
import io
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.grid import HttpGrid
from sqlalchemy import event, text

from fedtune.contracts import flower
from fedtune.errors import NetworkError
from fedtune.network import node
from fedtune.network.fleet import Fleet, Refused, Unreachable
from fedtune.network.grid import LinkGrid
from fedtune.network.linkstate import Registrar, make_fab, read_keys
from fedtune.network.public import PublicPort
from fedtune.network.superlink import CLEANUP_S, LOCK_TIMEOUT_S, ProcessSettings, _answer, _make_app
from tests.network.echo import Echo, Key, large, new_key, public_text, round_trip, small
from tests.network.running import Start
from tests.quick import quick


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all of Flower's tables; creating them takes a second."""
    folder = tmp_path_factory.mktemp("empty")
    make_registrar(folder, None)
    return folder / "superlink.db"


def make_registrar(folder: Path, allowed: dict[str, str] | None, empty: Path | None = None) -> Registrar:
    if empty is not None:
        shutil.copy(empty, folder)
    keys = None if allowed is None else read_keys(allowed)
    rest: dict[str, Any] = {"host": "", "port": 0, "private_port": 0, "certificate": None, "certificate_key": None}
    task = ProcessSettings(folder=str(folder), log="", allowed_keys=allowed, max_body=1, parent=0, **rest)
    app, registrar = _make_app(task, keys)
    registrar.app = app  # type: ignore[attr-defined]
    return registrar


def test_the_bundle_is_metadata_only() -> None:
    with zipfile.ZipFile(io.BytesIO(make_fab().content)) as bundle:
        assert sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"]  # no code
        project = bundle.read("pyproject.toml").decode()
    assert 'publisher = "fedtune"' in project and 'name = "fedtune"' in project and "fedtune.cli.flower_app:" in project


def test_an_allowed_key_keeps_its_node_and_a_removed_key_loses_it(tmp_path: Path, empty: Path) -> None:
    a, b = public_text(new_key()), public_text(new_key())
    first = make_registrar(tmp_path, {"a": a, "b": b}, empty)
    first.sync_nodes()
    ids = {n["name"]: n["node_id"] for n in first.nodes()["nodes"]}
    assert set(ids) == {"a", "b"} and not any(n["online"] or n["last_seen"] for n in first.nodes()["nodes"])
    second = Registrar(first._state, read_keys({"a": a}))
    second.sync_nodes()
    assert {n["name"]: n["node_id"] for n in second.nodes()["nodes"]} == {"a": ids["a"]}
    third = Registrar(first._state, read_keys({"a": a, "b": b}))  # allowed again: Flower itself would refuse the key forever
    third.sync_nodes()
    assert {n["name"] for n in third.nodes()["nodes"]} == {"a", "b"}


def test_an_unusable_key_is_named(tmp_path: Path) -> None:
    text = public_text(new_key())
    for keys, message in (
        ({"a": "ssh-rsa nonsense"}, "key of client 'a' cannot be read"),
        ({"a": text, "b": text}, "'a' and 'b' have the same public key"),
        ({"a": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1v0rJ1W0d4N1m0yqv5c4nq1h2m8m2o3b4k5l6m7n8o"}, "client 'a' is not on a NIST curve"),
    ):
        with pytest.raises(NetworkError, match=message):
            read_keys(keys)


def test_a_new_run_ends_the_older_one(tmp_path: Path, empty: Path) -> None:
    registrar = make_registrar(tmp_path, None, empty)
    first, second = registrar.open_run("one"), registrar.open_run("two")
    assert first["run_id"] != second["run_id"] and first["token"] != second["token"]
    state = registrar._state
    status = state.get_run_status({first["run_id"], second["run_id"]})
    assert (status[first["run_id"]].status, status[second["run_id"]].status) == ("finished", "running")
    assert state.get_run_info(run_ids=[second["run_id"]])[0].fab_id == "fedtune/fedtune"


def test_a_locked_database_is_waited_for(tmp_path: Path, empty: Path) -> None:
    with make_registrar(tmp_path, None, empty)._state.session() as session:  # type: ignore[attr-defined]
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 1000 * LOCK_TIMEOUT_S  # ms; Flower's own 5 s are not enough


def test_a_restarted_node_is_admitted_at_once_and_messages_of_its_old_process_are_lost(tmp_path: Path, empty: Path) -> None:
    key = new_key()
    registrar = make_registrar(tmp_path, {"a": public_text(key)}, empty)
    registrar.sync_nodes()
    state, encoded = registrar._state, public_key_to_bytes(key.public_key())
    (node,) = (n["node_id"] for n in registrar.nodes()["nodes"])
    run = registrar.open_run("x")["run_id"]
    flower.identify_process(run)
    registrar.take_over(encoded)  # its first process: nothing to take over
    assert state.activate_node(node, 30)
    names = []
    for value in range(2):
        message = Message(small(value), node, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        names.append(state.store_message_ins(message))
    (taken,) = state.get_message_ins(node_id=node, limit=1)
    assert not state.activate_node(node, 30)  # Flower would refuse its second process for a minute
    registrar.take_over(encoded)
    assert state.activate_node(node, 30)
    waiting = state.get_message_ids_from_run_id(run)
    assert waiting == set(names) - {taken.metadata.message_id}  # messages that it had not fetched still wait for it
    (reply,) = state.get_message_res({taken.metadata.message_id}, run)
    assert reply.has_error() and reply.metadata.reply_to_message_id == taken.metadata.message_id


def test_a_request_takes_no_lock_to_look_for_silent_tasks(tmp_path: Path, empty: Path) -> None:
    registrar = make_registrar(tmp_path, None, empty)
    run, state = registrar.open_run("x")["run_id"], registrar._state
    state.get_run_status({run})
    statements: list[str] = []
    event.listen(state._engine, "before_cursor_execute", lambda c, cursor, statement, *_: statements.append(statement))  # type: ignore[attr-defined]
    assert state.get_run_status({run})[run].status == "running"
    assert statements and not any(statement.startswith(("UPDATE", "DELETE")) for statement in statements)
    vars(state)["_fedtune_cleaned"] -= CLEANUP_S
    with state.session() as session:  # type: ignore[attr-defined]
        session.execute(text("UPDATE task SET active_until = '2000-01-01 00:00:00'"))
    assert state.get_run_status({run})[run].status == "finished"  # because its ServerApp was silent for long


def half_sent(registrar: Registrar, key: Key) -> tuple[str, int, int]:
    """Send half of a reply. Returns the ids of the message, the run and the node."""
    state, (node,) = registrar._state, (n["node_id"] for n in registrar.nodes()["nodes"])
    run = registrar.open_run("x")["run_id"]
    flower.identify_process(run)
    assert state.activate_node(node, 30)
    message = Message(small(1), node, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    state.store_message_ins(message)
    (taken,) = state.get_message_ins(node_id=node, limit=1)
    reply = Message(small(2), reply_to=taken)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = state.start_session(run)
    state.preregister_object_tree(get_object_tree(reply), session)
    assert state.store_message_res(reply) is not None
    name, parts = taken.metadata.message_id, get_all_nested_objects(reply)
    first = next(iter(parts))
    assert state.store_object(run, session, first, parts[first].deflate())
    assert registrar.reply_states([name]) == {"complete": [], "uploading": [name], "large": {}, "lost": []}
    return name, run, node


@pytest.mark.slow
def test_a_half_sent_reply_is_lost_when_its_node_restarts(tmp_path: Path, empty: Path) -> None:
    key = new_key()
    registrar = make_registrar(tmp_path, {"a": public_text(key)}, empty)
    registrar.sync_nodes()
    name, run, node = half_sent(registrar, key)
    registrar.take_over(public_key_to_bytes(key.public_key()))
    assert registrar.reply_states([name]) == {
        "complete": [],
        "uploading": [],
        "large": {},
        "lost": [name],
    }  # not only after the 180 s that Flower keeps half a reply
    (reply,) = registrar._state.get_message_res({name}, run)
    assert reply.has_error() and reply.metadata.reply_to_message_id == name


def test_half_a_reply_of_a_node_with_an_expired_lease_is_not_awaited(tmp_path: Path, empty: Path) -> None:
    key = new_key()
    registrar = make_registrar(tmp_path, {"a": public_text(key)}, empty)
    registrar.sync_nodes()
    name, run, node = half_sent(registrar, key)
    with registrar._state.session() as session:  # type: ignore[attr-defined]
        session.execute(text("UPDATE node SET online_until = 1.0"))  # long ago
    assert registrar.reply_states([name]) == {"complete": [], "uploading": [], "large": {}, "lost": [name]}
    (reply,) = registrar._state.get_message_res({name}, run)
    assert reply.has_error() and "Unavailable" in str(reply.error.reason)


class InProcess:
    """A SuperLink without its process, with the interface that a Grid uses."""

    failure = None

    def __init__(self, registrar: Registrar, port: int) -> None:
        self.registrar, self.private_address = registrar, f"127.0.0.1:{port}"

    def ask(self, patience_s: float, **request: Any) -> dict[str, Any]:
        return _answer(self.registrar, request)


@pytest.fixture
def near(tmp_path: Path, empty: Path) -> Iterator[InProcess]:
    """Flower's application behind fedtune's public port, and the private application, on one port of this process."""
    registrar = make_registrar(tmp_path, None, empty)
    app, port = registrar.app, PublicPort(registrar.app, max_body=2 * 10**7, keys=None, redeliver_lost=registrar.redeliver_lost)  # type: ignore

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (app if scope["path"].startswith("/v1/runtime/") else port)(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(both, lifespan="off", log_config=None))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield InProcess(registrar, sock.getsockname()[1])
        server.should_exit = True
        thread.join(10)


def test_a_message_gets_its_reply(near: InProcess) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="near"), patience_s=20)
    with Echo(int(near.private_address.partition(":")[2])) as node:
        assert list(grid.get_node_ids()) == [node.node.node_id]
        sent = large(1)
        reply = round_trip(grid, sent, node.node.node_id)
    np.testing.assert_array_equal(reply.content.array_records["a"]["w"].numpy(), sent.array_records["a"]["w"].numpy())
    grid.close()


CHUNK = 5 * 1024 * 1024
ZEROS = RecordDict({"a": ArrayRecord({"w": Array(np.zeros(4 * CHUNK // 8))})})  # three chunks are equal


@pytest.mark.parametrize(
    ("content", "most"),
    [pytest.param(large(3), 2_000_000, id="large", marks=pytest.mark.slow), pytest.param(ZEROS, 3 * CHUNK, id="a chunk four times")],
)
def test_a_reply_over_the_requested_size_is_refused_before_it_is_fetched(
    near: InProcess, monkeypatch: pytest.MonkeyPatch, content: RecordDict, most: int
) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="large"), patience_s=20)
    fetched: list[Any] = []
    monkeypatch.setattr(HttpGrid, "pull_messages", lambda self, ids, pull=HttpGrid.pull_messages: fetched.append(ids) or pull(self, ids))
    with Echo(int(near.private_address.partition(":")[2])) as node:
        where = node.node.node_id
        ids = grid.push_bounded([Message(content, where, "train"), Message(small(1), where, "train")], [most, 2_000_000])
        replies: list[Message] = []
        until = time.monotonic() + 20
        while len(replies) < 2 and time.monotonic() < until:
            had = {reply.metadata.reply_to_message_id for reply in replies}
            replies += [reply for i in ids if i not in had for reply in grid.pull_messages([i])]
            time.sleep(0.05)
    refused, good = sorted(replies, key=lambda reply: ids.index(reply.metadata.reply_to_message_id))
    assert f"MB exceeds the limit of {most / 1e6:.3g} MB" in str(refused.content.config_records["declined"]["why"])
    assert good.content.config_records["c"]["value"] == 1
    assert [ids[0]] not in fetched
    assert near.registrar._state.object_store.get(ids[0]) in (None, b"")  # type: ignore[attr-defined]
    grid.close()


def test_a_reply_that_cannot_be_assembled_is_an_error_of_its_client(near: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="odd"), patience_s=20)

    def broken(*_: Any) -> Any:
        raise KeyError("arraychunk_ids")

    with Echo(int(near.private_address.partition(":")[2])) as node:
        monkeypatch.setattr(HttpGrid, "pull_messages", broken)
        reply = round_trip(grid, small(1), node.node.node_id)
    assert "its reply cannot be read (KeyError('arraychunk_ids'))" in str(reply.content.config_records["declined"]["why"])
    grid.close()


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "answered"), quick([(1, [7]), (2, [])], (1, [7])))
def test_a_message_lost_on_delivery_is_delivered_again(
    near: InProcess, running: Start, monkeypatch: pytest.MonkeyPatch, lost: int, answered: list[int]
) -> None:
    seen, pull, losses = list[int](), Fleet.pull, iter(range(lost))

    def lose_message(self: Fleet) -> Any:
        if (pulled := pull(self)) is not None and next(losses, None) is not None:
            raise Unreachable("the answer was lost")
        return pulled

    def answer(message: Message, node: int) -> Message:
        seen.append(int(str(message.content.config_records["c"]["value"])))
        return Message(message.content, reply_to=message)

    monkeypatch.setattr(Fleet, "pull", lose_message)
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="lossy"), patience_s=20)
    reply = round_trip(grid, small(7), running(near.private_address, answer).id, patience_s=15)
    assert seen == answered and reply.has_error() is not bool(answered)  # a second loss is reported at once, not at the end of the round
    grid.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", quick(["in the message", "in the reply"], "in the reply"))
def test_a_message_dropped_by_its_node_is_not_awaited(near: InProcess, running: Start, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def broken(*_: Any) -> Any:
        raise Refused("it cannot be sent") if fault == "in the reply" else ValueError("it cannot be read")

    monkeypatch.setattr(Fleet, "push_object", broken) if fault == "in the reply" else monkeypatch.setattr(node, "unpack", broken)
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="odd"), patience_s=20)
    client = running(near.private_address)
    reply = round_trip(grid, small(7), client.id, patience_s=15)
    assert reply.has_error() and client.heard("dropped")
    grid.close()


def test_a_busy_node_loses_no_message_whatever_it_calls(tmp_path: Path, empty: Path) -> None:
    """Only a poll for the next message shows that a node is idle; answered and waiting messages stay."""
    key = new_key()
    registrar = make_registrar(tmp_path, {"a": public_text(key)}, empty)
    registrar.sync_nodes()
    name, run, place = half_sent(registrar, key)
    waiting = Message(small(3), place, "train")
    waiting.metadata.__dict__["_message_id"] = waiting.object_id
    registrar._state.store_message_ins(waiting)
    registrar.redeliver_lost(public_key_to_bytes(new_key().public_key()))  # a poll of another node
    assert registrar._state.get_message_ids_from_run_id(run) == {name, waiting.object_id}
    registrar.redeliver_lost(public_key_to_bytes(key.public_key()))  # its poll shows that nobody sends the rest of the reply
    assert registrar._state.get_message_ids_from_run_id(run) == {waiting.object_id}


def test_a_full_disk_while_running_gives_one_sentence(near: InProcess) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="full"), patience_s=0.5)
    node = Echo(int(near.private_address.partition(":")[2])).activate()

    def full(connection: Any, _: Any, __: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite keeps its pages and cannot add more

    event.listen(near.registrar._state._engine, "checkout", full)  # type: ignore[attr-defined]
    with pytest.raises(NetworkError, match="^cannot send messages: .*check its disk space$"):
        for value in range(50):
            grid.push_messages([Message(large(0.5 + value / 100), node, "train")])
    grid.close()
