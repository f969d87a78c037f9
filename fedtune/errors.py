"""Every error that fedtune raises on purpose.

FedtuneError
├── ConfigError       the configuration asks for something unknown or impossible
├── DataError         a source, a column, an encoding or a partition cannot be used
├── ModelError        a backbone or an adapter cannot be loaded, or does not fit the other
├── CheckpointError   a run directory or a checkpoint is missing, damaged or of another run
├── PlanError         a client does not understand what the server asks
├── UpdateError       a client's reply must not count
│   └── UpdateMismatch    its tensors are not the ones that were asked for
├── NetworkError      nodes cannot be reached, or may not be let in
│   └── LinkLost          the SuperLink does not answer any more, or has ended the Flower run
├── Decline           a client does not take part in a round
└── RunError          the run cannot go on

Each message is one sentence: where, what came, what was wanted, what to do. Doors print it and exit with 2; no trace.
"""

import errno
import re

# What an import names that is not installed → the distribution that holds it, of those that only training needs
_OF_TRAINING = {
    "alembic": "alembic",
    "anyio": "anyio",
    "bitsandbytes": "bitsandbytes",
    "cryptography": "cryptography",
    "datasets": "datasets",
    "filelock": "filelock",
    "flwr": "flwr",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "h11": "h11",
    "httpx": "httpx",
    "huggingface_hub": "huggingface_hub",
    "hydra": "hydra-core",
    "matplotlib": "matplotlib",
    "omegaconf": "omegaconf",
    "opacus": "opacus",
    "peft": "peft",
    "pyarrow": "pyarrow",
    "sqlalchemy": "sqlalchemy",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class FedtuneError(Exception):
    """Base of all errors with a sentence for the user."""


class ConfigError(FedtuneError):
    """The configuration asks for something unknown or impossible."""


class DataError(FedtuneError):
    """A source, a column, an encoding or a partition cannot be used."""


class ModelError(FedtuneError):
    """A backbone or an adapter cannot be loaded, or one does not fit the other."""


class CheckpointError(FedtuneError):
    """A run directory or a checkpoint is missing, damaged or of another run."""


class PlanError(FedtuneError):
    """A client does not understand what the server asks."""


class UpdateError(FedtuneError):
    """A client's reply must not count."""


class UpdateMismatch(UpdateError):
    """A reply's tensors are not the ones that were asked for."""


class NetworkError(FedtuneError):
    """Nodes cannot be reached, or may not be let in."""


class LinkLost(NetworkError):
    """The SuperLink does not answer any more, or has ended the Flower run: open a new run, or stop."""


class Decline(FedtuneError):
    """A client does not take part this round; `kind` says in a word why."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class RunError(FedtuneError):
    """The run cannot go on."""


class Stopped(KeyboardInterrupt):
    """A person stopped a run that can be gone on with; says how."""


def disk_trouble(bad: BaseException) -> str | None:
    """What the disk refuses, where an exception of any library's says that it does: full, over its quota, read-only or broken."""
    if isinstance(bad, OSError) and bad.errno in _DISK:
        return f"{bad.filename or 'a file'} cannot be written ({bad.strerror})"
    if (said := re.search(r"([^:]+) \(os error (\d+)\)", str(bad))) and int(said[2]) in _DISK:  # what safetensors makes of it
        return f"a file cannot be written ({said[1].strip()})"
    return None


def sentence(bad: Exception) -> str:
    """What a door prints of an exception before it exits with 2; one that has no sentence is raised again: it is a fault of fedtune's."""
    if isinstance(bad, FedtuneError):
        return str(bad)
    if isinstance(bad, ModuleNotFoundError) and (library := _OF_TRAINING.get(bad.name or "")):
        return f"this needs {library}, which is not installed: pip install 'fedtune[train]'"
    if (why := disk_trouble(bad)) is not None:
        return f"{why}: free the disk and start again"
    raise bad
