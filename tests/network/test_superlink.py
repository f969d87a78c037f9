"""The SuperLink child process on the loopback interface: it serves, refuses, dies and restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Message
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedtune.errors import LinkLost, NetworkError
from fedtune.network import grid as grids
from fedtune.network import superlink
from fedtune.network.link import LinkSettings, SuperLink
from fedtune.network.superlink import _listen
from tests.network.echo import Echo, certificates, client, large, new_key, private_text, public_text, round_trip, small
from tests.network.waiting import wait_until


def settings(at: Path, /, **changes: object) -> LinkSettings:
    plain = {"folder": at / "superlink", "host": "127.0.0.1", "port": 0, "certificates": None, "insecure": True}
    return LinkSettings(**(plain | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    link = SuperLink(settings(tmp_path_factory.mktemp("open")))
    link.start()
    yield link
    link.stop()


# -- quick: no process ------------------------------------------------------------------------------------------------------------------


def test_a_port_that_becomes_free_soon_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with monkeypatch.context() as patch, pytest.raises(NetworkError, match="the port is in use"):
            patch.setattr(superlink, "PORT_WAIT_S", 0.0)
            _listen("127.0.0.1", port)
        ends = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: listener.close())  # as when the server's previous process ends
        monkeypatch.setattr(superlink, "time", ends)
        _listen("127.0.0.1", port).close()


def test_without_certificates_insecure_is_required(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="no certificates"):
        SuperLink(settings(tmp_path, insecure=False))


# -- one process for all ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_messages_pass_in_both_directions(link: SuperLink) -> None:
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
def test_half_a_reply_waits_for_the_rest(link: SuperLink) -> None:
    grid = link.open_run("half")
    go = threading.Event()
    with Echo(link.port, halt=lambda: bool(go.wait(20))) as node:
        names = list(grid.push_messages([Message(small(5), node.node.node_id, "train")]))
        until = time.monotonic() + 20
        while link.ask(5, do="arrived", ids=names) != {"complete": [], "uploading": names, "large": {}, "lost": []}:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(grids._LOST_AFTER_S + 0.1)
        assert list(grid.pull_messages(names)) == []  # Flower's own Grid would now wait for its tensors, up to three minutes
        go.set()
        while not (replies := list(grid.pull_messages(names))):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert replies[0].content.config_records["c"]["value"] == 5


@pytest.mark.slow
def test_a_grid_reports_the_end_of_its_run(link: SuperLink) -> None:
    grid = link.open_run("one")
    link.ask(5, do="open_run", name="another")  # as a restarted server does
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
    with pytest.raises(NetworkError, match="^cannot write the SuperLink's database in ") as error:
        SuperLink(settings(tmp_path, folder=tmp_path / folder, log=tmp_path / "log.jsonl")).start()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_bad_certificates_give_one_sentence(tmp_path: Path) -> None:
    ca, certificate, _ = certificates(tmp_path)
    other = tmp_path / "other.key"
    other.write_bytes(private_text(new_key()))
    with pytest.raises(NetworkError, match="^cannot use the certificate .*server.pem with its key: .*`fedtune keys`$"):
        SuperLink(settings(tmp_path, insecure=False, certificates=(ca, certificate, other))).start()


# -- keys -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_allowed_keys_are_admitted_and_no_secret_is_written(tmp_path: Path) -> None:
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
            with pytest.raises(httpx.HTTPStatusError, match="401"):  # a key that is not on the list
                Echo(link.port, stranger, ca).activate()
            with pytest.raises(httpx.HTTPStatusError, match="401"):  # another's public key without the private one
                client(link.port, stranger, ca).ActivateNode(
                    ActivateNodeRequest(public_key=public_key_to_bytes(b.public_key()), heartbeat_interval=30)
                )
            assert httpx.post(f"https://127.0.0.1:{link.port}/v1/fleet/pull-messages", verify=str(ca)).status_code == 401  # no key
            with pytest.raises(httpx.TransportError):  # plain HTTP to the TLS port
                httpx.post(f"http://127.0.0.1:{link.port}/v1/fleet/pull-messages")
            with pytest.raises(httpx.HTTPError):  # an allowed key cannot be registered again
                again = Echo(link.port, a, ca)
                again.secured = False
                again.activate()
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
    assert {"no node key", "a node key that is not allowed"} <= whys


# -- crashes ----------------------------------------------------------------------------------------------------------------------------


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
            link.start()  # the supervising thread does this too
            assert link.alive and link._child.process.pid != before and (link.port, link.private_address) == (port, address)
            assert node.node.node_id in set(grid.get_node_ids())  # the same Grid still works
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
    wait_until(lambda: not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0] == "Z", 10)
    _listen("127.0.0.1", port).close()  # its threads may hold the port for a moment after that


@pytest.mark.slow
def test_a_link_that_does_not_return_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = SuperLink(settings(tmp_path))
    link.start()
    try:
        grid = link.open_run("frozen", patience_s=2)
        assert link._child is not None
        monkeypatch.setattr(link, "_process_settings", lambda: 1 / 0)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        os.kill(link._child.process.pid, signal.SIGKILL)
        with pytest.raises(LinkLost, match="did not (answer|come back)"):
            list(grid.get_node_ids())
        with pytest.raises(LinkLost, match="did not (answer|come back)"):
            list(grid.pull_messages(["a" * 64]))
    finally:
        link.stop()
