"""Which process holds a key's place: a client that crashed gets it back at once, a second machine with a copy of its key does not.

Every process of a client names itself by a word of its own, its life. A life that activates the node takes the place over, for its
forerunner may be dead. If that one speaks again, it is not: then there are two machines with one key, which would share the client's
messages between them. The first gets the place back, and the other is refused for as long as the first is heard.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

QUIET_S = 15.0  # a living client is heard at each heartbeat, every 10 s
LIFE = "x-fedtune-life"


@dataclass
class _Place:
    holder: str
    heard: float
    former: str = ""
    refused: set[str] = field(default_factory=set)


class Lives:
    """The lives behind each key. Safe to use from several threads.

    Args:
        clock: Seconds, by any start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._places: dict[bytes, _Place] = {}

    def may_speak(self, key: bytes, life: str, *, activates: bool, leaves: bool = False) -> bool:
        """Whether a request counts, of a life that has shown that it has the key.

        Args:
            key: The key.
            life: The life; "" of peers that do not name theirs, which may.
            activates: Whether the request asks for the place.
            leaves: Whether it gives the place back.
        """
        if not life:
            return True
        with self._lock:
            now = self._clock()
            place = self._places.setdefault(key, _Place(life, now))
            if life != place.holder:
                if activates:
                    if life in place.refused and now - place.heard < QUIET_S:
                        return False
                    place.former, place.holder = place.holder, life
                    place.refused.discard(life)
                elif life == place.former and not leaves:  # it lives: whoever took its place is a second one
                    place.refused.add(place.holder)
                    place.former, place.holder = "", life
                else:
                    return False
            place.heard = now
            return True
