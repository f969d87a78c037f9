"""`fedtune serve` as a process: output, stopping, refused arguments."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fedtune.cli.main import main
from fedtune.errors import ConfigError, NetworkError
from fedtune.inference.engine.load import Engine
from fedtune.inference.serve.listener import is_loopback, listen, public_warning, url
from fedtune.inference.serve.server import Server
from fedtune.inference.serve.start import make_caches, parse_adapters
from tests.inference.serve.servers import tiny_model
from tests.inference.serve.soak import ROOT, faults, package, server, soak


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_completes_running_answers_and_the_process_exits_with_0(tmp_path: Path, stop: signal.Signals) -> None:
    model = tiny_model(tmp_path / "tiny", context=4096)
    with server(model, "--max-tokens", "4000", "--grace", "300") as (address, process):
        ask = {"model": "tiny", "prompt": "turn on", "temperature": 0, "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(stop)
            end = time.monotonic() + 30
            while httpx.get(f"{address}/health").status_code != 503:
                assert time.monotonic() < end
            assert httpx.post(f"{address}/v1/completions", json=ask).status_code == 503
            rest = [line[6:] for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0
        assert process.stdout is not None and process.stdout.read() == "stopped\n"


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny", context=4096)
    with server(model, "--max-tokens", "4000", "--grace", "60") as (address, process):
        ask = {"model": "tiny", "prompt": "turn on", "temperature": 0, "max_tokens": 4000}
        got: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: got.append(httpx.post(f"{address}/v1/completions", json=ask, timeout=60)))
        thread.start()
        while httpx.get(f"{address}/health").json()["running"] == 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        thread.join(20)
        assert got[0].status_code == 503


@pytest.mark.slow
@pytest.mark.parametrize(("make", "kind", "threads"), [(tiny_model, "fp32", 1), (tiny_model, "int8", 1), (package, "int4", 2)])
def test_a_soak(tmp_path: Path, make: Callable[[Path], Path], kind: str, threads: int) -> None:
    """Five minutes: `python -m tests.inference.serve.soak --seconds 300 --clients 32 --package --threads 2`."""
    tally = soak(make(tmp_path / "tiny"), seconds=20, clients=32, kind=kind, threads=threads)
    assert not faults(tally, 20, threads)
    assert kind == "int8" or not tally.deviations
    assert tally.whole > 10
    assert tally.left > 0
    assert tally.preempted > 0


def test_a_model_that_cannot_be_served_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert main(["serve", str(tmp_path), "--port", "99999"]) == 2
    assert main(["serve", str(tmp_path), "--kv-budget", "many"]) == 2
    assert main(["serve", str(tmp_path), "--api-key-file", str(tmp_path / "none")]) == 2
    assert main(["serve", str(tmp_path), "--adapters", "a"]) == 2
    assert main(["serve", str(tmp_path), "--timeout", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for line, what in zip(
        lines, ["config.json", "port=99999", "'many'", "cannot read the API keys", "NAME=FOLDER", "timeout=0.0"], strict=True
    ):
        assert line.startswith("fedtune: ") and what in line


def test_an_unusable_chat_template_is_reported_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "serve_on", lambda *_: None)
    model = tiny_model(tmp_path / "tiny")
    (model / "chat_template.jinja").write_text("{% for m in messages %}")
    capsys.readouterr()
    assert main(["serve", str(model), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedtune: ") and "tiny: the model's chat template failed: Unexpected end of template" in line


def test_an_occupied_port_is_named() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(NetworkError, match="cannot listen on 127.0.0.1:"):
        listen("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(NetworkError, match="cannot listen on no.such.host.invalid:0"):
        listen("no.such.host.invalid", 0)


def test_a_public_address_gives_a_warning() -> None:
    with listen("127.0.0.1", 0) as home:
        assert is_loopback(home)
        assert public_warning(home, keyed=False) == ""
    with listen("0.0.0.0", 0) as world:
        assert not is_loopback(world)
        assert "answers ANYBODY, because no API key is set (--api-key-file or FEDTUNE_API_KEY)" in public_warning(world, keyed=False)
        assert "anybody with an API key" in public_warning(world, keyed=True)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_has_brackets_in_its_url() -> None:
    with listen("::1", 0) as home:
        assert is_loopback(home)
        assert url(home).startswith("http://[::1]:")


def test_names_of_adapters_are_parsed() -> None:
    assert parse_adapters(["a=x", "b-1.c=y=z"]) == {"a": Path("x"), "b-1.c": Path("y=z")}
    for wrong in (["a"], ["=x"], ["a="], ["a b=x"], ["/a=x"], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--adapters"):
            parse_adapters(wrong)


def test_a_budget_bounds_keys_and_values(engine: Engine) -> None:
    # by hand: 2 layers x 2 heads x 6 channels, keys and values, float32: 192 bytes a token, 3072 a block of 16
    caches = make_caches(engine, 31 * 3072, 4)
    assert (caches.pool.blocks, caches.limit) == (30, 480)  # one block stays empty
    assert caches.pool.nbytes <= 31 * 3072
    roomy = make_caches(engine, None, 4)
    assert (roomy.pool.blocks, roomy.limit) == (4 * 32, 512)  # as many blocks as four requests of 512 tokens can fill
    with pytest.raises(ConfigError, match="too small for this model: give at least 9.3kB"):
        make_caches(engine, 3 * 3072 - 1, 4)


@pytest.mark.slow
def test_serving_needs_no_transformers() -> None:
    code = (
        "import sys; import fedtune.inference.serve.start as s; "
        "print(sorted({'transformers', 'peft', 'flwr', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
