"""What becomes of a run at the edge: merge, export, generate.

Names are imported when they are first used: `import fedtune.inference` loads neither torch, PEFT nor Flower.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.inference.export import export_hf
    from fedtune.inference.generate import generate_text

__all__ = ["export_hf", "generate_text"]

_HOME = {"export_hf": "export", "generate_text": "generate"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune.inference' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fedtune.inference.{_HOME[name]}"), name)
