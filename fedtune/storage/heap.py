"""glibc's heap keeps freed memory between blocks in use, for later allocations. Elsewhere nothing here has an effect."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["give_back", "own_pages"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGE, _LARGEST = 1 << 20, 32 << 20  # bytes; glibc raises its threshold to the second by itself


def give_back() -> None:
    """Return free memory in the heap to the system. Python does this only at the heap's end."""
    if (library := _library()) is not None:
        library.malloc_trim(0)


@contextmanager
def own_pages() -> Iterator[None]:
    """A context in which a block of 1 MB or more gets its own pages, unless free memory fits; they return to the system when it is freed.

    This costs time, because new pages are cleared. It helps where blocks that stay are allocated between larger ones that are freed.
    """
    library = _library()
    try:
        if library is not None:
            library.mallopt(_MMAP_THRESHOLD, _LARGE)
        yield
    finally:
        if library is not None:
            library.mallopt(_MMAP_THRESHOLD, _LARGEST)
            library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


@cache
def _library() -> Any:
    """The process's C library; None if it is not glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
