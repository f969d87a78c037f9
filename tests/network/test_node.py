"""A node against Flower's own SuperLink on the loopback: it serves, and comes back after everything that may happen to it."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.errors import NetworkError
from fedtune.network import fleet, node
from fedtune.network.node import Node
from tests.network.echo import certificates, new_key, private_text
from tests.network.loopback import Certificates, Link, Server, free_port
from tests.network.waiting import wait_until

LARGE = 20 * 2**20  # bytes


NUMBERS = itertools.count()


def content(size: int = 12) -> RecordDict:
    """An array of `size` bytes, and a number of its own: Flower's server keeps equal parts only once."""
    array = Array(np.arange(size // 4, dtype=np.float32))
    return RecordDict({"c": ConfigRecord({"number": next(NUMBERS)}), "a": ArrayRecord({"w": array})})


def echo(message: Message, node_id: int) -> Message:
    return Message(message.content, reply_to=message)


class Running:
    """A node in a thread, and what it said."""

    def __init__(self, server: str, answer: Callable[[Message, int], Message] = echo, **more: object) -> None:
        self.said: list[str] = []
        self.failure: NetworkError | None = None
        usual = {"root_certificates": None, "key": None, "insecure": True, "max_retries": None}
        self.node = Node(server=server, answer=answer, told=self.said.append, **(usual | more))  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.node.serve()
        except NetworkError as bad:
            self.failure = bad

    def stop(self) -> None:
        self.node.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def id(self) -> int:
        wait_until(lambda: self.connections() > 0)
        return self.node._fleet.node_id

    def connections(self) -> int:
        return sum("connected to" in sentence for sentence in self.said)

    def heard(self, part: str) -> bool:
        return any(part in sentence for sentence in self.said)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run_id(server: Server) -> int:
    return server.open_run()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*args: object, **more: object) -> Running:
        started.append(Running(*args, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    link = Link(server.port)
    yield link
    link.close()


Start = Callable[..., Running]


# -- service -----------------------------------------------------------------------------------------------------------------------------


def test_a_message_is_answered(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address, lambda m, n: Message(RecordDict({"c": ConfigRecord({"node": str(n)})}), reply_to=m))
    sent = server.send(run_id, client.id, content())
    reply = server.reply(run_id, sent)
    assert reply.content.config_records["c"]["node"] == str(client.id)
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id, reply.metadata.run_id) == (sent, client.id, run_id)


def test_what_comes_back_is_what_was_sent(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    reply = server.reply(run_id, server.send(run_id, client.id, content(44)))
    assert np.array_equal(reply.content.array_records["a"]["w"].numpy(), np.arange(11, dtype=np.float32))


def test_messages_are_answered_one_after_the_other_in_order(server: Server, run_id: int, running: Start) -> None:
    order, at_once = [], []
    client = running(server.address, lambda m, n: (at_once.append(1), order.append(m.content["c"]["i"]), at_once.pop(), echo(m, n))[-1])
    ids = [server.send(run_id, client.id, RecordDict({"c": ConfigRecord({"i": i})})) for i in range(5)]
    for i in ids:
        server.reply(run_id, i)
    assert order == [0, 1, 2, 3, 4] and not at_once


def test_parts_that_come_late_are_waited_for(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    sent = server.send(run_id, client.id, content(), late=2)
    time.sleep(0.2)
    for part in server.late:
        server.state.store_object(*part)
    assert server.reply(run_id, sent).has_content()


def test_an_answer_that_raises_is_an_error_reply(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address, lambda m, n: 1 / 0)  # type: ignore[arg-type,return-value]
    for _ in range(2):  # and the next message is answered, too
        reply = server.reply(run_id, server.send(run_id, client.id, content()))
        assert reply.error.reason == "ZeroDivisionError: division by zero"


def test_another_app_is_refused_by_name(server: Server, running: Start) -> None:
    asked: list[Message] = []
    client = running(server.address, lambda m, n: (asked.append(m), echo(m, n))[1])
    other = server.open_run("evil/app")
    reply = server.reply(other, server.send(other, client.id, content()))
    assert reply.error.reason == "this client runs fedtune/fedtune only, not 'evil/app'"
    assert not asked and client.heard("refused a train message of group '3': its run is of the app 'evil/app'")


def test_the_bundle_is_never_fetched(server: Server, run_id: int, running: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[str] = []
    send = httpx.Client.send

    def watched(self: httpx.Client, request: httpx.Request, **more: object) -> httpx.Response:
        paths.append(request.url.path)
        return send(self, request, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "send", watched)
    client = running(server.address)
    server.reply(run_id, server.send(run_id, client.id, content()))
    assert "/v1/fleet/get-run" in paths and not any("fab" in path for path in paths)


def test_the_reply_of_a_run_that_is_over_is_dropped_quietly(server: Server, run_id: int, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(server.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    server.send(run_id, client.id, content())
    assert begun.wait(10)
    server.end_run(run_id)
    go.set()
    later = server.open_run()
    assert server.reply(later, server.send(later, client.id, content())).has_content()
    assert len(client.said) == 1, client.said  # "connected"


def test_a_reply_that_nobody_waits_for_is_dropped_with_a_line(server: Server, run_id: int, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(server.address, lambda m, n: (begun.set(), go.wait(10), echo(m, n))[-1])
    sent = server.send(run_id, client.id, content())
    assert begun.wait(10)
    server.state.delete_messages({sent})
    go.set()
    wait_until(lambda: client.heard("dropped the reply to a train message of group '3': the server no longer waits for it"))
    assert server.reply(run_id, server.send(run_id, client.id, content())).has_content()


def test_a_message_that_cannot_be_read_is_dropped_and_the_next_is_answered(
    server: Server, run_id: int, running: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running(server.address)
    with monkeypatch.context() as patch:
        patch.setattr(fleet.Fleet, "pull_object", lambda *_: b"\x00random")
        server.send(run_id, client.id, content())
        wait_until(lambda: client.heard("dropped a train message of group '3'"))
    assert server.reply(run_id, server.send(run_id, client.id, content())).has_content()


@pytest.mark.slow
def test_twenty_megabytes_go_both_ways(server: Server, run_id: int, running: Start) -> None:
    client = running(server.address)
    reply = server.reply(run_id, server.send(run_id, client.id, content(LARGE)), 120)
    assert np.array_equal(reply.content.array_records["a"]["w"].numpy(), np.arange(LARGE // 4, dtype=np.float32))


def test_an_idle_node_looks_less_often(monkeypatch: pytest.MonkeyPatch, server: Server, running: Start) -> None:
    monkeypatch.setattr(node, "QUIET", 0.0)
    monkeypatch.setattr(node, "SLOW_POLL", 0.3)
    waits: list[float] = []
    wait = Node._wait
    monkeypatch.setattr(Node, "_wait", lambda self, seconds: (waits.append(seconds), wait(self, 0.01))[1])
    client = running(server.address)
    assert client.id and wait_until(lambda: len(waits) > 3) is None
    assert set(waits[1:]) == {0.3}


# -- identity ----------------------------------------------------------------------------------------------------------------------------


def test_a_self_made_key_is_kept_and_keeps_the_node_id(server: Server, running: Start, tmp_path: Path) -> None:
    key = tmp_path / "state" / "key"
    first = running(server.address, key=key)
    known = first.id
    first.stop()
    assert key.stat().st_mode & 0o777 == 0o600
    assert known not in server.online()  # it gave its place back
    assert running(server.address, key=key).id == known
    assert running(server.address).id != known  # a key of its own


def test_keys_and_addresses_that_cannot_work_are_refused_in_a_sentence(tmp_path: Path) -> None:
    def make(**more: object) -> None:
        usual = {"server": "127.0.0.1:1", "root_certificates": None, "key": None, "insecure": True, "max_retries": None}
        Node(answer=echo, told=print, **(usual | more))  # type: ignore[arg-type]

    (tmp_path / "bad").write_text("no key")
    for address in ("here", "here:0", "here:70000", "http://here:1", "a b:1", "here:1/x"):
        with pytest.raises(NetworkError, match=f"address is '{address}', wanted HOST:PORT"):
            make(server=address)
    with pytest.raises(NetworkError, match="give --key FILE"):
        make(insecure=False)
    with pytest.raises(NetworkError, match="the key .*/none cannot be read: No such file"):
        make(insecure=False, key=tmp_path / "none")
    with pytest.raises(NetworkError, match="the key .*/bad cannot be used"):
        make(key=tmp_path / "bad")
    (tmp_path / "good").write_bytes(private_text(new_key()))
    for file in ("none", "bad"):
        with pytest.raises(NetworkError, match=f"the CA file .*/{file} cannot be used"):
            make(insecure=False, key=tmp_path / "good", root_certificates=tmp_path / file)


# -- TLS ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def safe_server(papers: Certificates) -> Iterator[Server]:
    server = Server(certificates=papers)
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


def test_a_node_with_an_allowed_key_serves_over_tls(safe_server: Server, papers: Certificates, running: Start, tmp_path: Path) -> None:
    key = allowed_key(safe_server, tmp_path / "key")
    client = running(safe_server.address, insecure=False, root_certificates=papers[0], key=key)
    run = safe_server.open_run()
    assert safe_server.reply(run, safe_server.send(run, client.id, content())).has_content()


def test_a_wrong_ca_is_named_once_and_tried_again(safe_server: Server, running: Start, tmp_path: Path) -> None:
    other, *_ = certificates(tmp_path)
    key = allowed_key(safe_server, tmp_path / "node.key")
    client = running(safe_server.address, insecure=False, root_certificates=other, key=key)
    wait_until(lambda: client.heard(f"does not fit the CA file {other}"))
    time.sleep(0.7)
    assert client.thread.is_alive() and len(client.said) == 1, client.said


def test_a_key_that_is_not_allowed_is_said_and_tried_again(
    safe_server: Server, papers: Certificates, running: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEASE", 20.5)
    key = allowed_key(None, tmp_path / "key")
    client = running(safe_server.address, insecure=False, root_certificates=papers[0], key=key)
    wait_until(lambda: client.heard(f"its former life has the place for up to 20 s more, or its key {key} is not allowed there"))
    monkeypatch.setattr(fleet, "LEASE", 0.0)  # as if that were over
    wait_until(lambda: client.heard(f"{safe_server.address} does not accept the key {key}: it is not among the allowed keys there"))
    assert client.thread.is_alive()
    assert not any(line.startswith("-----") or key.read_text()[40:60] in line for line in client.said)  # the key is never said


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_one(
    safe_server: Server, server: Server, papers: Certificates, running: Start, tmp_path: Path
) -> None:
    plain = running(safe_server.address)
    wait_until(lambda: plain.heard("(does it want TLS?)"))
    key = allowed_key(None, tmp_path / "key")
    tls = running(server.address, insecure=False, root_certificates=papers[0], key=key)
    wait_until(lambda: tls.heard("does not speak TLS"))


# -- what may happen to the link ---------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_waited_for_or_given_up_after_max_retries(running: Start) -> None:
    address = f"127.0.0.1:{free_port()}"
    patient, hasty = running(address), running(address, max_retries=0)
    wait_until(lambda: hasty.failure)
    assert str(hasty.failure).startswith(f"cannot reach {address}: ") and str(hasty.failure).endswith("gave up after 0 retries")
    wait_until(lambda: patient.said)
    assert patient.thread.is_alive() and patient.said[0].endswith("; trying again")


def test_retries_are_counted(running: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "FIRST_PAUSE", 0.01)
    calls: list[int] = []
    monkeypatch.setattr(fleet.Fleet, "join", lambda self: (calls.append(1), (_ for _ in ()).throw(fleet.Unreachable("down")))[1])
    client = running("127.0.0.1:1", max_retries=3)
    wait_until(lambda: client.failure)
    assert len(calls) == 4 and client.said == ["down; trying again"]  # the first time and three more


def test_a_host_name_that_does_not_exist_is_said(running: Start) -> None:
    client = running("no-such-host.invalid:8080")
    wait_until(lambda: client.heard("cannot reach no-such-host.invalid:8080"))
    assert client.thread.is_alive()


def test_a_loss_of_a_second_loses_nothing(server: Server, run_id: int, link: Link, running: Start) -> None:
    client = running(link.address)
    known = client.id
    link.hold()
    sent = server.send(run_id, known, content())
    time.sleep(1)
    link.mend()
    assert server.reply(run_id, sent).has_content() and client.said == [f"connected to {link.address} as node {known}"]


def test_a_reply_made_while_the_link_was_down_is_sent_when_it_is_back(server: Server, run_id: int, link: Link, running: Start) -> None:
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
def test_an_upload_that_is_cut_in_the_middle_is_finished(server: Server, run_id: int, link: Link, running: Start) -> None:
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
@pytest.mark.parametrize("kind", ["hold", "cut"])
def test_a_loss_of_thirty_seconds_is_outlasted(server: Server, run_id: int, link: Link, running: Start, kind: str) -> None:
    client = running(link.address)
    known = client.id
    getattr(link, kind)()
    time.sleep(30)
    assert known in server.online()  # within the lease
    sent = server.send(run_id, known, content())
    link.mend()
    assert server.reply(run_id, sent, 40).has_content() and client.connections() == 1


def test_a_server_restarted_with_its_database_is_found_again(own_server: Server, running: Start) -> None:
    client = running(own_server.address)
    known, run = client.id, own_server.open_run()
    own_server.stop()
    wait_until(lambda: client.heard("trying again"))
    own_server.start()
    assert own_server.reply(run, own_server.send(run, known, content())).has_content()
    assert client.connections() == 1 and client.heard("answers again")


def test_a_server_restarted_empty_gets_the_node_anew(own_server: Server, running: Start) -> None:
    client = running(own_server.address)
    before = client.id
    own_server.stop()
    own_server.empty()
    own_server.start()
    wait_until(lambda: client.connections() == 2)
    run = own_server.open_run()
    assert client.id != before and own_server.reply(run, own_server.send(run, client.id, content())).has_content()


def test_a_reply_of_the_servers_former_life_is_dropped_with_a_line(own_server: Server, running: Start) -> None:
    begun, go = threading.Event(), threading.Event()
    client = running(own_server.address, lambda m, n: (begun.set(), go.wait(20), echo(m, n))[-1])
    run = own_server.open_run()
    own_server.send(run, client.id, content())
    assert begun.wait(10)
    own_server.stop()
    own_server.empty()
    own_server.start()
    go.set()
    wait_until(lambda: client.heard("dropped the reply to a train message of group '3': the server is another one than when it came"))
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
    wait_until(lambda: client.connections() == 2)  # the answer is still being made
    assert own_server.online() == [client.id]
    go.set()


def test_a_clock_that_is_off_is_named(running: Start, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(401, headers={"date": "Sat, 21 Nov 2026 04:00:00 GMT"}, request=httpx.Request("POST", "http://x"))
    at = 1795233600.0  # the same in seconds
    assert fleet._ahead(response, lambda: at + 400) == 400
    found = {}
    for ahead in (0, 400, -400):
        monkeypatch.setattr(fleet, "_ahead", lambda _, ahead=ahead: float(ahead))
        found[ahead] = str(running("127.0.0.1:1", max_retries=0).node._fleet._status(response))
    assert "400 s ahead of that of" in found[400] and "400 s behind that of" in found[-400]
    assert "does not know the key" in found[0]


@pytest.mark.slow
def test_a_node_that_was_killed_waits_for_its_own_lease_and_comes_back_under_its_id(
    server: Server, run_id: int, running: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import sys
from pathlib import Path
from fedtune.network import fleet
from fedtune.network.node import Node
fleet.LEASE = 20.0  # the shortest that Flower allows
Node(server=sys.argv[1], key=Path(sys.argv[2]), root_certificates=None, insecure=True, max_retries=None, told=print,
     answer=lambda m, n: None).serve()
"""
    key = tmp_path / "key"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-u", "-c", program, server.address, str(key)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout and "connected to" in first.stdout.readline()
    (known,) = server.online()
    first.kill()
    first.wait()
    monkeypatch.setattr(fleet, "LEASE", 20.0)
    client = running(server.address, key=key, max_retries=1)  # waiting for a lease is no failure
    wait_until(lambda: client.heard("its former life has the place for up to 20 s more"))
    wait_until(lambda: client.connections() == 1, 40)
    assert client.id == known and server.reply(run_id, server.send(run_id, known, content())).has_content()


def test_stop_ends_a_node_that_waits_for_a_server_that_does_not_answer(running: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = running(f"127.0.0.1:{silent.getsockname()[1]}")
        time.sleep(0.1)
    client.stop()
