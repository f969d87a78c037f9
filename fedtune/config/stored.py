"""The config that a run directory holds, read without trust in it: a run may come from another machine."""

from pathlib import Path

from fedtune.config import Config, from_dict
from fedtune.errors import CheckpointError, FedtuneError
from fedtune.storage.parsing import parse_yaml, read_text


def read_config(path: Path) -> Config:
    """Read the config that a run directory was made with; the only reader of its config.yaml as a Config.

    model.trust_remote_code is always false in it: only today's command line may allow code.

    Raises:
        CheckpointError: No run there, or its config cannot be read.
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
