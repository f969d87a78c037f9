"""Peak memory of one turn: the process's high-water mark, reset before the turn; on CUDA, torch's peak statistics."""

import contextlib
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Start a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not writable: the mark then covers the whole process lifetime
            _RESET.write_text("5")


def peak_mb(device: torch.device) -> float:
    """High-water mark in MB (10^6 bytes) since the last reset; 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
