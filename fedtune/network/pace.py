"""The nodes' polling interval. It grows with the number of nodes, so that polling takes a bounded share of the server's time.

A poll costs Flower's SuperLink 5 to 10 ms of one core. Ten polls a second from each of 50 nodes would take all of its time and delay other
requests. So each response tells the node how long to wait before its next poll.
"""

import math
import time
from collections.abc import Callable

PACE = "x-fedtune-pace"
LEAST_S, MOST_S = 0.1, 10.0
FEW, EACH_S = 5, 0.08  # up to FEW nodes poll every LEAST_S; each further node adds EACH_S: 50 nodes poll 14 times a second in total
_HEARD_S = 30.0  # a node counts as present this long after a request: three heartbeats


class PollPacer:
    """Computes the polling interval on the server, from the number of nodes present.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._heard, self._swept = clock, dict[bytes, float](), -math.inf

    def interval(self, key: bytes) -> float:
        """Record a request by the node with this key. Returns its polling interval in seconds."""
        now = self._clock()
        self._heard[key] = now
        if now - self._swept > 1.0:
            self._heard = {k: at for k, at in self._heard.items() if now - at < _HEARD_S}
            self._swept = now
        return min(MOST_S, max(LEAST_S, EACH_S * (len(self._heard) - FEW)))


def read_pace(text: str) -> float:
    """Parse the interval that a server sent, in seconds; 0 if it is missing or invalid."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if 0.0 <= seconds <= MOST_S else 0.0
