"""The machine's own profile."""

from pathlib import Path

import torch

from fedtune.clients.devices import measure_device
from fedtune.clients.devices.measure import free_bytes


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_memory_is_the_least_of_what_the_system_and_the_control_group_leave(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_bytes(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "1000000\n")
    assert free_bytes(tmp_path) == 5000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "4000000\n")
    assert free_bytes(tmp_path) == 3_000_000
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1500000\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "500000\n")
    assert free_bytes(tmp_path) == 1_000_000


def test_this_machine_has_memory_cores_and_speed() -> None:
    found = measure_device()
    assert found.memory_mb and found.memory_mb > 1 and found.cores >= 1
    cuda = torch.cuda.is_available()
    assert (found.accelerator_gflops if cuda else found.gflops_per_core) > 0 and found.accelerator == ("cuda" if cuda else "none")
