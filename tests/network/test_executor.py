"""The child process of a node: its answers, its crashes, and that no process is left behind."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.network import frames
from fedtune.network.executor import WORKER, Executor
from fedtune.network.frames import LARGEST, FrameError, Kind, read_frame, write_frame
from tests.network.waiting import wait_until

STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
ROOT = Path(__file__).parents[2]


def order(do: str, kind: str = "train", node_id: int = 7, size: int = 3) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 5, 1, 1
    content = RecordDict({"c": ConfigRecord({"do": do}), "a": ArrayRecord({"w": Array(np.arange(size, dtype=np.float32))})})
    message = Message(content, node_id, kind)
    message.metadata.__dict__["_message_id"] = f"{do}-{kind}"
    return message


Make = Callable[..., Executor]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    executors: list[Executor] = []

    def new(command: tuple[str, ...] = STAND_IN, **more: object) -> Executor:
        executors.append(Executor({"folder": str(tmp_path), "name": "straße", **more}, tmp_path / "logs" / "worker.log", command=command))
        return executors[-1]

    yield new
    for each in executors:
        each.stop()


def status_of(reply: Message) -> ConfigRecord:
    assert reply.has_content(), reply.error
    return reply.content.config_records["status"]


def reason(reply: Message) -> str:
    assert reply.has_error()
    return reply.error.reason or ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- a running child ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_warm_child_answers_all_messages_and_its_prints_do_not_interfere(make: Make, tmp_path: Path) -> None:
    child = make()
    assert child.pid is None  # it starts when the first message comes
    replies = [child.answer(order(do, kind), 7) for do, kind in (("a", "query"), ("read", "train"), ("c", "evaluate"))]
    assert [status_of(r)["seen"] for r in replies] == ["a", "a read", "a read c"] and all(status_of(r)["pid"] == child.pid for r in replies)
    assert status_of(replies[0])["ids"] == "5 7 5 7"  # run and node of the message, as context and as the process's identity
    assert status_of(replies[0])["node"] == "{'partition-id': 0, 'num-partitions': 1}"
    assert status_of(replies[0])["settings"] == "straße"
    assert replies[1].metadata.reply_to_message_id == "read-train" and replies[1].metadata.dst_node_id == 1
    assert np.array_equal(replies[2].content.array_records["a"]["w"].numpy(), [0, 1, 2])
    log = (tmp_path / "logs" / "worker.log").read_text()
    assert log.count("a library prints") == log.count("and one writes") == 3
    reply = child.answer(order("raise"), 7)
    assert reason(reply) == "ValueError: it does not fit" and "Traceback" in (tmp_path / "logs" / "worker.log").read_text()
    assert reason(child.answer(order("memory"), 7)) == "MemoryError: out of memory"
    error = reason(child.answer(order("a", node_id=9), 7))
    assert error == "the message is addressed to another node: the server mixes up its clients"
    assert status_of(child.answer(order("still"), 7))["lives"] == 1  # still the first child


@pytest.mark.slow
def test_twenty_megabytes_pass_the_pipes_in_both_directions(make: Make) -> None:
    reply = make().answer(order("a", size=5 * 2**20), 7)
    assert np.array_equal(reply.content.array_records["a"]["w"].numpy(), np.arange(5 * 2**20, dtype=np.float32))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_waits_holds_neither_the_message_nor_its_reply(make: Make) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * 4096

    child = make()
    child.answer(order("a"), 7)
    before = resident()
    assert status_of(child.answer(order("b", size=5_000_000), 7))
    wait_until(lambda: resident() < before + 10e6)  # the arrays alone are 20 MB


# -- a child that crashes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_child_gets_the_last_hello_and_the_message_again(make: Make) -> None:
    child = make()
    assert status_of(child.answer(order("old", "query"), 7))["lives"] == 1
    assert status_of(child.answer(order("hello", "query"), 7))["lives"] == 1
    reply = status_of(child.answer(order("kill-once 9"), 7))
    assert reply["lives"] == 2 and reply["seen"] == "hello kill-once 9"
    assert status_of(child.answer(order("again", "query"), 7))["seen"] == "hello kill-once 9 again"
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)  # between two messages
    assert status_of(child.answer(order("after"), 7))["seen"] == "again after"


@pytest.mark.slow
def test_a_message_that_kills_two_children_is_an_error_with_the_cause_of_death(make: Make) -> None:
    child = make()
    for do, how in (
        ("kill 9", "it was killed by signal 9, perhaps out of memory"),
        ("exit 3", "it ended with exit code 3"),
        ("fork", "it was killed by signal 9, perhaps out of memory"),  # although its own child lives on
    ):
        reply = child.answer(order(do), 7)
        assert reason(reply) == f"the client's worker died 2 times on this message: {how} (its log is worker.log)"
    assert status_of(child.answer(order("later"), 7))["lives"] == 7  # a new child, after 3 × 2 that died


@pytest.mark.slow
def test_a_child_that_cannot_start_reports_why(make: Make) -> None:
    reply = make(broken=True).answer(order("a"), 7)
    assert "died 2 times on this message: ImportError: no module named 'torch'" in reason(reply)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit(4)", "it ended with exit code 4"),
        ("print('Loading the weights ...')", "its answer is not a frame: b'Loading the w' is not the head of a frame"),
        ("import os; os.write(1, b'ft1:')", "ended with exit code 0"),
    ],
)
def test_a_child_that_does_not_write_frames_is_an_error(make: Make, program: str, why: str) -> None:
    command = (sys.executable, "-S", "-E", "-c", program)
    assert why in reason(make(command).answer(order("a"), 7))


def test_a_missing_command_is_an_error(make: Make) -> None:
    assert "cannot be started: [Errno 2]" in reason(make(("/no/such/program",)).answer(order("a"), 7))


@pytest.mark.slow
def test_fedtunes_own_worker_starts_or_reports_why_not(make: Make) -> None:
    """As the product starts it, from any folder; with settings without data it ends with a sentence."""
    reply = make(WORKER).answer(order("a"), 7)
    assert "FrameError" not in reason(reply)


# -- stopping ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stop_ends_a_child_that_hangs_and_its_message_gets_an_error(make: Make) -> None:
    child, replies = make(), []
    thread = threading.Thread(target=lambda: replies.append(child.answer(order("hang"), 7)))
    thread.start()
    wait_until(lambda: _ignores_sigterm(child.pid), 60)
    pid = child.pid
    child.stop()
    assert pid and not alive(pid)
    thread.join(5)
    assert reason(replies[0]) == "the client was stopped"
    assert reason(child.answer(order("a"), 7)) == "the client was stopped" and child.pid is None


@pytest.mark.slow
def test_the_child_dies_with_its_node_even_during_a_turn(tmp_path: Path) -> None:
    program = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from tests.network.test_executor import Executor, Path, STAND_IN, order
child = Executor({{"folder": {str(tmp_path)!r}, "name": "x"}}, Path({str(tmp_path)!r}) / "log", command=STAND_IN)
child.answer(order("a"), 7)
print(child.pid, flush=True)
child.answer(order("hang"), 7)
"""
    node = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert node.stdout
    pid = int(node.stdout.readline())
    wait_until(lambda: _ignores_sigterm(pid))
    assert alive(pid)
    node.kill()
    node.wait()
    wait_until(lambda: not alive(pid))


def _ignores_sigterm(pid: int | None) -> bool:
    """Whether the process ignores SIGTERM, as the worker does while it hangs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    ignored = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(ignored >> (signal.SIGTERM - 1) & 1)


# -- frames ------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=300)), max_size=4))
def test_frames_round_trip(sent: list[tuple[Kind, bytes]]) -> None:
    stream = io.BytesIO()
    for kind, payload in sent:
        write_frame(stream, kind, payload)
    stream.seek(0)
    assert [read_frame(stream) for _ in sent] == sent and read_frame(stream) is None


@given(st.binary(min_size=1, max_size=40))
def test_a_truncated_frame_is_an_error_at_every_length(payload: bytes) -> None:
    stream = io.BytesIO()
    write_frame(stream, Kind.MESSAGE, payload)
    whole = stream.getvalue()
    for cut in range(1, len(whole)):
        with pytest.raises(FrameError, match="cut within a frame"):
            read_frame(io.BytesIO(whole[:cut]))


@settings(max_examples=300)
@given(st.binary(min_size=13, max_size=60))
def test_random_bytes_are_an_error(noise: bytes) -> None:
    with pytest.raises(FrameError, match="is not the head of a frame"):
        read_frame(io.BytesIO(noise))


@given(st.integers(LARGEST + 1, 2**64 - 1))
def test_a_length_over_the_limit_is_refused_before_reading(size: int) -> None:
    stream = io.BytesIO(b"ft1:\x02" + size.to_bytes(8, "big") + b"x")
    with pytest.raises(FrameError, match=f"a frame declares {size} bytes; the limit is {LARGEST}"):
        read_frame(stream)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(FrameError, match="is not the head of a frame"):
        read_frame(io.BytesIO(b"ft1:\x09" + bytes(8)))


def test_a_payload_over_the_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LARGEST", 10)
    stream = io.BytesIO()
    with pytest.raises(FrameError, match="a payload of 11 bytes does not fit in one frame of at most 10"):
        write_frame(stream, Kind.MESSAGE, bytes(11))
    assert stream.getvalue() == b""


@pytest.mark.slow
def test_a_message_too_large_for_a_frame_is_an_error_reply_and_costs_no_child(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make()
    assert status_of(child.answer(order("a"), 7))["lives"] == 1
    monkeypatch.setattr(frames, "LARGEST", 1000)
    assert "too large for the worker" in reason(child.answer(order("a", size=5000), 7))
    monkeypatch.undo()
    assert status_of(child.answer(order("b"), 7))["lives"] == 1


@pytest.mark.slow
def test_the_worker_prints_nothing_if_its_node_is_gone_at_once() -> None:
    process = subprocess.run([*WORKER], stdin=subprocess.DEVNULL, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")


@pytest.mark.slow
def test_no_module_of_this_folder_loads_torch() -> None:
    program = "import sys, fedtune.network.node, fedtune.network.executor, fedtune.network.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
