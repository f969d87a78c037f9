"""A node with Flower's own SuperLink on the loopback interface: messages, trust and identity."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.errors import NetworkError
from fedtune.network import fleet, node
from fedtune.network.node import Node
from tests.network.echo import certificates, new_key, private_text
from tests.network.loopback import Certificates, Server
from tests.network.running import LARGE, Start, content, echo
from tests.network.waiting import wait_until

# -- service -----------------------------------------------------------------------------------------------------------------------------


def test_a_message_is_answered(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address, lambda m, n: Message(RecordDict({"c": ConfigRecord({"node": str(n)})}), reply_to=m))
    sent = server.send(run_id, client.id, content())
    reply = server.reply(run_id, sent)
    assert reply.content.config_records["c"]["node"] == str(client.id)
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id, reply.metadata.run_id) == (sent, client.id, run_id)


def test_the_reply_equals_the_message(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    reply = server.reply(run_id, server.send(run_id, client.id, content(44)))
    assert np.array_equal(reply.content.array_records["a"]["w"].numpy(), np.arange(11, dtype=np.float32))


def test_messages_are_answered_in_order(server: Server, run_id: int, running: Start) -> None:
    order, at_once = [], []
    client = running(server.address, lambda m, n: (at_once.append(1), order.append(m.content["c"]["i"]), at_once.pop(), echo(m, n))[-1])
    ids = [server.send(run_id, client.id, RecordDict({"c": ConfigRecord({"i": i})})) for i in range(5)]
    for i in ids:
        server.reply(run_id, i)
    assert order == [0, 1, 2, 3, 4] and not at_once


def test_late_parts_are_awaited(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    sent = server.send(run_id, client.id, content(), late=2)
    time.sleep(0.2)
    for part in server.late:
        server.state.store_object(*part)
    assert server.reply(run_id, sent).has_content()


def test_an_answer_that_raises_is_an_error_reply(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address, lambda m, n: 1 / 0)  # type: ignore[arg-type,return-value]
    for _ in range(2):  # the next message is answered too
        reply = server.reply(run_id, server.send(run_id, client.id, content()))
        assert reply.error.reason == "ZeroDivisionError: division by zero"


def test_another_app_is_refused_by_name(server: Server, running: Start) -> None:
    messages: list[Message] = []
    client = running(server.address, lambda m, n: (messages.append(m), echo(m, n))[1])
    other = server.open_run("evil/app")
    reply = server.reply(other, server.send(other, client.id, content()))
    assert reply.error.reason == "this client runs only fedtune/fedtune, not 'evil/app'"
    assert not messages and client.heard("refused a train message of group '3': its run belongs to the app 'evil/app'")


def test_the_bundle_is_never_fetched(server: Server, run_id: int, running: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    send = httpx.Client.send

    def watch(self: httpx.Client, request: httpx.Request, **more: object) -> httpx.Response:
        paths.append(request.url.path)
        return send(self, request, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "send", watch)
    client = running(server.address)
    server.reply(run_id, server.send(run_id, client.id, content()))
    assert "/v1/fleet/get-run" in paths and not any("fab" in path for path in paths)


def test_the_reply_of_a_finished_run_is_dropped_without_a_log_line(server: Server, run_id: int, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(server.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    server.send(run_id, client.id, content())
    assert begun.wait(10)
    server.end_run(run_id)
    go.set()
    later = server.open_run()
    assert server.reply(later, server.send(later, client.id, content())).has_content()
    assert len(client.reports) == 1, client.reports  # "connected"


def test_a_reply_that_nobody_awaits_is_dropped_with_a_log_line(server: Server, run_id: int, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(server.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    sent = server.send(run_id, client.id, content())
    assert begun.wait(10)
    server.state.delete_messages({sent})
    go.set()
    wait_until(lambda: client.heard("dropped the reply to a train message of group '3': the server no longer waits for it"))
    assert server.reply(run_id, server.send(run_id, client.id, content())).has_content()


def test_an_unreadable_message_is_dropped_and_the_next_is_answered(
    server: Server, run_id: int, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running(server.address)
    with monkeypatch.context() as patch:
        patch.setattr(fleet.Fleet, "pull_object", lambda *_: b"\x00random")
        server.send(run_id, client.id, content())
        wait_until(lambda: client.heard("dropped a train message of group '3'"))
    assert server.reply(run_id, server.send(run_id, client.id, content())).has_content()


@pytest.mark.slow
def test_twenty_megabytes_pass_in_both_directions(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    reply = server.reply(run_id, server.send(run_id, client.id, content(LARGE)), 120)
    assert np.array_equal(reply.content.array_records["a"]["w"].numpy(), np.arange(LARGE // 4, dtype=np.float32))


def test_an_idle_node_polls_less_often(monkeypatch: pytest.MonkeyPatch, server: Server, running: Start) -> None:
    monkeypatch.setattr(node, "QUIET", 0.0)
    monkeypatch.setattr(node, "SLOW_POLL", 0.3)
    waits: list[float] = []
    wait = Node._wait
    monkeypatch.setattr(Node, "_wait", lambda self, seconds: (waits.append(seconds), wait(self, 0.01))[1])
    client = running(server.address)
    assert client.id and wait_until(lambda: len(waits) > 3) is None
    assert set(waits[1:]) == {0.3}


# -- identity ----------------------------------------------------------------------------------------------------------------------------


def test_a_generated_key_is_stored_and_keeps_the_node_id(server: Server, running: Start, tmp_path: Path) -> None:
    key = tmp_path / "state" / "key"
    first = running(server.address, key=key)
    known = first.id
    first.stop()
    assert key.stat().st_mode & 0o777 == 0o600
    assert known not in server.online()  # it has deactivated its node
    assert running(server.address, key=key).id == known
    assert running(server.address).id != known  # with a new key


def test_unusable_keys_and_addresses_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def make(**more: object) -> None:
        usual = {"server": "127.0.0.1:1", "root_certificates": None, "key": None, "insecure": True, "max_retries": None}
        Node(answer=echo, report=print, **(usual | more))  # type: ignore[arg-type]

    (tmp_path / "bad").write_text("no key")
    for address in ("here", "here:0", "here:70000", "http://here:1", "a b:1", "here:1/x"):
        with pytest.raises(NetworkError, match=f"address is '{address}': wanted HOST:PORT"):
            make(server=address)
    with pytest.raises(NetworkError, match="give --key FILE"):
        make(insecure=False)
    with pytest.raises(NetworkError, match="the key .*/none cannot be read: No such file"):
        make(insecure=False, key=tmp_path / "none")
    with pytest.raises(NetworkError, match="the key .*/bad is invalid"):
        make(key=tmp_path / "bad")
    (tmp_path / "good").write_bytes(private_text(new_key()))
    for file in ("none", "bad"):
        with pytest.raises(NetworkError, match=f"the CA file .*/{file} is invalid"):
            make(insecure=False, key=tmp_path / "good", root_certificates=tmp_path / file)


# -- TLS ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls_files"))


@pytest.fixture(scope="module")
def safe_server(tls_files: Certificates) -> Iterator[Server]:
    server = Server(certificates=tls_files)
    server.start()
    yield server
    server.stop()


def allowed_key(server: Server | None, file: Path) -> Path:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = new_key()
    file.write_bytes(private_text(key))
    if server:
        server.allow(public_key_to_bytes(key.public_key()))
    return file


def test_a_node_with_an_allowed_key_serves_over_tls(safe_server: Server, tls_files: Certificates, running: Start, tmp_path: Path) -> None:
    key = allowed_key(safe_server, tmp_path / "key")
    client = running(safe_server.address, insecure=False, root_certificates=tls_files[0], key=key)
    run = safe_server.open_run()
    assert safe_server.reply(run, safe_server.send(run, client.id, content())).has_content()


def test_a_wrong_ca_is_named_once_and_the_node_retries(safe_server: Server, running: Start, tmp_path: Path) -> None:
    other, *_ = certificates(tmp_path)
    key = allowed_key(safe_server, tmp_path / "node.key")
    client = running(safe_server.address, insecure=False, root_certificates=other, key=key)
    wait_until(lambda: client.heard(f"does not match the CA file {other}"))
    time.sleep(0.7)
    assert client.thread.is_alive() and len(client.reports) == 1, client.reports


def test_a_key_that_is_not_allowed_is_reported_and_the_node_retries(
    safe_server: Server, tls_files: Certificates, running: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEASE", 20.5)
    key = allowed_key(None, tmp_path / "key")
    client = running(safe_server.address, insecure=False, root_certificates=tls_files[0], key=key)
    wait_until(lambda: client.heard(f"its previous process holds the lease for up to 20 s more, or its key {key} is not allowed there"))
    monkeypatch.setattr(fleet, "LEASE", 0.0)  # as if the lease had ended
    wait_until(lambda: client.heard(f"{safe_server.address} does not accept the key {key}: it is not among the allowed keys there"))
    assert client.thread.is_alive()
    assert not any(line.startswith("-----") or key.read_text()[40:60] in line for line in client.reports)  # the key is never printed


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_port_are_reported(
    safe_server: Server, server: Server, tls_files: Certificates, running: Start, tmp_path: Path
) -> None:
    plain = running(safe_server.address)
    wait_until(lambda: plain.heard("(does it want TLS?)"))
    key = allowed_key(None, tmp_path / "key")
    tls = running(server.address, insecure=False, root_certificates=tls_files[0], key=key)
    wait_until(lambda: tls.heard("the TLS handshake with"))
