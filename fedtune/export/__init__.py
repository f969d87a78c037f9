"""Exports a run's merged model as a Hugging Face folder, an edge package or a GGUF file.

Names are imported on first use: `import fedtune.export` loads neither torch nor PEFT.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.export.huggingface import export_hf

__all__ = ["export_hf"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedtune.export' has no attribute '{name}'")
    return getattr(importlib.import_module("fedtune.export.huggingface"), name)
