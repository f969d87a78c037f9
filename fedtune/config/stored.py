"""Reads the config and the label names of a run directory. The directory is not trusted: it may come from another machine."""

from pathlib import Path

from fedtune.config import Config, from_dict
from fedtune.errors import CheckpointError, FedtuneError
from fedtune.storage.parsing import parse_json, parse_yaml, read_text


def read_config(path: Path) -> Config:
    """Read a run directory's config.yaml; no other function reads it as a Config.

    Sets model.trust_remote_code to false: only the current command line may allow remote code.

    Raises:
        CheckpointError: There is no run, or its config cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no run directory {path}: give the folder that holds config.yaml and checkpoints/")
    try:
        config = from_dict(parse_yaml(read_text(path / "config.yaml")))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run directory: it has no config.yaml") from None
    except (ValueError, OSError) as bad:
        raise CheckpointError(f"cannot read {path / 'config.yaml'}: {str(bad).splitlines()[0]}") from None
    except FedtuneError as bad:
        raise CheckpointError(f"cannot use {path / 'config.yaml'}: {bad}") from None
    config.model.trust_remote_code = False
    return config


def read_labels(run: Path) -> list[str]:
    """Read a classifier's label names from a run directory; [] if it has no partition.json.

    Raises:
        CheckpointError: The file cannot be read.
    """
    path = run / "partition.json"
    if not path.is_file():
        return []
    try:
        return [str(label) for label in parse_json(read_text(path))["labels"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"cannot read {path}: it must be the file that the run wrote") from None
