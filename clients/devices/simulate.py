"""Availability and time of a simulated device. Time is virtual, so that runs are reproducible bit for bit on any machine."""

import math
import random

from fedtune.clients.devices.estimate import seconds
from fedtune.config import DeviceClass
from fedtune.contracts.seeds import derive_seed


def is_offline(device: DeviceClass | None, seed: int, round: int, client: str) -> bool:
    """Whether the device is offline in this round, drawn for each round with the class's probability `offline`."""
    if device is None:
        return False
    return random.Random(derive_seed(seed, "offline", round, client)).random() < device.offline


def virtual_seconds(device: DeviceClass | None, flops: float, nbytes: int, *, seed: int, round: int, client: str) -> float:
    """Virtual seconds of a turn: the time of its operations and its network transfer, times exp(N(0, jitter²)) drawn for this round."""
    if device is None:
        return 0.0
    jitter = random.Random(derive_seed(seed, "jitter", round, client)).gauss(0.0, device.jitter)
    return seconds(device, flops, nbytes) * math.exp(jitter)
