"""The SuperLink child with real processes on the loopback: it serves, refuses, dies and comes back."""

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from flwr.app import Message
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from sqlalchemy import event

from fedtune import flower
from fedtune.errors import LinkLost, NetworkError
from fedtune.network import grid as grids
from fedtune.network.grid import LinkGrid
from fedtune.network.link import LinkSettings, SuperLink
from fedtune.network.linkstate import Registrar, make_fab, read_keys
from fedtune.network.public import PublicPort
from fedtune.network.superlink import Task, _answer, _make_app
from tests.network.echo import Echo, certificates, client, large, new_key, private_text, public_text, round_trip, small


def settings(at: Path, /, **changes: object) -> LinkSettings:
    plain = {"folder": at / "superlink", "host": "127.0.0.1", "port": 0, "certificates": None, "insecure": True}
    return LinkSettings(**(plain | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    link = SuperLink(settings(tmp_path_factory.mktemp("open")))
    link.start()
    yield link
    link.stop()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with all of Flower's tables, which take a second to make."""
    folder = tmp_path_factory.mktemp("empty")
    registrar(folder, None)
    return folder / "superlink.db"


def registrar(folder: Path, allowed: dict[str, str] | None, empty: Path | None = None) -> Registrar:
    if empty is not None:
        shutil.copy(empty, folder)
    keys = None if allowed is None else read_keys(allowed)
    rest: dict[str, Any] = {"host": "", "port": 0, "private_port": 0, "certificate": None, "certificate_key": None}
    task = Task(folder=str(folder), log="", allowed_keys=allowed, max_body=1, parent=0, **rest)
    app = _make_app(task, keys)
    office = Registrar(app.state.linkstate_factory.state(), keys)
    office.app = app  # type: ignore[attr-defined]
    return office


# -- quick: no process ------------------------------------------------------------------------------------------------------------------


def test_the_bundle_is_metadata_only() -> None:
    with zipfile.ZipFile(io.BytesIO(make_fab().content)) as bundle:
        assert sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"]  # no code
        project = bundle.read("pyproject.toml").decode()
    assert 'publisher = "fedtune"' in project and 'name = "fedtune"' in project and "fedtune.app_flower:" in project


def test_an_allowed_key_keeps_its_node_and_a_withdrawn_one_goes(tmp_path: Path, empty: Path) -> None:
    a, b = public_text(new_key()), public_text(new_key())
    first = registrar(tmp_path, {"a": a, "b": b}, empty)
    first.admit()
    ids = {n["name"]: n["node_id"] for n in first.nodes()["nodes"]}
    assert set(ids) == {"a", "b"} and not any(n["online"] or n["last_seen"] for n in first.nodes()["nodes"])
    second = Registrar(first._state, read_keys({"a": a}))
    second.admit()
    assert {n["name"]: n["node_id"] for n in second.nodes()["nodes"]} == {"a": ids["a"]}
    third = Registrar(first._state, read_keys({"a": a, "b": b}))  # taken back: Flower alone would refuse the key for ever
    third.admit()
    assert {n["name"] for n in third.nodes()["nodes"]} == {"a", "b"}


def test_a_key_that_cannot_serve_is_named(tmp_path: Path) -> None:
    text = public_text(new_key())
    for keys, said in (
        ({"a": "ssh-rsa nonsense"}, "key of client 'a' cannot be read"),
        ({"a": text, "b": text}, "'a' and 'b' have the same public key"),
        ({"a": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1v0rJ1W0d4N1m0yqv5c4nq1h2m8m2o3b4k5l6m7n8o"}, "client 'a' is not of a NIST curve"),
    ):
        with pytest.raises(NetworkError, match=said):
            read_keys(keys)


def test_a_new_run_ends_the_older_one(tmp_path: Path, empty: Path) -> None:
    office = registrar(tmp_path, None, empty)
    first, second = office.open_run("one"), office.open_run("two")
    assert first["run_id"] != second["run_id"] and first["token"] != second["token"]
    state = office._state
    status = state.get_run_status({first["run_id"], second["run_id"]})
    assert (status[first["run_id"]].status, status[second["run_id"]].status) == ("finished", "running")
    assert state.get_run_info(run_ids=[second["run_id"]])[0].fab_id == "fedtune/fedtune"


def test_without_certificates_one_must_say_insecure(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="no certificates"):
        SuperLink(settings(tmp_path, insecure=False))


def test_a_new_life_of_a_node_is_let_in_at_once_and_what_the_old_one_took_is_lost(tmp_path: Path, empty: Path) -> None:
    key = new_key()
    office = registrar(tmp_path, {"a": public_text(key)}, empty)
    office.admit()
    state, encoded = office._state, public_key_to_bytes(key.public_key())
    (node,) = (n["node_id"] for n in office.nodes()["nodes"])
    run = office.open_run("x")["run_id"]
    flower.identify_process(run)
    office.takeover(encoded)  # its first life: nothing to take over
    assert state.activate_node(node, 30)
    names = []
    for value in range(2):
        message = Message(small(value), node, "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        names.append(state.store_message_ins(message))
    (taken,) = state.get_message_ins(node_id=node, limit=1)
    assert not state.activate_node(node, 30)  # Flower refuses its second life, for a minute
    office.takeover(encoded)
    assert state.activate_node(node, 30)
    waiting = state.get_message_ids_from_run_id(run)
    assert waiting == set(names) - {taken.metadata.message_id}  # what it had not taken waits for it
    (gone,) = state.get_message_res({taken.metadata.message_id}, run)
    assert gone.has_error() and gone.metadata.reply_to_message_id == taken.metadata.message_id


class InProcess:
    """A SuperLink without its process: what a Grid sees of one."""

    failure = None

    def __init__(self, office: Registrar, port: int) -> None:
        self.office, self.private_address = office, f"127.0.0.1:{port}"

    def ask(self, patience_s: float, **request: Any) -> dict[str, Any]:
        return _answer(self.office, request)


@pytest.fixture
def near(tmp_path: Path, empty: Path) -> Iterator[InProcess]:
    """Flower's application behind our public port, and private with it, on one port of this process."""
    office = registrar(tmp_path, None, empty)
    app, port = office.app, PublicPort(office.app, max_body=10**7, keys=None)  # type: ignore[attr-defined]

    async def both(scope: Any, receive: Any, send: Any) -> None:
        await (app if scope["path"].startswith("/v1/runtime/") else port)(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(both, lifespan="off", log_config=None))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield InProcess(office, sock.getsockname()[1])
        server.should_exit = True
        thread.join(10)


def test_a_message_goes_there_and_back(near: InProcess) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="near"), patience_s=20)
    with Echo(int(near.private_address.partition(":")[2])) as node:
        assert list(grid.get_node_ids()) == [node.node.node_id]
        sent = large(1)
        reply = round_trip(grid, sent, node.node.node_id)
    np.testing.assert_array_equal(reply.content.array_records["a"]["w"].numpy(), sent.array_records["a"]["w"].numpy())
    grid.close()


def test_a_full_disk_while_running_gives_one_sentence(near: InProcess) -> None:
    grid = LinkGrid(near, **near.ask(0, do="open_run", name="full"), patience_s=0.5)
    node = Echo(int(near.private_address.partition(":")[2])).activate()

    def full(connection: Any, _: Any, __: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite keeps what it has, and finds no room for more

    event.listen(near.office._state._engine, "checkout", full)  # type: ignore[attr-defined]
    with pytest.raises(NetworkError, match="^cannot send messages: .*whether its disk is full$"):
        for value in range(50):
            grid.push_messages([Message(large(0.5 + value / 100), node, "train")])
    grid.close()


# -- one process for all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_messages_go_both_ways(link: SuperLink) -> None:
    grid = link.open_run("both ways")
    with Echo(link.port) as node:
        assert node.node.node_id in set(grid.get_node_ids())
        assert node.client.GetRun(GetRunRequest(node=node.node, run_id=grid.run.run_id)).run.fab_id == "fedtune/fedtune"
        for value in range(3):
            reply = round_trip(grid, small(value), node.node.node_id)
            assert reply.content.config_records["c"]["value"] == value
        sent = large(20)
        reply = round_trip(grid, sent, node.node.node_id)
        np.testing.assert_array_equal(reply.content.array_records["a"]["w"].numpy(), sent.array_records["a"]["w"].numpy())
        seen = {n.node_id: n for n in link.nodes()}[node.node.node_id]
        assert seen.online and abs(seen.last_seen - time.time()) < 60 and seen.name == ""


@pytest.mark.slow
def test_half_a_reply_waits_for_its_other_half(link: SuperLink) -> None:
    grid = link.open_run("half")
    go = threading.Event()
    with Echo(link.port, halt=lambda: bool(go.wait(20))) as node:
        names = list(grid.push_messages([Message(small(5), node.node.node_id, "train")]))
        until = time.monotonic() + 20
        while link.ask(5, do="arrived", ids=names) != {"complete": [], "uploading": names}:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(grids._DOUBT_S + 0.1)
        assert list(grid.pull_messages(names)) == []  # Flower's own Grid would now wait for its tensors, up to three minutes
        go.set()
        while not (replies := list(grid.pull_messages(names))):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert replies[0].content.config_records["c"]["value"] == 5


@pytest.mark.slow
def test_a_grid_whose_run_has_ended_says_so(link: SuperLink) -> None:
    grid = link.open_run("one")
    link.ask(5, do="open_run", name="another")  # as another life of the server would
    with pytest.raises(LinkLost, match="Flower has ended the run"):
        list(grid.get_node_ids())


@pytest.mark.slow
def test_a_taken_port_gives_one_sentence(link: SuperLink, tmp_path: Path) -> None:
    with pytest.raises(
        NetworkError, match=rf"^cannot listen on 127.0.0.1:{link.port}: the port is in use; stop the other server or give --address$"
    ):
        SuperLink(settings(tmp_path, port=link.port)).start()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["/proc/superlink", "file/superlink"])
def test_a_disk_that_cannot_be_written_gives_one_sentence(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NetworkError, match="^cannot keep the SuperLink's database in ") as said:
        SuperLink(settings(tmp_path, folder=tmp_path / folder, log=tmp_path / "log.jsonl")).start()
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_bad_certificates_give_one_sentence(tmp_path: Path) -> None:
    ca, certificate, _ = certificates(tmp_path)
    other = tmp_path / "other.key"
    other.write_bytes(private_text(new_key()))
    with pytest.raises(NetworkError, match="^cannot use the certificate .*server.pem with its key: .*`fedtune keys`$"):
        SuperLink(settings(tmp_path, insecure=False, certificates=(ca, certificate, other))).start()


# -- keys -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_allowed_keys_come_in_and_nothing_secret_is_written(tmp_path: Path) -> None:
    files = certificates(tmp_path)
    ca = files[0]
    a, b, stranger = new_key(), new_key(), new_key()
    folder = tmp_path / "superlink"
    link = SuperLink(settings(tmp_path, insecure=False, certificates=files, allowed_keys={"a": public_text(a), "b": public_text(b)}))
    link.start()
    try:
        grid = link.open_run("keys")
        with Echo(link.port, a, ca) as node:
            other = {n.name: n.node_id for n in link.nodes()}["b"]
            assert round_trip(grid, small(1), node.node.node_id).content.config_records["c"]["value"] == 1
            assert [(n.name, n.online) for n in link.nodes()] == [("a", True), ("b", False)]
            with pytest.raises(httpx.HTTPStatusError, match="401"):  # its own key, another's node id
                node.client.PullMessages(PullMessagesRequest(node=Node(node_id=other)))
            with pytest.raises(httpx.HTTPStatusError, match="401"):  # a key that nobody allowed
                Echo(link.port, stranger, ca).activate()
            with pytest.raises(httpx.HTTPStatusError, match="401"):  # another's public key without the private one
                client(link.port, stranger, ca).ActivateNode(
                    ActivateNodeRequest(public_key=public_key_to_bytes(b.public_key()), heartbeat_interval=30)
                )
            assert httpx.post(f"https://127.0.0.1:{link.port}/v1/fleet/pull-messages", verify=str(ca)).status_code == 401  # no key
            with pytest.raises(httpx.TransportError):  # plain HTTP to the TLS port
                httpx.post(f"http://127.0.0.1:{link.port}/v1/fleet/pull-messages")
            with pytest.raises(httpx.HTTPError):  # an allowed key cannot be registered again
                anew = Echo(link.port, a, ca)
                anew.secured = False
                anew.activate()
            assert round_trip(grid, small(2), node.node.node_id).content.config_records["c"]["value"] == 2
        token = grid._token
    finally:
        link.stop()
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file
    logs = (folder / "superlink.jsonl").read_bytes() + (folder / "superlink.err").read_bytes()
    secrets = [token.encode(), *(part for key in (a, b, stranger) for part in private_text(key).splitlines()[1:-1])]
    secrets += files[2].read_bytes().splitlines()[1:-1]
    assert not [s for s in secrets if s in logs]
    lines = [json.loads(line) for line in logs.splitlines()]
    whys = {line["why"] for line in lines if line["event"] == "refused"}
    assert {"no node key", "a node key that is not on the list"} <= whys


# -- deaths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_child_comes_back_with_nodes_and_run(tmp_path: Path) -> None:
    link = SuperLink(settings(tmp_path))
    link.start()
    try:
        grid = link.open_run("killed")
        with Echo(link.port) as node:
            assert round_trip(grid, small(1), node.node.node_id).has_content()
            assert link._child is not None
            before, port, address = link._child.process.pid, link.port, link.private_address
            os.kill(before, signal.SIGKILL)
            link._child.process.wait()
            link.start()  # what the keeper does anyway
            assert link.alive and link._child.process.pid != before and (link.port, link.private_address) == (port, address)
            assert node.node.node_id in set(grid.get_node_ids())  # the same Grid goes on
            assert round_trip(grid, small(2), node.node.node_id).content.config_records["c"]["value"] == 2
            assert node.beat()
    finally:
        link.stop()
    with pytest.raises(LinkLost):
        grid.push_messages([Message(small(3), 1, "train")])


@pytest.mark.slow
def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from fedtune.network.grid import LinkGrid
from fedtune.network.link import LinkSettings, SuperLink
link = SuperLink(LinkSettings(folder=Path({str(tmp_path)!r}), host="127.0.0.1", port=0, certificates=None, insecure=True))
link.start()
print(link._child.process.pid, link.port, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    child, port = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_a_link_that_stays_away_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = SuperLink(settings(tmp_path))
    link.start()
    try:
        grid = link.open_run("frozen", patience_s=2)
        assert link._child is not None
        monkeypatch.setattr(link, "_task", lambda: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        os.kill(link._child.process.pid, signal.SIGKILL)
        with pytest.raises(LinkLost, match="did not (answer|come back)"):
            list(grid.get_node_ids())
        with pytest.raises(LinkLost, match="did not (answer|come back)"):
            list(grid.pull_messages(["a" * 64]))
    finally:
        link.stop()
