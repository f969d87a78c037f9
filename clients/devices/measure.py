"""The profile of the machine that this runs on."""

import os
import time
from pathlib import Path

import torch

from fedtune.config import DeviceClass

_ROOT = Path("/")
_SIZE, _SECONDS = 512, 0.2


def measure_device(root: Path = _ROOT) -> DeviceClass:
    """Memory that is free, cores that this process may use, an accelerator if there is one, and how fast it multiplies.

    Takes half a second. The speed is that of products alone: what training sustains is less, which the first turn's correction learns.

    Args:
        root: Where `proc` and `sys` lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return DeviceClass(memory_mb=free / 1e6, cores=cores, accelerator="cuda", accelerator_gflops=_gflops(torch.device("cuda")))
    used = min(cores, torch.get_num_threads())
    return DeviceClass(memory_mb=free_bytes(root) / 1e6, cores=cores, gflops_per_core=_gflops(torch.device("cpu")) / used)


def free_bytes(root: Path = _ROOT) -> int:
    """What the system says is available, or what the control group leaves, if that is less."""
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
        pass  # no Linux: half of what is built in
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _gflops(device: torch.device) -> float:
    """10⁹ operations a second of float32 products, over a fifth of a second."""
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
