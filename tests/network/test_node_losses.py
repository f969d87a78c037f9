"""A node recovers from failures of its link, its server and itself."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from fedtune.network import fleet, node
from tests.network.loopback import Link, Server, free_port
from tests.network.running import LARGE, Start, content, echo
from tests.network.waiting import wait_until


def test_a_missing_server_is_awaited_or_given_up_after_max_retries(running: Start) -> None:
    address = f"127.0.0.1:{free_port()}"
    patient, hasty = running(address), running(address, max_retries=0)
    wait_until(lambda: hasty.failure)
    assert str(hasty.failure).startswith(f"cannot reach {address}: ") and str(hasty.failure).endswith("gave up after 0 retries")
    wait_until(lambda: patient.reports)
    assert patient.thread.is_alive() and patient.reports[0].endswith("; trying again")


def test_retries_are_counted(running: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "FIRST_PAUSE", 0.01)
    calls: list[int] = []
    monkeypatch.setattr(fleet.Fleet, "join", lambda self: (calls.append(1), (_ for _ in ()).throw(fleet.Unreachable("down")))[1])
    client = running("127.0.0.1:1", max_retries=3)
    wait_until(lambda: client.failure)
    assert len(calls) == 4 and client.reports == ["down; trying again"]  # the first attempt and three more


def test_a_nonexistent_host_name_is_reported(running: Start) -> None:
    client = running("no-such-host.invalid:8080")
    wait_until(lambda: client.heard("cannot reach no-such-host.invalid:8080"))
    assert client.thread.is_alive()


@pytest.mark.slow
def test_a_connection_loss_of_a_second_loses_no_message(server: Server, run_id: int, link: Link, running: Start) -> None:
    client = running(link.address)
    known = client.id
    link.hold()
    sent = server.send(run_id, known, content())
    time.sleep(1)
    link.mend()
    assert server.reply(run_id, sent).has_content() and client.reports == [f"connected to {link.address}"]


@pytest.mark.slow
def test_a_reply_computed_while_the_link_is_down_is_sent_afterward(server: Server, run_id: int, link: Link, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(link.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    sent = server.send(run_id, client.id, content())
    assert begun.wait(10)
    link.cut()
    go.set()
    wait_until(lambda: client.heard("trying again"))
    link.mend()
    assert server.reply(run_id, sent).has_content()
    assert client.heard(f"{link.address} answers again") and client.connections() == 1


@pytest.mark.slow
def test_an_interrupted_upload_is_completed(server: Server, run_id: int, link: Link, running: Start) -> None:
    client = running(link.address)
    push, cuts = fleet.Fleet.push_object, []

    def cut_once(self: fleet.Fleet, *args: object) -> None:
        if len(cuts) < 2:
            cuts.append(1)
            link.cut()
            threading.Timer(0.5, link.mend).start()
        push(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet.Fleet, "push_object", cut_once)
        reply = server.reply(run_id, server.send(run_id, client.id, content(LARGE)), 120)
    assert len(cuts) == 2 and reply.content.array_records["a"]["w"].numpy()[-1] == LARGE // 4 - 1


@pytest.mark.slow
def test_a_connection_loss_of_thirty_seconds_is_survived(server: Server, run_id: int, running: Start) -> None:
    """A link that holds all data, and one that is cut; both in parallel, because each takes 30 s."""
    links = {"hold": Link(server.port), "cut": Link(server.port)}
    try:
        clients = {kind: running(link.address) for kind, link in links.items()}
        known = {kind: client.id for kind, client in clients.items()}
        for kind, link in links.items():
            getattr(link, kind)()
        time.sleep(30)
        assert set(known.values()) <= set(server.online())  # within the lease
        sent = {kind: server.send(run_id, node, content()) for kind, node in known.items()}
        for link in links.values():
            link.mend()
        for kind, client in clients.items():
            assert server.reply(run_id, sent[kind], 40).has_content() and client.connections() == 1, kind
    finally:
        for link in links.values():
            link.close()


def test_a_server_restarted_with_its_database_is_found_again(own_server: Server, running: Start) -> None:
    client = running(own_server.address)
    known, run = client.id, own_server.open_run()
    own_server.stop()
    wait_until(lambda: client.heard("trying again"))
    own_server.start()
    assert own_server.reply(run, own_server.send(run, known, content())).has_content()
    assert client.connections() == 1 and client.heard("answers again")


@pytest.mark.slow
def test_a_server_restarted_without_its_database_gets_the_node_again(own_server: Server, running: Start) -> None:
    client = running(own_server.address)
    before = client.id
    own_server.stop()
    own_server.empty()
    own_server.start()
    wait_until(lambda: client.connections() == 2)
    run = own_server.open_run()
    assert client.id != before and own_server.reply(run, own_server.send(run, client.id, content())).has_content()


def test_a_reply_to_the_old_server_is_dropped_with_a_log_line(own_server: Server, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(own_server.address, lambda m, n: (begun.set(), go.wait(20), echo(m, n))[-1])
    run = own_server.open_run()
    own_server.send(run, client.id, content())
    assert begun.wait(10)
    own_server.stop()
    own_server.empty()
    own_server.start()
    go.set()
    wait_until(lambda: client.heard("dropped the reply to a train message of group '3': the server's database is new since the message"))
    run = own_server.open_run()
    assert own_server.reply(run, own_server.send(run, client.id, content())).has_content()


def test_an_expired_lease_is_renewed_while_the_node_is_busy(
    server: Server, run_id: int, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "HEARTBEAT", 0.1)
    begun, go = threading.Event(), threading.Event()
    client = running(server.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    sent = server.send(run_id, client.id, content())
    assert begun.wait(10)
    assert server.state.deactivate_node(client.id)  # what the server does when no heartbeat came
    wait_until(lambda: client.id in server.online())
    go.set()
    assert server.reply(run_id, sent).has_content() and client.connections() == 1


def test_a_server_that_forgot_the_node_gets_it_back_while_it_is_busy(
    own_server: Server, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "HEARTBEAT", 0.1)
    begun, go = threading.Event(), threading.Event()
    client = running(own_server.address, lambda m, n: (begun.set(), go.wait(20), echo(m, n))[-1])
    own_server.send(own_server.open_run(), client.id, content())
    assert begun.wait(10)
    own_server.stop()
    own_server.empty()
    own_server.start()
    wait_until(lambda: client.connections() == 2)  # the answer is still being computed
    assert own_server.online() == [client.id]
    go.set()


def test_a_wrong_clock_is_named(running: Start, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(401, headers={"date": "Sat, 21 Nov 2026 04:00:00 GMT"}, request=httpx.Request("POST", "http://x"))
    at = 1795233600.0  # the same in seconds
    assert fleet._clock_offset(response, lambda: at + 400) == 400
    results = {}
    for ahead in (0, 400, -400):
        monkeypatch.setattr(fleet, "_clock_offset", lambda _, ahead=ahead: float(ahead))
        results[ahead] = str(running("127.0.0.1:1", max_retries=0).node._fleet._status(response))
    assert "400 s ahead of that of" in results[400] and "400 s behind that of" in results[-400]
    assert "does not know the key" in results[0]


@pytest.mark.slow
def test_a_killed_node_waits_for_its_own_lease_and_returns_under_its_id(
    server: Server, run_id: int, running: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import sys
from pathlib import Path
from fedtune.network import fleet
from fedtune.network.node import Node
fleet.LEASE = 20.0  # the shortest that Flower allows
Node(server=sys.argv[1], key=Path(sys.argv[2]), root_certificates=None, insecure=True, max_retries=None, report=print,
     answer=lambda m, n: None).serve()
"""
    key = tmp_path / "key"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-u", "-c", program, server.address, str(key)]
    others = set(server.online())  # nodes of earlier tests, within their lease
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout and "connected to" in first.stdout.readline()
    (known,) = set(server.online()) - others
    first.kill()
    first.wait()
    monkeypatch.setattr(fleet, "LEASE", 20.0)
    client = running(server.address, key=key, max_retries=1)  # waiting for a lease is no failure
    wait_until(lambda: client.heard("its previous process holds the lease for up to 20 s more"))
    wait_until(lambda: client.connections() == 1, 40)
    assert client.id == known and server.reply(run_id, server.send(run_id, known, content())).has_content()


def test_stop_ends_a_node_that_waits_for_a_server_that_does_not_answer(running: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = running(f"127.0.0.1:{silent.getsockname()[1]}")
        time.sleep(0.1)
    client.stop()
