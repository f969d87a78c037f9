"""Load and freeze a backbone, attach one adapter to it, and compute a task's losses and scores.

Names are imported on first use: `import fedtune.models` loads neither torch nor PEFT.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.models.adapter import LiveAdapter, initial_adapter
    from fedtune.models.backbone import Backbone, fingerprint, load_backbone
    from fedtune.models.evaluation import evaluate
    from fedtune.models.losses import loss_sum

__all__ = ["Backbone", "LiveAdapter", "evaluate", "fingerprint", "initial_adapter", "load_backbone", "loss_sum"]

# PEFT imports bitsandbytes, which warns on every CPU machine that an optional kernel package is not installed
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOME = {
    "Backbone": "backbone",
    "fingerprint": "backbone",
    "load_backbone": "backbone",
    "LiveAdapter": "adapter",
    "initial_adapter": "adapter",
    "evaluate": "evaluation",
    "loss_sum": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fedtune.models.{_HOME[name]}"), name)
