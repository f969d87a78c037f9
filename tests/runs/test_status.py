"""`fedtune status` on hand-written run directories."""

import fcntl
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.main import main
from fedtune.errors import CheckpointError
from fedtune.runs.status import FRESH_S, read_status, show

NOW = 1_000_000.0
LINES = [
    {"round": 0, "client": None, "loss": 3.0, "bytes_down": 0},
    {"round": 1, "client": "a", "device_class": "phone", "steps": 2, "bytes_up": 1000, "bytes_down": 2000},
    {"round": 1, "client": "b", "device_class": "laptop", "steps": 2, "bytes_up": 1000, "bytes_down": 2000},
    {"round": 1, "client": None, "loss": 2.0},
    {"round": 2, "client": "a", "device_class": "phone", "steps": 2, "bytes_up": 500, "bytes_down": 2000},
    {"round": 2, "client": "b", "bytes_down": 2000, "dropped": "late: no reply within 9 s"},
    {"round": 2, "client": None, "loss": 1.0},
]
BOOK = {
    "a": {"counted": 2, "dropped": 0, "last": "counted in round 2", "epsilon": 1.25},
    "b": {"counted": 1, "dropped": 1, "last": "late: no reply within 9 s"},
}
SERVER = {
    "started": NOW - 100,
    "address": "0.0.0.0:8080",
    "control": "127.0.0.1:40001",
    "round": 3,
    "rounds": 5,
    "waiting_for": ["b"],
    "nodes": [
        {"client": "a", "node": 11, "device_class": "phone", "online": True, "last_seen": NOW - 1},
        {"client": "b", "node": 12, "device_class": "laptop", "online": False, "last_seen": NOW - 90},
        {"client": "[c]", "node": 13, "device_class": "", "online": True, "last_seen": NOW - 1},
    ],
}


def run_folder(folder: Path, *, server: dict[str, Any] | None = None, done: int = 2) -> Path:
    run = folder / "run"
    for round in range(done + 1):
        checkpoint = run / "checkpoints" / f"round-{round:04d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(json.dumps({"round": round, "clients": BOOK if round else {}}))
    (run / "config.yaml").write_text("rounds: 5\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    if server is not None:
        (run / "server.json").write_text(json.dumps(server))
    return run


def test_a_running_server(tmp_path: Path) -> None:
    status = read_status(run_folder(tmp_path, server={**SERVER, "pid": os.getpid()}))
    assert (status["state"], status["round"], status["kept"], status["rounds"]) == ("running", 3, 2, 5)
    a, b, c = sorted(status["nodes"], key=lambda n: n["client"].strip("[]"))
    assert (a["online"], a["counted"], a["dropped"], a["epsilon"], a["last"]) == (True, 2, {}, 1.25, "counted in round 2")
    assert (b["online"], b["counted"], b["dropped"], b["last"]) == (False, 1, {"late": 1}, "late: no reply within 9 s")
    assert (c["client"], c["counted"], c["bytes_up"]) == ("[c]", 0, 0.0)  # known, but never asked yet
    # by hand: up 1000 + 1000 + 500; down 4 * 2000
    assert status["totals"] == {
        "counted": 3,
        "bytes_up": 2500.0,
        "bytes_down": 8000.0,
        "dropped": {"late": 1},
        "online": 2,
        "epsilon": 1.25,
    }
    shown = show(status, now=NOW, width=160)
    assert "is running at 0.0.0.0:8080: round 3 of 5, waiting for b" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.split()[:1] in (["a"], ["b"], ["[c]"])}
    assert "online" in rows["a"] and "1.5 kB" in rows["a"] and "4.0 kB" in rows["a"] and "1.25" in rows["a"]
    assert "1 min 30 s ago" in rows["b"] and "1 late" in rows["b"] and "no reply within 9 s" in rows["b"]
    assert "online" in rows["[c]"]  # a client's name is text, not markup
    assert "2 of 3 clients; turns: 3 counted, dropped: 1 late; 2.5 kB up, 8.0 kB down; ε up to 1.25" in shown
    wide, narrow = (show(status, now=NOW, width=w).split("\n\n")[1] for w in (160, 80))  # between the headline and the totals
    assert max(map(len, wide.splitlines())) > 80 >= max(map(len, narrow.splitlines())) and set(wide.split()) == set(narrow.split())


def test_the_status_of_a_dead_server_says_how_to_continue(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run = run_folder(tmp_path, server={**SERVER, "pid": process.pid})
    status = read_status(run)
    assert status["state"] == "stopped"
    assert f"is stopped after 2 of 5 rounds: continue with fedtune-server --run {run}" in show(status, now=NOW)


def test_a_reused_process_id_is_not_the_server(tmp_path: Path) -> None:
    run = run_folder(tmp_path, server={**SERVER, "pid": os.getpid()})
    old = (run / "server.json").stat().st_mtime - FRESH_S - 5
    os.utime(run / "server.json", (old, old))
    status = read_status(run)
    assert status["state"] == "silent" and "has not reported for" in show(status)


def test_a_simulated_run(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    assert f"python -m fedtune.sim resume={run}" in show(read_status(run))
    with open(run / ".lock", "w") as lock:  # as RunDirectory locks it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"{run} is running: round 2 of 5" in show(read_status(run))
    (run / "config.yaml").write_text("rounds: 2\n")
    (run / "adapter").mkdir()
    assert "has finished: round 2 of 2" in show(read_status(run))


def test_status_before_the_first_round_and_after_a_damaged_checkpoint(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "round-0002" / "checkpoint.json").write_text("{")
    status = read_status(run)
    assert status["kept"] == 1 and [n["counted"] for n in status["nodes"]] == [0, 0]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("rounds: 5\n")
    assert "no client has connected yet" in show(read_status(empty))


def test_each_error_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path, server=SERVER)
    (run / "server.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"server.json cannot be read"):
        read_status(run)
    for given, why in {
        (str(tmp_path / "none"),): "there is no run",
        ("--control", "10.0.0.1:80"): "is not 127.0.0.1:PORT",
        ("--control", "127.0.0.1:9"): "nothing answers at 127.0.0.1:9",
        (): "give either a run directory or --control",
    }.items():
        assert main(["status", *given]) == 2
        output = capsys.readouterr()
        assert not output.out and why in output.err and output.err.count("\n") == 1


class Answers(http.server.BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/fedtune/status" and self.body else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def control() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_status_is_read_from_a_server_s_private_port(tmp_path: Path, control: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.body = b""
    assert main(["status", "--control", control]) == 2
    assert "answers 404" in capsys.readouterr().err
    Answers.body = b"no"
    assert main(["status", "--control", control]) == 2
    assert "cannot be read" in capsys.readouterr().err
    Answers.body = json.dumps({**SERVER, "pid": os.getpid()}).encode()
    assert main(["status", "--control", control, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [n["client"] for n in status["nodes"]] == ["a", "b", "[c]"] and status["round"] == 3
    assert main(["status", "--control", control]) == 0
    assert "round 3 of 5, waiting for b" in capsys.readouterr().out
    run = run_folder(tmp_path)
    # the run directory is on this machine, so everything is shown
    Answers.body = json.dumps({**SERVER, "pid": os.getpid(), "run": str(run)}).encode()
    assert main(["status", "--control", control]) == 0
    assert "3 counted" in capsys.readouterr().out
