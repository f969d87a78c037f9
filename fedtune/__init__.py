"""Federated parameter-efficient fine-tuning of language models: simulate, deploy, run at the edge."""

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.version import __version__ as __version__

for _name, _value in {
    # must be set before Flower and Ray are imported: no telemetry and no update checks
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # must be set before torch: long spinning of idle OpenMP threads makes a busy machine ten times slower
    "GOMP_SPINCOUNT": "20000",
}.items():
    os.environ.setdefault(_name, _value)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns of a kernel that only the Hugging Face Hub offers

_here = Path(__file__).resolve().parent
if not (_here / "strategies").is_dir() and (_here.parent / "strategies").is_dir():
    __path__.append(str(_here.parent))  # a checkout or an app bundle: the sub-packages sit beside this folder

if TYPE_CHECKING:  # imported on first use, so that `import fedtune` loads nothing
    from fedtune.clients.turns import Turn, Work
    from fedtune.config import Config
    from fedtune.contracts.adapter_state import AdapterState
    from fedtune.contracts.plan import Plan, Update
    from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
    from fedtune.errors import FedtuneError
    from fedtune.export import export_hf
    from fedtune.inference import generate_text
    from fedtune.inference.engine.load import load_engine
    from fedtune.library import Result, configure, load_run, run

__all__ = [
    "AdapterState",
    "Assignment",
    "Config",
    "FedtuneError",
    "Plan",
    "Requirements",
    "Result",
    "ServerState",
    "Strategy",
    "Turn",
    "Update",
    "Work",
    "configure",
    "export_hf",
    "generate_text",
    "load_engine",
    "load_run",
    "run",
]

_MODULES = {
    "clients.turns": ("Turn", "Work"),
    "config": ("Config",),
    "contracts.adapter_state": ("AdapterState",),
    "contracts.plan": ("Plan", "Update"),
    "contracts.strategy": ("Assignment", "Requirements", "ServerState", "Strategy"),
    "errors": ("FedtuneError",),
    "export": ("export_hf",),
    "inference": ("generate_text",),
    "inference.engine.load": ("load_engine",),
    "library": ("Result", "configure", "load_run", "run"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            try:
                return getattr(importlib.import_module(f"fedtune.{module}"), name)
            except ModuleNotFoundError as bad:
                from fedtune.errors import user_message

                raise ImportError(f"fedtune.{name}: {user_message(bad)}") from None
    raise AttributeError(f"module 'fedtune' has no attribute '{name}'")
