"""The number of threads of the native kernels: torch's, if torch is loaded."""

import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["set_threads", "threads"]

_own: int | None = None


def threads() -> int:
    """Threads to use at most, with the calling one."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return _own or _default()


def set_threads(count: int) -> None:
    """Set the number of threads, of torch too, now or when the engine loads it."""
    global _own
    _own = count
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(count)


def wanted() -> int | None:
    """The number that was set; None if none was."""
    return _own


def _default() -> int:
    """As torch: OMP_NUM_THREADS, else this process's cores; threads that share one do not count."""
    with suppress(ValueError):
        if (given := int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0])) > 0:
            return given
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    with suppress(OSError):
        return len({Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list").read_text() for i in own})
    return len(own)
