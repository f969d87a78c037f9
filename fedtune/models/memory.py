"""Telling a want of memory from other errors."""

import torch


def is_out_of_memory(bad: Exception) -> bool:
    """Whether an error is a want of memory; torch's CPU allocator says so in words only."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(bad, (MemoryError, torch.OutOfMemoryError)) or (isinstance(bad, RuntimeError) and any(w in str(bad) for w in words))
