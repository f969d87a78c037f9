"""The benchmark of servers, with fedtune's server on both sides."""

import asyncio
import sys
from pathlib import Path

import pytest

from fedtune.simulations.benchmarks.delivery import free_port
from fedtune.simulations.benchmarks.inference.models import build, package
from fedtune.simulations.benchmarks.inference.servers import command, server, speed
from fedtune.simulations.benchmarks.inference.speculation import peer_rows


def test_llama_cpps_server_has_the_same_places_and_threads() -> None:
    words = command("llama.cpp", Path("m.gguf"), 8, 100, 81, 2, "llama-server")
    assert words[:5] == ["llama-server", "-m", "m.gguf", "--port", "81"]
    assert dict(zip(words[5::2], words[6::2], strict=True)) == {"-np": "8", "-c": "800", "-t": "2", "-tb": "2", "-lm": "none"}


def test_rows_of_llama_cpps_speculation_take_both_runs_together() -> None:
    runs = [{"plain": [1.0, 2.0, 3.0]}, {"plain": [5.0, 4.0]}]
    assert peer_rows("int4", runs) == ["| Q4_0, plain | 3.0 (2.0–4.0) |"]
    assert peer_rows("int4", []) == []


@pytest.mark.slow
def test_streams_are_answered_whole(tmp_path: Path) -> None:
    port = free_port()
    words = command("fedtune", package(build("tiny", tmp_path), "int4"), 3, 40, port, 1, "")
    assert words[0] == sys.executable
    with server(words, port, 1, tmp_path / "log") as url:
        assert asyncio.run(speed(url, 3, 2, 8, 5)) > 0


def test_a_server_that_ends_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start: see .*log"), server(["false"], 1, 1, tmp_path / "log"):
        pass
