"""Two processes with one key: a restarted client is accepted at once; a second machine is refused by name."""

import httpx

from fedtune.network.incarnations import INCARNATION_HEADER, QUIET_S, Incarnations
from fedtune.network.public import ACTIVATE, DEACTIVATE, PublicPort
from tests.network.echo import new_key, public_key_to_bytes
from tests.network.running import Start
from tests.network.test_public_port import Inside, call, sign_headers

KEY, PULL = b"key", "/v1/fleet/pull-messages"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_client_restarted_after_a_crash_is_admitted_at_once() -> None:
    lives = Incarnations(Clock())
    assert lives.may_call(KEY, "first", activates=True) and lives.may_call(KEY, "first", activates=False)
    for life in ("second", "third"):
        assert lives.may_call(KEY, life, activates=True) and lives.may_call(KEY, life, activates=False)


def test_a_second_machine_is_refused_while_the_first_is_active() -> None:
    clock = Clock()
    lives = Incarnations(clock)
    assert lives.may_call(KEY, "first", activates=True)
    assert lives.may_call(KEY, "second", activates=True)  # the first process may be dead
    clock.now = 10.0
    assert lives.may_call(KEY, "first", activates=False)  # but it is alive
    assert not lives.may_call(KEY, "second", activates=False) and not lives.may_call(KEY, "second", activates=True)
    clock.now += QUIET_S - 0.1
    assert not lives.may_call(KEY, "second", activates=True)
    clock.now += 0.2
    assert lives.may_call(KEY, "second", activates=True) and lives.may_call(KEY, "second", activates=False)
    assert lives.may_call(b"another", "first", activates=False)  # each key has its own holder


def test_a_late_leave_of_the_old_process_changes_nothing() -> None:
    lives = Incarnations(Clock())
    assert lives.may_call(KEY, "first", activates=True) and lives.may_call(KEY, "second", activates=True)
    assert not lives.may_call(KEY, "first", activates=False, leaves=True)
    assert lives.may_call(KEY, "second", activates=False)


def test_after_a_server_restart_the_first_process_to_call_gets_the_place() -> None:
    lives = Incarnations(Clock())
    assert lives.may_call(KEY, "first", activates=False)
    assert not lives.may_call(KEY, "second", activates=False) and lives.may_call(KEY, "first", activates=False)


def test_the_public_port_refuses_the_second_before_it_reads_a_body() -> None:
    inside, key = Inside(), new_key()
    public = public_key_to_bytes(key.public_key())
    came: list[bytes] = []
    port = PublicPort(inside, max_body=1000, keys={public}, take_over=came.append)

    def ask(path: str, life: str) -> int:
        return call(port, path, [b""], headers={**sign_headers(key), INCARNATION_HEADER: life})[0]

    assert [ask(ACTIVATE, "first"), ask(ACTIVATE, "second"), ask(PULL, "first")] == [200, 200, 200]
    assert [ask(PULL, "second"), ask(ACTIVATE, "second"), ask(DEACTIVATE, "second"), ask(PULL, "first")] == [409, 409, 409, 200]
    assert came == [public, public]
    assert call(port, PULL, [b""], headers=sign_headers(key))[0] == 200  # Flower's own SuperNode sends no process id


def test_the_error_of_the_second_machine_says_what_to_do(running: Start) -> None:
    response = httpx.Response(409, request=httpx.Request("POST", "http://x"))
    message = str(running("127.0.0.1:1", max_retries=0).node._fleet._status(response))
    assert message.startswith("another process is connected to 127.0.0.1:1 with the key") and message.endswith("give each its own key")
