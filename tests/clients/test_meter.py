"""Peak memory as the system reports it."""

from pathlib import Path

import pytest
import torch

from fedtune.clients import meter

CPU = torch.device("cpu")


def test_the_peak_is_the_systems_high_water_mark_in_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:  9000 kB\nVmHWM:   4000 kB\nVmRSS:   3000 kB\n")
    monkeypatch.setattr(meter, "_STATUS", status)
    assert meter.peak_mb(CPU) == pytest.approx(4.096)  # the system counts kB of 1024 bytes, and a MB here is 10⁶
    status.write_text("VmRSS: 3000 kB\n")
    assert meter.peak_mb(CPU) == 0.0
    status.unlink()
    assert meter.peak_mb(CPU) == 0.0


def test_the_high_water_mark_is_reset_before_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_RESET", tmp_path / "clear_refs")
    meter.reset_peak(CPU)
    assert (tmp_path / "clear_refs").read_text() == "5"  # proc(5): writing 5 resets VmHWM to the resident size
    monkeypatch.setattr(meter, "_RESET", tmp_path / "none" / "clear_refs")
    meter.reset_peak(CPU)  # not Linux: nothing to reset, and no error


def test_on_a_gpu_torch_reports_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, devices = torch.device("cuda"), list[torch.device]()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", devices.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000)
    meter.reset_peak(cuda)
    assert devices == [cuda] and meter.peak_mb(cuda) == 5.0
