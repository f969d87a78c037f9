"""Rereads the list of allowed clients while the server runs, so that additions and removals take effect at once."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fedtune.errors import FedtuneError, LinkLost

CHECK_S = 2.0  # between two checks of the file
_JOIN_S = 5.0  # to wait for a change in progress


class AllowedClientsWatcher:
    """Watches the file in its own thread while the context is open.

    Args:
        file: `allowed.json`.
        first: Its contents when the server read it.
        read: Reads it: client → public key. Raises FedtuneError if it is invalid.
        change: Called with every new list.
        note: Called with a sentence about each change and each invalid list. After an invalid list, the previous one stays in force.
    """

    def __init__(
        self,
        file: Path,
        first: Mapping[str, str],
        read: Callable[[Path], Mapping[str, str]],
        change: Callable[[Mapping[str, str]], None],
        note: Callable[[str], None],
    ) -> None:
        self._file, self._keys, self._read, self._change, self._note = file, dict(first), read, change, note
        self._seen: tuple[int, ...] | None = None  # the first check reads the file: it may have changed since the server read it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="allowed", daemon=True)

    def __enter__(self) -> "AllowedClientsWatcher":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)

    def check(self) -> None:
        """Read the file if it changed since the last check."""
        state: tuple[int, ...] = ()
        with suppress(OSError):
            found = self._file.stat()
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
        if state == self._seen:
            return
        try:
            keys = dict(self._read(self._file))
            if keys != self._keys:
                self._change(keys)
                self._note(f"{self._file} has changed: {_difference(self._keys, keys)}")
                self._keys = keys
        except LinkLost:
            return  # the SuperLink is briefly unavailable: the next check tries again
        except FedtuneError as bad:
            self._note(f"{bad}; the previous list of {len(self._keys)} clients stays in force")
        self._seen = state

    def _watch(self) -> None:
        while not self._stop.wait(CHECK_S):
            self.check()


def _difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    kinds = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "with a new key": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
    }
    return "; ".join(f"{', '.join(names[:5])}{' …' * (len(names) > 5)} {what}" for what, names in kinds.items() if names)
