"""Which version a device serves if versions are broken or removed, or processes die; the child processes load no model."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.delivery import served, serving
from fedtune.delivery.serving import DeviceServer
from fedtune.delivery.versions import Versions
from fedtune.errors import ConfigError, NetworkError
from tests.delivery.test_versions import install

CHILD = """
import http.server, json, os, signal, socket, sys, threading, time
fd, folder, name = sys.argv[1:]
try:
    act = json.load(open(f"{folder}/config.json"))
except OSError as bad:
    sys.exit(print(bad) or 2)
if act.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
if "say" in act:
    sys.exit(print(act["say"]) or act["code"])
time.sleep(act.get("sleep", 0))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{name} {os.getpid()}".encode())
    def log_message(self, *words): pass
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for the answers
server = Server(("", 0), Answer, bind_and_activate=False)
server.socket = socket.socket(fileno=int(fd))
threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
print("ready", json.dumps({"description": "a test"}), flush=True)
sys.stdin.read(1)
server.shutdown()
server.server_close()
os._exit(0)
"""


def add(state: Path, name: str, at: float, **act: Any) -> None:
    install(state, name, installed=at)
    (state / "models" / "versions" / name / "model" / "config.json").write_text(json.dumps(act))


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


class Device:
    """A device server with its state folder, and the sentences that it has reported."""

    def __init__(self, state: Path) -> None:
        self.state, self.reports = state, list[str]()
        self.versions = Versions(state)
        self.server = DeviceServer(state, "127.0.0.1", 0, self.reports.append)

    def ask(self) -> str:
        """The version that answers, or the refusal."""
        answer = httpx.get(self.server.url, timeout=10)
        return answer.text.split()[0] if answer.status_code == 200 else f"{answer.status_code} {answer.json()['error']['message']}"

    def pid(self) -> int:
        while (answer := httpx.get(self.server.url, timeout=10)).status_code == 503:  # from the process that waits for the first model
            time.sleep(0.01)
        return int(answer.text.split()[1])

    def serves(self, name: str) -> None:
        """Wait until this version answers, and the parent knows it."""
        wait_for(lambda: self.ask() == name and any(f"the model {name} answers at" in line for line in self.reports))

    def wait_for_reports(self, *lines: str) -> None:
        """Wait until these sentences are reported (besides the address of a version that answers), then clear the list."""
        wait_for(lambda: len([line for line in self.reports if " answers at http" not in line]) >= len(lines))
        assert [line for line in self.reports if " answers at http" not in line] == list(lines)
        self.reports.clear()


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(served, "SERVER", (sys.executable, "-I", "-S", "-c", CHILD))
    monkeypatch.setattr(serving, "POLL_S", 0.02)
    monkeypatch.setattr(serving, "FIRST_PAUSE_S", 0.05)
    device = Device(tmp_path)
    device.server.start()
    yield device
    device.server.stop(0)
    assert threading.active_count() < 50 and "error in fedtune" not in " ".join(device.reports)


def test_without_a_model_every_request_is_refused(device: Device) -> None:
    for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions"), ("GET", "/")):
        answer = httpx.request(method, device.server.url + path, content=b"x" * 100000 if method == "POST" else None, timeout=10)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and answer.headers["connection"] == "close"
        error = {"message": "no model has been delivered to this device yet: retry later", "type": "server_error", "param": None}
        assert answer.json() == {"error": error | {"code": "no_model"}}
    with socket.create_connection(("127.0.0.1", httpx.URL(device.server.url).port or 0), timeout=10) as raw:
        raw.sendall(b"garbage\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", httpx.URL(device.server.url).port or 0), timeout=10) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n" + bytes(8000000))
        assert raw.recv(100).startswith(b"HTTP/1.1 503")  # not a broken connection
    assert device.reports == []


def test_the_current_version_answers(device: Device) -> None:
    add(device.state, "a", 1)
    device.versions.activate("a")
    device.serves("a")
    add(device.state, "b", 2)
    assert device.ask() == "a"
    first = device.pid()
    device.versions.activate("b")
    device.serves("b")
    wait_for(lambda: not Path(f"/proc/{first}").exists())
    assert device.versions.rollback() == "a"
    device.reports.clear()
    device.serves("a")
    assert device.reports == [f"the model a answers at {device.server.url} (a test)"]


def test_a_version_that_cannot_be_loaded_is_not_current(device: Device) -> None:
    add(device.state, "a", 1)
    add(device.state, "b", 2, say="the weights are damaged", code=2)
    device.versions.activate("a")
    device.serves("a")
    first = device.pid()
    for _ in range(2):  # each time it becomes current
        device.versions.activate("b")
        device.wait_for_reports("the model b cannot be loaded: the weights are damaged", "the model a is current again")
        assert device.versions.current() == "a" and device.pid() == first


def test_a_version_that_becomes_current_again_at_once_is_tried_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    add(device.state, "a", 1)
    add(device.state, "b", 2, say="the weights are damaged", code=2)
    device.versions.activate("a")
    device.serves("a")
    device.reports.clear()

    def report(line: str) -> None:
        device.reports.append(line)
        if line == "the model a is current again" and device.reports.count(line) == 1:
            device.versions.activate("b")  # before the server looks again

    monkeypatch.setattr(device.server, "_report", report)
    device.versions.activate("b")
    device.wait_for_reports(*["the model b cannot be loaded: the weights are damaged", "the model a is current again"] * 2)
    assert device.versions.current() == "a"


def test_the_newest_older_version_that_can_be_loaded_answers(device: Device) -> None:
    for at, name in enumerate("abcde"):
        add(device.state, name, at, **({"say": f"bad {name}", "code": 2} if name in "bd" else {}))
    device.versions.remove("c")
    add(device.state, "c", 2, kill=True)
    device.versions.activate("d")
    device.serves("a")
    killed = "the process of the model c was killed by signal 9, perhaps out of memory, while it loaded the model: starting another one in"
    device.wait_for_reports(
        "the model d cannot be loaded: bad d", f"{killed} 0.05 s", f"{killed} 0.1 s",
        "the model c cannot be loaded: its process was killed by signal 9, perhaps out of memory, 3 times",
        "the model b cannot be loaded: bad b", "the model a is current again",
    )  # fmt: skip
    assert device.versions.current() == "a"  # e is newer than d, but was never current


def test_if_no_version_can_be_loaded_the_current_one_stays(device: Device) -> None:
    add(device.state, "a", 1, say="bad a", code=1)
    add(device.state, "b", 2, say="bad b", code=2)
    device.versions.activate("b")
    device.wait_for_reports("the model b cannot be loaded: bad b", "the model a cannot be loaded: bad a")
    time.sleep(0.3)
    assert device.versions.current() == "b" and device.reports == []
    assert device.ask() == "503 the model a cannot be loaded: retry later"
    add(device.state, "c", 3)
    device.versions.activate("c")
    device.serves("c")


def test_a_model_without_text_gives_a_one_sentence_report(device: Device) -> None:
    add(device.state, "a", 1)
    add(device.state, "b", 2, say="b is a classifier", code=3)
    device.versions.activate("b")
    device.wait_for_reports("the model b is not served: b is a classifier")
    time.sleep(0.3)
    assert device.versions.current() == "b" and device.reports == []
    assert device.ask() == "503 the model b generates no text: retry later"


@pytest.mark.slow
def test_a_child_that_dies_is_replaced(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LONGEST_PAUSE_S", 0.1)
    add(device.state, "a", 1, sleep=0.1)
    device.versions.activate("a")
    device.serves("a")
    for pause in (0.05, 0.1, 0.1):
        device.reports.clear()
        dead = device.pid()
        os.kill(dead, signal.SIGKILL)
        why = "the process of the model a was killed by signal 9, perhaps out of memory, while it served the model"
        wait_for(lambda: device.reports)
        assert device.ask() == "503 the model is being loaded: retry later"
        device.serves("a")
        device.wait_for_reports(f"{why}: starting another one in {pause:g} s")
        assert device.pid() != dead
    monkeypatch.setattr(serving, "STEADY_S", 0.0)
    os.kill(device.pid(), signal.SIGTERM)
    device.wait_for_reports("the process of the model a was killed by signal 15 while it served the model: starting another one in 0.05 s")


def test_a_model_that_kills_its_process_is_tried_again_if_there_is_no_other(device: Device) -> None:
    add(device.state, "a", 1, kill=True)
    device.versions.activate("a")
    wait_for(lambda: len(device.reports) == 4)
    assert all("while it loaded the model: starting another one in" in line for line in device.reports)
    (device.versions.model("a") / "config.json").write_text("{}")
    device.serves("a")


def test_a_loading_version_stops_when_another_becomes_current(device: Device) -> None:
    add(device.state, "a", 1, sleep=60)
    add(device.state, "b", 2)
    device.versions.activate("a")
    wait_for(lambda: device.server._loading)
    slow = device.server._loading
    device.versions.activate("b")
    device.serves("b")
    assert slow is not None and slow.name == "a" and slow in device.server._leaving


def test_the_model_stops_if_no_version_is_current(device: Device) -> None:
    add(device.state, "a", 1)
    device.versions.activate("a")
    device.serves("a")
    first = device.pid()
    assert device.versions.clear() == ["a"]
    wait_for(lambda: device.ask() == "503 no model has been delivered to this device yet: retry later")
    wait_for(lambda: not Path(f"/proc/{first}").exists())


def test_an_invalid_link_is_reported_and_the_model_keeps_running(device: Device) -> None:
    add(device.state, "a", 1)
    device.versions.activate("a")
    device.serves("a")
    device.reports.clear()
    link = device.versions.folder / "current"
    link.unlink()
    link.symlink_to("elsewhere")
    device.wait_for_reports(f"{link} points to 'elsewhere', which is no version: remove this link")
    os.kill(device.pid(), signal.SIGKILL)
    device.serves("a")
    shutil.rmtree(device.versions.model("a").parent)
    device.reports.clear()
    os.kill(device.pid(), signal.SIGKILL)
    wait_for(lambda: len(device.reports) == 2)
    assert device.reports[1].startswith("the model a cannot be loaded: there is no version a in ")


@pytest.fixture
def still(device: Device) -> Iterator[Device]:
    """A device whose server takes a step only when the test calls for one."""
    device.server.stop(0)
    still = Device(device.state)
    yield still
    still.server._end()


def test_a_model_that_already_answers_serves_before_the_next_is_loaded(still: Device) -> None:
    """A child may answer requests before the server looks; another version has then become current."""
    server = still.server
    for at, name in enumerate("ab"):
        add(still.state, name, at)
    still.versions.activate("a")
    server._step()
    first = server._loading
    wait_for(lambda: first and first.ready)
    still.versions.activate("b")
    server._step()
    assert server._serving is first and not server._leaving
    server._step()
    assert server._loading is not None and server._loading.name == "b"


def test_a_new_process_waits_for_its_pause(still: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "FIRST_PAUSE_S", 60.0)
    server = still.server
    add(still.state, "a", 1)
    still.versions.activate("a")
    server._step()
    first = server._loading
    wait_for(lambda: first and first.ready)
    assert first is not None
    first._process.send_signal(signal.SIGTERM)  # after it was ready, and before the server has seen that
    wait_for(lambda: first.exit_code is not None)
    for _ in range(3):
        server._step()
        assert server._loading is None
    assert still.reports == ["the process of the model a was killed by signal 15 while it loaded the model: starting another one in 60 s"]
    server._not_before = 0
    server._step()
    assert server._loading is not None


def test_the_socket_opens_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = list[str]()
    one = DeviceServer(tmp_path, "0.0.0.0", 0, reports.append)
    (warning,) = reports
    assert warning.startswith(f"WARNING: {one.url} can be reached from other machines")
    assert "ANYBODY, because no API key is set (variable FEDTUNE_API_KEY)" in warning
    port = int(one.url.rpartition(":")[2])
    with pytest.raises(NetworkError, match=rf"^cannot listen on 0.0.0.0:{port}: Address already in use.*; give another --serve$"):
        DeviceServer(tmp_path, "0.0.0.0", port, reports.append)
    one.stop()  # before its start
    monkeypatch.setenv("FEDTUNE_API_KEY", "a b")
    with pytest.raises(ConfigError, match="the variable FEDTUNE_API_KEY must hold API keys"):
        DeviceServer(tmp_path, "127.0.0.1", port, reports.append)
    monkeypatch.setenv("FEDTUNE_API_KEY", "secret")
    DeviceServer(tmp_path, "0.0.0.0", port, reports.append).stop()
    assert "anybody with an API key" in reports[1]
