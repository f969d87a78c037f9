"""Simulated devices: availability and virtual time depend only on seed, round and client."""

import math
import statistics

import pytest

from fedtune.clients.devices.simulate import is_offline, virtual_seconds
from fedtune.config import DeviceClass

WHEN = {"seed": 0, "round": 1, "client": "a"}


def test_the_clock_by_hand() -> None:
    device = DeviceClass(cores=2, gflops_per_core=3.0, duty=0.5, mbit_per_second=8.0)
    # 9·10⁹ operations at 2·3·0.5 = 3·10⁹ a second, and 2 MB at 8 Mbit/s = 1 MB/s
    assert virtual_seconds(device, 9e9, 2_000_000, **WHEN) == pytest.approx(5.0)
    assert virtual_seconds(DeviceClass(gflops_per_core=3.0), 9e9, 10**12, **WHEN) == pytest.approx(3.0)
    # an accelerator computes in place of the cores
    fast = DeviceClass(gflops_per_core=3.0, accelerator="cuda", accelerator_gflops=9.0)
    assert virtual_seconds(fast, 9e9, 0, **WHEN) == pytest.approx(1.0)
    assert virtual_seconds(DeviceClass(), 9e9, 10**12, **WHEN) == virtual_seconds(None, 9e9, 10**12, **WHEN) == 0.0


def test_jitter_has_the_stated_spread() -> None:
    device = DeviceClass(gflops_per_core=1.0, jitter=0.3)
    logs = [math.log(virtual_seconds(device, 1e9, 0, seed=0, round=r, client="a")) for r in range(2000)]
    assert statistics.mean(logs) == pytest.approx(0.0, abs=0.03) and statistics.stdev(logs) == pytest.approx(0.3, rel=0.06)
    assert virtual_seconds(device, 1e9, 0, **WHEN) == virtual_seconds(device, 1e9, 0, **WHEN)


def test_offline_has_the_stated_probability_and_repeats() -> None:
    device = DeviceClass(offline=0.2)
    away = [is_offline(device, 0, r, "a") for r in range(2000)]
    assert sum(away) / 2000 == pytest.approx(0.2, abs=0.03)
    assert away == [is_offline(device, 0, r, "a") for r in range(2000)]
    assert not is_offline(None, 0, 1, "a") and not is_offline(DeviceClass(), 0, 1, "a")
