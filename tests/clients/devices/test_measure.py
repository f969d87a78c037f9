"""The machine's own profile."""

from pathlib import Path

import pytest
import torch

from fedtune.clients.devices import measure, measure_device
from fedtune.clients.devices.measure import free_bytes


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_memory_is_the_smaller_of_system_and_control_group(tmp_path: Path) -> None:
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
    if not torch.cuda.is_available():
        assert measure_device(tmp_path).memory_mb == 1.0


def test_this_machine_has_memory_cores_and_speed() -> None:
    device = measure_device()
    assert device.memory_mb and device.memory_mb > 1 and device.cores >= 1
    cuda = torch.cuda.is_available()
    assert (device.accelerator_gflops if cuda else device.gflops_per_core) > 0 and device.accelerator == ("cuda" if cuda else "none")


def test_the_speed_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, product = [0.0], torch.mm

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock[0] += 0.001
        return product(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    # a product of n × n matrices has 2 n³ operations, and takes a millisecond
    assert measure._gflops(torch.device("cpu")) == pytest.approx(2 * measure._SIZE**3 / 1e-3 / 1e9, rel=0.01)


def test_a_machine_with_a_gpu_reports_its_memory_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3_000_000, 8_000_000))
    monkeypatch.setattr(measure, "_gflops", lambda device: {"cuda": 7.0}[device.type])
    profile = measure_device()
    assert (profile.memory_mb, profile.accelerator, profile.accelerator_gflops, profile.gflops_per_core) == (3.0, "cuda", 7.0, 0.0)


def test_the_number_of_cores_on_a_system_without_cpu_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "_gflops", lambda device: 6.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delattr(measure.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 5)
    assert (measure_device().cores, measure_device().gflops_per_core) == (5, 3.0)  # measured over two threads
