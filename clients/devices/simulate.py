"""What a simulated device does in a round. Its time is virtual, so that a run repeats bit for bit on any machine."""

import math
import random

from fedtune.clients.devices.estimate import seconds
from fedtune.config import DeviceClass
from fedtune.contracts.seeds import derive_seed


def is_offline(device: DeviceClass | None, seed: int, round: int, client: str) -> bool:
    """Whether the device is away in this round: a coin of the class's own weight, tossed anew each round."""
    if device is None:
        return False
    return random.Random(derive_seed(seed, "offline", round, client)).random() < device.offline


def virtual_seconds(device: DeviceClass | None, flops: float, nbytes: int, *, seed: int, round: int, client: str) -> float:
    """Simulated seconds of a turn: its operations, `nbytes` over the network in all, times this round's exp(N(0, jitter²))."""
    if device is None:
        return 0.0
    luck = random.Random(derive_seed(seed, "jitter", round, client)).gauss(0.0, device.jitter)
    return seconds(device, flops, nbytes) * math.exp(luck)
