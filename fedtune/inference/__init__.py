"""Inference on a device: the engine, quantization, chat and server.

Names are imported on first use: `import fedtune.inference` loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.inference.generate import generate_text

__all__ = ["generate_text"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedtune.inference' has no attribute '{name}'")
    return getattr(importlib.import_module("fedtune.inference.generate"), name)
