"""The folder `start/` of a run: what the run began with. A resumed run reads it, and never what `peft.from` names.

RUN/start/
    adapter.safetensors  shift.safetensors    the start; the shift only if there is one
    earlier/config.yaml                       the config of the earlier run, if `peft.from` was a run: it describes the earlier test rows
    start.json                                where the start comes from, and the files' checksums
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.config import Config, to_dict
from fedtune.config.stored import read_config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.warm_start import WarmStart
from fedtune.errors import CheckpointError, FedtuneError
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import content_of, read_text
from fedtune.storage.reading import read_object

FOLDER = "start"
_ADAPTER, _SHIFT, _EARLIER, _ABOUT = "adapter.safetensors", "shift.safetensors", "earlier/config.yaml", "start.json"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """start.json."""

    about: Mapping[str, Any]
    sha256: Mapping[str, str]


def write_start(run: Path, start: WarmStart, earlier: Config | None) -> None:
    """Write the folder atomically.

    Args:
        run: The run directory.
        start: The start.
        earlier: The earlier run's config; None for a bare adapter.

    Raises:
        OSError: It cannot be written.
    """
    with new_folder(run / FOLDER, replace=True) as folder:
        start.adapter.save(folder / _ADAPTER)
        for shift in start.shifts:
            shift.save(folder / _SHIFT)
        if earlier is not None:
            text = yaml.safe_dump(to_dict(earlier), sort_keys=False, allow_unicode=True)
            (folder / _EARLIER).parent.mkdir()
            (folder / _EARLIER).write_text(text, encoding="utf-8")
        sums = {name: _sha256(folder / name) for name in (_ADAPTER, _SHIFT, _EARLIER) if (folder / name).is_file()}
        (folder / _ABOUT).write_text(json.dumps({"about": dict(start.about), "sha256": sums}), encoding="utf-8")


def read_start(run: Path) -> tuple[WarmStart, Config | None]:
    """Read what `write_start` wrote. As in every stored config, the earlier one's model.trust_remote_code is false.

    Raises:
        CheckpointError: The folder is missing or damaged.
    """
    folder = run / FOLDER
    try:
        stored = read_object(_Stored, read_text(folder / _ABOUT), ValueError, "file start.json")
        for name, wanted in stored.sha256.items():
            if name not in (_ADAPTER, _SHIFT, _EARLIER) or _sha256(folder / name) != wanted:
                raise ValueError(f"{name[:40]} has another checksum")
        adapter = AdapterState.load(folder / _ADAPTER)
        shifts = (AdapterState.load(folder / _SHIFT),) if _SHIFT in stored.sha256 else ()
        earlier = read_config((folder / _EARLIER).parent) if _EARLIER in stored.sha256 else None
    except (OSError, ValueError, FedtuneError) as bad:
        raise CheckpointError(
            f"the run cannot be continued, because {folder}, what it began with, cannot be read ({str(bad).splitlines()[0]}): restore the"
            " folder, or start a new run"
        ) from None
    return WarmStart(adapter=adapter, shifts=shifts, about=stored.about), earlier


def _sha256(path: Path) -> str:
    return hashlib.sha256(content_of(path)).hexdigest()


__all__ = ["FOLDER", "read_start", "write_start"]
