"""Freed memory returns to the system."""

import sys

import pytest
import torch

from fedtune.storage.heap import _library, give_back, own_pages


def rss() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: SIM115


@pytest.mark.skipif(sys.platform != "linux" or _library() is None, reason="needs glibc")
def test_freed_blocks_between_used_ones_are_returned_to_the_system() -> None:
    torch.ones(24 << 20, dtype=torch.uint8)  # freed: from here on glibc keeps blocks of this size for itself
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(64)]
    kept, before = blocks[1::2], rss()
    del blocks
    give_back()
    assert before - rss() > 24 << 20 and all(int(t[-1]) == 1 for t in kept)


@pytest.mark.skipif(sys.platform != "linux" or _library() is None, reason="needs glibc")
def test_blocks_with_their_own_pages_are_returned_when_they_are_freed() -> None:
    torch.ones(24 << 20, dtype=torch.uint8)
    with own_pages():
        blocks = [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(32)]
        kept, before = blocks[1::2], rss()
        del blocks
        assert before - rss() > 12 << 20 and len(kept) == 16  # a few blocks may fit into free memory of the heap


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.storage.heap.sys.platform", "darwin")
    _library.cache_clear()
    try:
        give_back()
        with own_pages():
            assert _library() is None
    finally:
        _library.cache_clear()
