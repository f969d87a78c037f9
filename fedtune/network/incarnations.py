"""Decides which process may act for a key: a restarted client may at once, a second machine with a copy of the key may not.

Every client process sends a random token, its incarnation. A new incarnation that activates the node takes over from the previous one,
which may have crashed. If the previous one sends another request, it is alive: two machines use one key and would split the client's
messages between them. Then the first one becomes the holder again, and the other is refused while the first one sends requests.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

QUIET_S = 15.0  # a running client sends a heartbeat every 10 s
INCARNATION_HEADER = "x-fedtune-life"


@dataclass
class _Holder:
    holder: str
    heard: float
    previous: str = ""
    refused: set[str] = field(default_factory=set)


class Incarnations:
    """The incarnations behind each key. Thread-safe.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._places: dict[bytes, _Holder] = {}

    def may_call(self, key: bytes, incarnation: str, *, activates: bool, leaves: bool = False) -> bool:
        """Whether to accept a request whose signature with `key` was verified.

        Args:
            key: The public key.
            incarnation: The sender's incarnation; "" (a peer that sends none) is always accepted.
            activates: Whether the request activates the node.
            leaves: Whether the request deactivates it.
        """
        if not incarnation:
            return True
        with self._lock:
            now = self._clock()
            place = self._places.setdefault(key, _Holder(incarnation, now))
            if incarnation != place.holder:
                if activates:
                    if incarnation in place.refused and now - place.heard < QUIET_S:
                        return False
                    place.previous, place.holder = place.holder, incarnation
                    place.refused.discard(incarnation)
                elif incarnation == place.previous and not leaves:  # it is alive: the holder is a second machine
                    place.refused.add(place.holder)
                    place.previous, place.holder = "", incarnation
                else:
                    return False
            place.heard = now
            return True
