"""Child processes that import this fedtune and never outlive their parent."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def exit_with_parent(parent: int) -> None:
    """Ask Linux to kill this process with the thread that started it; on other systems, the child must watch its standard input.

    Args:
        parent: Process id of the parent, read before anything else: it may have died since.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child started with `python -P -m` imports the same fedtune."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
