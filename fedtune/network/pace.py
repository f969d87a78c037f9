"""How often nodes look for messages: the more there are, the less often each, so that looking costs a server a bounded share of its time.

A look costs Flower's SuperLink 5 to 10 ms of one core. Ten looks a second of each of 50 nodes would be all that it can do, and messages
would stand in line behind them. So each answer says how long to wait.
"""

import math
import time
from collections.abc import Callable

PACE = "x-fedtune-pace"
LEAST_S, MOST_S = 0.1, 10.0
FEW, EACH_S = 5, 0.08  # so many nodes look ten times a second each; with each one more, all wait so much longer: 50 look 14 times
_HEARD_S = 30.0  # three heartbeats


class Pace:
    """Counts who is there, on the server.

    Args:
        clock: Seconds, by any start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._heard, self._swept = clock, dict[bytes, float](), -math.inf

    def told(self, key: bytes) -> float:
        """Hear a node's key, and return the seconds that it is to wait between two looks."""
        now = self._clock()
        self._heard[key] = now
        if now - self._swept > 1.0:
            self._heard = {k: at for k, at in self._heard.items() if now - at < _HEARD_S}
            self._swept = now
        return min(MOST_S, max(LEAST_S, EACH_S * (len(self._heard) - FEW)))


def read_pace(text: str) -> float:
    """What a server said, on a node; 0 where it says nothing, or what makes no sense."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if 0.0 <= seconds <= MOST_S else 0.0
