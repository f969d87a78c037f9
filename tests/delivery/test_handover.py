"""A device's real server: nothing is lost when the model changes, a process dies, or the device stops."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import save_file

from fedtune.delivery.serving import DeviceServer
from fedtune.delivery.versions import Versions
from fedtune.export.edge import export_edge
from fedtune.inference.engine.package import read_package
from tests.delivery.test_serving import wait_for
from tests.delivery.test_versions import install
from tests.inference.serve.servers import tiny_model
from tests.models.build import checkpoint

pytestmark = pytest.mark.slow
ASK = {"model": "current", "messages": [{"role": "user", "content": "turn on the light"}], "temperature": 0, "max_tokens": 8}


def add(state: Path, name: str, at: float, model: Path) -> None:
    install(state, name, installed=at)
    folder = state / "models" / "versions" / name / "model"
    shutil.rmtree(folder)
    shutil.copytree(model, folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "tiny", context=4096)
    export_edge(folder / "tiny", folder / "edge", quantize="int8")
    return folder / "edge"


class Device:
    def __init__(self, state: Path) -> None:
        self.state, self.versions, self.reports = state, Versions(state), list[str]()
        self.server = DeviceServer(state, "127.0.0.1", 0, self.reports.append)
        self.url = self.server.url

    def serve(self, name: str) -> None:
        """Make a version current, and wait until its process serves alone."""
        self.versions.activate(name)
        wait_for(lambda: any(f"the model {name} " in line for line in self.reports), 120)
        wait_for(lambda: sum(map(listens, children())) == 1)  # until the old one has stopped accepting, both answer
        assert len(self.reports) == 1 and f"the model {name} answers at {self.url} (" in self.reports[0], self.reports
        self.reports.clear()

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=ASK | more, timeout=60)


@pytest.fixture
def device(tmp_path: Path, model: Path) -> Iterator[Device]:
    """A device with the versions a and b."""
    device = Device(tmp_path)
    for at, name in enumerate("ab"):
        add(tmp_path, name, at, model)
    device.server.start()
    yield device
    device.server.stop(1)
    assert not children()


def children() -> list[psutil.Process]:
    found = list[psutil.Process]()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            found += [process] if "fedtune.inference.serve.handover" in process.cmdline() else []
    return found


def listens(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
    return False


def test_no_request_is_lost_over_three_swaps(device: Device) -> None:
    device.serve("a")
    faults, seen, count = list[str](), set[str](), itertools.count()
    done = threading.Event()

    def client(number: int) -> None:
        """Half of the clients keep their connection, half of the requests stream."""
        keeper = httpx.Client(timeout=60) if number % 2 else None
        while next(count) < 200 or not done.is_set():
            post = keeper or httpx.Client(timeout=60)
            try:
                if next(count) % 2:
                    with post.stream("POST", f"{device.url}/v1/chat/completions", json=ASK | {"stream": True}) as answer:
                        lines = [line for line in answer.iter_lines() if line]
                    assert answer.status_code == 200 and lines[-1] == "data: [DONE]", lines
                    seen.add(json.loads(lines[0].removeprefix("data: "))["model"])
                else:
                    answer = post.post(f"{device.url}/v1/chat/completions", json=ASK)
                    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] is not None, answer.text
                    seen.add(answer.json()["model"])
            except Exception as bad:
                faults.append(repr(bad))
            if post is not keeper:
                post.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for name in "bab":
        device.serve(name)
    done.set()
    for thread in threads:
        thread.join()
    assert faults == [] and seen == {"a", "b"} and next(count) > 400  # two numbers for each request
    wait_for(lambda: len(children()) == 1)


def test_a_stream_continues_while_the_model_changes(device: Device) -> None:
    device.serve("a")
    long = ASK | {"stream": True, "max_tokens": 1000, "temperature": 1, "seed": 1}
    with httpx.stream("POST", f"{device.url}/v1/chat/completions", json=long, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        device.serve("b")
        assert device.ask().json()["model"] == "b"
        (old,) = [p for p in children() if p.cmdline()[-1] == "a"]
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]" and json.loads(rest[-2])["model"] == "a"
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] in ("length", "stop") and len(rest) > 100
    old.wait(30)


def test_an_open_connection_passes_to_the_new_model(device: Device) -> None:
    """The old model answers on a connection that it has accepted and closes it; the next request finds the new one."""
    device.serve("a")
    models, end = list[str](), time.monotonic() + 120
    with httpx.Client(timeout=60) as client:
        device.versions.activate("b")
        while models.count("b") < 5:
            answer = client.post(f"{device.url}/v1/chat/completions", json=ASK)
            assert answer.status_code == 200 and time.monotonic() < end
            models.append(answer.json()["model"])
    assert models[0] == "a" and models == sorted(models)


def test_model_names_in_requests(device: Device) -> None:
    device.serve("a")
    assert [card["id"] for card in httpx.get(f"{device.url}/v1/models").json()["data"]] == ["current", "a"]
    assert device.ask(model="a").json()["model"] == device.ask().json()["model"] == "a"
    refused = device.ask(model="b")
    assert refused.status_code == 404 and "use current, a" in refused.json()["error"]["message"]
    assert httpx.get(device.url, headers={"Host": "evil.example"}).status_code == 403


def test_a_device_server_requires_its_api_key(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_API_KEY", "secret")
    device.serve("a")
    assert device.ask().status_code == 401
    asked = httpx.post(f"{device.url}/v1/chat/completions", json=ASK, headers={"Authorization": "Bearer secret"}, timeout=60)
    assert asked.status_code == 200


def test_a_broken_model_leaves_the_old_one_current(device: Device, model: Path) -> None:
    device.serve("a")
    (process,) = children()
    add(device.state, "c", 3, model)
    card = device.versions.model("c") / "config.json"
    card.write_text("{")
    device.versions.activate("c")
    wait_for(lambda: len(device.reports) == 2)
    assert device.reports[0].startswith(f"the model c cannot be loaded: {card} cannot be read as JSON: ")
    assert device.reports[1] == "the model a is current again" and device.versions.current() == "a"
    assert device.ask().json()["model"] == "a" and children() == [process]


def test_a_classifier_is_not_served(device: Device, tmp_path: Path) -> None:
    card = checkpoint(tmp_path / "classifier", "bert") / "config.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"architectures": ["BertForSequenceClassification"]}))
    add(device.state, "c", 3, tmp_path / "classifier")
    device.versions.activate("c")
    wait_for(lambda: device.reports, 60)
    assert re.fullmatch(r"the model c is not served: .* is a classifier: it outputs labels, not text", device.reports[0]), device.reports[0]
    assert device.ask().status_code == 503 and "generates no text" in device.ask().json()["error"]["message"]
    assert device.versions.current() == "c" and len(device.reports) == 1 and not children()


def test_a_separate_adapter_is_part_of_the_model(device: Device, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    module = "model.layers.1.mlp.down_proj"
    factors = {f"{module}.lora_A": torch.randn(2, 40, generator=generator), f"{module}.lora_B": torch.randn(24, 2, generator=generator)}
    package = export_edge(base, tmp_path / "package")
    (package / "adapters").mkdir()
    about = {"fedtune": json.dumps({"base": read_package(package).card["base"]})}
    save_file({name: 1000 * f for name, f in factors.items()}, package / "adapters" / "apart.safetensors", about)
    add(device.state, "c", 3, base)
    add(device.state, "d", 4, package)
    texts = list[str]()
    for name in "cd":
        device.serve(name)
        texts.append(device.ask().json()["choices"][0]["message"]["content"])
    assert texts[0] != texts[1] == device.ask(model="apart").json()["choices"][0]["message"]["content"]


def test_a_killed_process_is_restarted(device: Device) -> None:
    device.serve("a")
    (process,) = children()
    process.kill()
    wait_for(lambda: device.reports)
    assert device.reports[0].endswith(
        "was killed by signal 9, perhaps out of memory, while it served the model: starting another one in 1 s"
    )
    began = time.monotonic()
    while (answer := device.ask()).status_code != 200:
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_model"
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert answer.json()["model"] == "a" and children() != [process]


def test_a_stop_finishes_running_answers(device: Device) -> None:
    device.serve("a")
    long = ASK | {"stream": True, "max_tokens": 600, "temperature": 1, "seed": 1}
    with httpx.stream("POST", f"{device.url}/v1/chat/completions", json=long, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        stopping = threading.Thread(target=device.server.stop)
        stopping.start()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    stopping.join(30)
    assert not stopping.is_alive() and not children()
    with pytest.raises(httpx.ConnectError):
        device.ask()


CLIENT = """
import sys, time
from pathlib import Path
from fedtune.delivery.serving import DeviceServer
server = DeviceServer(Path(sys.argv[1]), "127.0.0.1", 0, lambda line: print(line, flush=True))
server.start()
time.sleep(600)
"""


@pytest.mark.parametrize("loading", [True, False])
def test_no_child_outlives_its_parent(tmp_path: Path, model: Path, loading: bool) -> None:
    add(tmp_path, "a", 1, model)
    Versions(tmp_path).activate("a")
    process = subprocess.Popen([sys.executable, "-c", CLIENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(process.pid)
    wait_for(watched.children, 60)
    if not loading:
        assert process.stdout is not None and "the model a answers" in process.stdout.readline()
    (child,) = watched.children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(20)
    assert not child.is_running()


@pytest.mark.parametrize("serves", [True, False])
def test_a_child_ends_when_its_input_is_closed(tmp_path: Path, model: Path, serves: bool) -> None:
    """On a system that does not end a child with its parent, the closed pipe does."""
    listener = socket.create_server(("127.0.0.1", 0))
    command = [sys.executable, "-P", "-m", "fedtune.inference.serve.handover", str(listener.fileno()), str(model), "x"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()])
    assert child.stdin is not None and child.stdout is not None
    if serves:
        line = child.stdout.readline()
        assert line.startswith("ready ") and json.loads(line.removeprefix("ready "))["model"] == "x"
    child.stdin.close()
    assert child.wait(20) == (0 if serves else 1)
    listener.close()
