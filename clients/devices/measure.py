"""Measures the profile of this machine."""

import os
import time
from pathlib import Path

import torch

from fedtune.config import DeviceClass

_ROOT = Path("/")
_SIZE, _SECONDS = 512, 0.2


def measure_device(root: Path = _ROOT) -> DeviceClass:
    """Free memory, cores available to this process, the accelerator if there is one, and the speed of matrix products.

    Takes half a second. Training is slower than bare matrix products; the correction learned in the first turn accounts for that.

    Args:
        root: Folder that contains `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return DeviceClass(memory_mb=free / 1e6, cores=cores, accelerator="cuda", accelerator_gflops=_gflops(torch.device("cuda")))
    used = min(cores, torch.get_num_threads())
    return DeviceClass(memory_mb=free_bytes(root) / 1e6, cores=cores, gflops_per_core=_gflops(torch.device("cpu")) / used)


def free_bytes(root: Path = _ROOT) -> int:
    """Available memory: the minimum of the system's and the control group's."""
    found = [_available(root)]
    for limit, usage in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, used = _number(root / limit), _number(root / usage)
        if most is not None and used is not None:
            found.append(max(0, most - used))
    return max(1, min(found))


def _available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: use half of the physical memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _gflops(device: torch.device) -> float:
    """Speed of float32 matrix products in 10⁹ operations per second, measured over 0.2 s."""
    a = torch.ones(_SIZE, _SIZE, device=device)
    done, start = 0, 0.0
    for warm in (True, False):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < (_SECONDS / 4 if warm else _SECONDS):
            torch.mm(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 1
    return done * 2 * _SIZE**3 / (time.perf_counter() - start) / 1e9
