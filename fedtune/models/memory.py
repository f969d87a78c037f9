"""Recognize out-of-memory errors."""

import torch


def is_out_of_memory(bad: Exception) -> bool:
    """Whether an error means out of memory; for torch's CPU allocator, only the message shows it."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(bad, (MemoryError, torch.OutOfMemoryError)) or (isinstance(bad, RuntimeError) and any(w in str(bad) for w in words))
