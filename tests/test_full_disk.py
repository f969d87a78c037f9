"""A disk that becomes full at any file operation of a run: one sentence; with free space, the run resumes and finishes."""

import dataclasses
import errno
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fedtune.config import Config, EvalConfig
from fedtune.config.stored import read_config
from fedtune.errors import CheckpointError, FedtuneError, disk_error
from fedtune.experiment import simulate
from tests.test_starts import DISK, Killed
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b cannot be written (No space left on device)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file cannot be written (Disk quota exceeded)"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "a file cannot be written (No space left on device)",
        ),
        (OSError(errno.ENOENT, "No such file or directory", "/a"), None),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), None),
        (ValueError("28"), None),
    ],
)
def test_a_disk_error_of_any_library_is_recognized(bad: Exception, message: str | None) -> None:
    assert disk_error(bad) == message


def points(config: Config, folder: Path) -> Iterator[tuple[int, Config]]:
    """Numbers of operations, with growing distance to bound the test, each with a separate run to stop there."""
    for step in count():
        operations = step if step < 6 else 6 + (step - 6) * 5
        yield operations, dataclasses.replace(config, output_dir=str(folder / str(operations)))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [OSError, Killed], ids=["disk full", "killed"])
def test_a_full_disk_gives_a_one_sentence_error_and_the_run_resumes(
    tmp_path: Path, stop: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, rounds=2, eval=EvalConfig(where="server", clients=2))
    expected = (simulate(config) / "adapter" / "fedtune.safetensors").read_bytes()
    stopped = 0
    for operations, mine in points(config, tmp_path / "runs"):
        folder = Path(mine.output_dir)
        folder.mkdir(parents=True)
        if not DISK.stops(lambda _: simulate(mine), folder, operations, stop):  # noqa: B023  called here
            break
        stopped += 1
        try:
            (path,) = (folder / mine.name).iterdir()
            path = simulate(dataclasses.replace(read_config(path), resume=str(path)))
        except (FileNotFoundError, ValueError, CheckpointError):  # nothing, or no config yet: the run had not started, so it starts again
            path = simulate(mine)
        assert (path / "adapter" / "fedtune.safetensors").read_bytes() == expected, operations
    assert stopped >= 10
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("program", ["simulate", "main", "server", "client"])
def test_a_command_reports_a_full_disk(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module = importlib.import_module(f"fedtune.cli.{program}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    if program == "main":
        monkeypatch.setattr(module, "_parser", lambda: type("P", (), {"parse_args": lambda *_: type("A", (), {"command": full})}))
    else:
        monkeypatch.setattr(module, "_main", full)
    argv = {"simulate": [], "main": [], "server": ["conf=base", "--insecure"], "client": ["--server", "127.0.0.1:1", "--insecure"]}[program]
    assert module.main(argv) == 2
    stderr = capsys.readouterr().err.strip()
    assert stderr.endswith("/x cannot be written (No space left on device): free disk space and start again") and "\n" not in stderr


def test_a_fedtune_error_is_not_hidden() -> None:
    assert disk_error(FedtuneError("No space left on device")) is None
