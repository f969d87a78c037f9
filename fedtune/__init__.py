"""Federated parameter-efficient fine-tuning of language models: simulate, deploy, run at the edge."""

import os
from pathlib import Path

# Set before Flower and Ray are imported anywhere: nothing that runs here reports home.
for _name, _value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():
    os.environ.setdefault(_name, _value)

_here = Path(__file__).resolve().parent
if not (_here / "strategies").is_dir() and (_here.parent / "strategies").is_dir():
    __path__.append(str(_here.parent))  # a checkout or an app bundle: the sub-packages sit beside this folder

__version__ = "0.1.0"
