"""The run directory: exclusive, atomic, and never silently another run's."""

import json
from pathlib import Path

import pytest
import torch

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import CheckpointError, ConfigError, RunError
from fedtune.runs.directory import Checkpoint, RunDirectory, read_config
from tests.fakes import lora_state


def checkpoint(round: int) -> Checkpoint:
    state = ServerState(adapter=lora_state(fill=float(round), version=round), memory={"momentum": torch.full((2, 3), float(round))})
    return Checkpoint(round=round, state=state, clients={"a": {"counted": round, "dropped": 0, "last": None}})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(Config(output_dir=str(tmp_path), keep_checkpoints=2))


def test_a_checkpoint_round_trips(run: RunDirectory) -> None:
    assert run.newest() == (None, [])
    for r in range(4):
        run.save(checkpoint(r))
    newest, skipped = run.newest()
    assert newest is not None and skipped == [] and newest.round == 3 and newest.clients["a"]["counted"] == 3
    assert torch.equal(newest.state.memory["momentum"], torch.full((2, 3), 3.0)) and newest.state.adapter.spec.version == 3
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["round-0002", "round-0003"]


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    paths = {RunDirectory.create(Config(output_dir=str(tmp_path))).path for _ in range(5)}
    assert len(paths) == 5


def test_a_run_in_use_is_not_opened_twice(run: RunDirectory) -> None:
    for rounds in (None, 99):
        with pytest.raises(RunError, match="in use by another process"):
            RunDirectory.open(run.path, rounds=rounds)
    assert read_config(run.path) == run.config  # the second process has changed nothing
    run.close()
    assert RunDirectory.open(run.path).config == run.config


def test_only_rounds_change_on_resume(run: RunDirectory) -> None:
    run.close()
    assert RunDirectory.open(run.path, rounds=99).config.rounds == 99 and read_config(run.path).rounds == 99


def test_fewer_rounds_than_done_are_refused_and_change_nothing(run: RunDirectory) -> None:
    run.save(checkpoint(3))
    run.close()
    with pytest.raises(ConfigError, match="rounds=2 is less than the 3 rounds that .* has done: leave it out or raise it"):
        RunDirectory.open(run.path, rounds=2)
    assert read_config(run.path).rounds == run.config.rounds
    RunDirectory.open(run.path, rounds=3).close()


@pytest.mark.parametrize("victim", ["adapter.safetensors", "memory.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_skipped_and_reported(run: RunDirectory, victim: str, harm: str) -> None:
    for r in (1, 2):
        run.save(checkpoint(r))
    path = run.path / "checkpoints" / "round-0002" / victim
    data = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    newest, skipped = run.newest()
    assert newest is not None and newest.round == 1
    assert len(skipped) == 1 and "round-0002" in skipped[0] and "damaged" in skipped[0]
    run.save(checkpoint(2))  # the repeated round replaces the damaged checkpoint
    assert run.newest()[0].round == 2  # type: ignore[union-attr]


def test_a_partly_written_checkpoint_is_ignored(run: RunDirectory) -> None:
    run.save(checkpoint(1))
    beside = run.path / "checkpoints" / ".round-0002.tmp"
    beside.mkdir()
    (beside / "adapter.safetensors").write_bytes(b"half")
    assert run.newest()[0].round == 1  # type: ignore[union-attr]
    run.save(checkpoint(2))
    assert run.newest()[0].round == 2  # type: ignore[union-attr]


def test_a_checkpoint_of_another_format_is_refused(run: RunDirectory) -> None:
    run.save(checkpoint(1))
    path = run.path / "checkpoints" / "round-0001" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    assert "format 99, but this version reads 2" in run.newest()[1][0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not a run directory: it has no config.yaml"),
        ("a: [", "cannot read"),
        ("surprise: 1", "unknown config key surprise"),
        ("rounds: -1", "rounds=-1 is out of range"),
        ("[]", "config must be a mapping"),
    ],
)
def test_an_unusable_config_gives_a_one_sentence_error(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        RunDirectory.open(tmp_path)


def test_a_missing_run_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run directory"):
        RunDirectory.open(tmp_path / "nothing")


def test_an_unwritable_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot create the run directory"):
        RunDirectory.create(Config(output_dir=str(tmp_path / "file")))
