"""Data of a federation: sources (hub, local files, the demo), partition over clients, tokenization, batches.

Names are imported on first use: `import fedtune.data` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.data.check import check_coordinator_data, check_data
    from fedtune.data.examples import Example, collate, encode, pad_id, prompts
    from fedtune.data.federation import ClientRows, Federation, load_federation, load_test

__all__ = [
    "ClientRows", "Example", "Federation", "check_coordinator_data", "check_data", "collate", "encode", "load_federation", "load_test",
    "pad_id", "prompts",
]  # fmt: skip

_HOME = {
    "check_coordinator_data": "check",
    "check_data": "check",
    "Example": "examples",
    "collate": "examples",
    "encode": "examples",
    "pad_id": "examples",
    "prompts": "examples",
    "ClientRows": "federation",
    "Federation": "federation",
    "load_federation": "federation",
    "load_test": "federation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fedtune.data.{_HOME[name]}"), name)
