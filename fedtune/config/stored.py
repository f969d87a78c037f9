"""Reads the config of a run directory. The directory is not trusted: it may come from another machine."""

from pathlib import Path

from fedtune.config import Config, from_dict
from fedtune.errors import CheckpointError, FedtuneError
from fedtune.storage.parsing import parse_yaml, read_text


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
