"""Reads what `peft.from` names: the directory of a finished run, or an adapter folder. Nothing is unpickled."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Config
from fedtune.config.stored import read_config, read_labels
from fedtune.errors import CheckpointError, ConfigError
from fedtune.models.adapter_folder import OWN, StoredAdapter, read_adapter


@dataclass(frozen=True, kw_only=True)
class Source:
    """An earlier adapter.

    Args:
        key: The setting that names it, for errors.
        name: Name of the run's or the adapter's folder.
        sha256: Checksum of the file with the adapter's tensors.
        adapter: The adapter, with the shifts of its run.
        config: The config of its run; None for a bare adapter folder.
        labels: Its run's class names; empty if unknown.
    """

    key: str
    name: str
    sha256: str
    adapter: StoredAdapter
    config: Config | None = None
    labels: tuple[str, ...] = ()


def read_source(path: str) -> Source:
    """Read a run directory (or its folder `adapter`), or an adapter folder of fedtune or PEFT.

    Raises:
        ConfigError: There is no such folder, or it is a whole model.
        CheckpointError: The run has not ended, or a file of it is damaged.
        ModelError: The adapter is damaged or pickled, or PEFT's adapter is not plain LoRA.
    """
    key, given = f"peft.from={path}", Path(path).expanduser()
    if not given.is_dir():
        raise ConfigError(f"{key}: there is no such folder; give the directory of a finished run, or an adapter folder")
    whole = given.resolve()
    run = next((p for p in (whole, whole.parent) if (p / "config.yaml").is_file() and whole in (p, p / "adapter")), None)
    folder = run / "adapter" if run else whole
    if run and not any((folder / name).is_file() for name in (OWN, "adapter_config.json")):
        raise CheckpointError(f"{key}: the run has no adapter yet, because it has not ended; continue it with resume={run}")
    if run is None and (folder / "config.json").is_file() and not any((folder / n).is_file() for n in (OWN, "adapter_config.json")):
        raise ConfigError(f"{key} is a whole model, not an adapter: leave peft.from out and start on it with model=hub model.name={path}")
    adapter = read_adapter(folder)
    file = folder / (OWN if (folder / OWN).is_file() else "adapter_model.safetensors")
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return Source(
        key=key,
        name=(run or folder).name,
        sha256=sha256,
        adapter=adapter,
        config=read_config(run) if run else None,
        labels=tuple(read_labels(run)) if run else (),
    )
