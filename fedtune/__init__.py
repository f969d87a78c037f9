"""Federated parameter-efficient fine-tuning of language models: simulate, deploy, run at the edge."""

import logging
import os
from pathlib import Path

for _name, _value in {
    # set before Flower and Ray are imported anywhere: nothing that runs here reports home
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # set before torch: idle OpenMP threads that spin for long make a machine with other work on it ten times slower
    "GOMP_SPINCOUNT": "20000",
}.items():
    os.environ.setdefault(_name, _value)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import of a kernel that only a hub could bring

_here = Path(__file__).resolve().parent
if not (_here / "strategies").is_dir() and (_here.parent / "strategies").is_dir():
    __path__.append(str(_here.parent))  # a checkout or an app bundle: the sub-packages sit beside this folder

__version__ = "0.1.0"
