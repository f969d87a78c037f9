"""All errors that fedtune raises deliberately.

FedtuneError
├── ConfigError       the configuration asks for something unknown or impossible
├── DataError         a source, a column, an encoding or a partition cannot be used
├── ModelError        a backbone or an adapter cannot be loaded, or does not fit the other
├── CheckpointError   a run directory or a checkpoint is missing, damaged or of another run
├── PlanError         a client cannot carry out the server's plan or message
├── UpdateError       a client's reply is invalid and must not count
│   └── UpdateMismatch    its tensors differ from the expected ones
├── NetworkError      a node cannot be reached, or may not join
│   └── LinkLost          the SuperLink no longer answers, or has ended the Flower run
├── Decline           a client does not take part in a round
└── RunError          the run cannot continue

Each message is one sentence: where, what came, what was wanted, what to do. Commands print it without a traceback and exit with code 2.
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
    "rouge_score": "rouge-score",
    "sqlalchemy": "sqlalchemy",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "transformers": "transformers",
}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class FedtuneError(Exception):
    """Base of all errors; the message is a sentence for the user."""


class ConfigError(FedtuneError):
    """The configuration asks for something unknown or impossible."""


class DataError(FedtuneError):
    """A source, a column, an encoding or a partition cannot be used."""


class ModelError(FedtuneError):
    """A backbone or an adapter cannot be loaded, or one does not fit the other."""


class CheckpointError(FedtuneError):
    """A run directory or a checkpoint is missing, damaged or of another run."""


class PlanError(FedtuneError):
    """A client cannot carry out the server's plan or message."""


class UpdateError(FedtuneError):
    """A client's reply is invalid and must not count."""


class UpdateMismatch(UpdateError):
    """A reply's tensors differ from the expected ones."""


class NetworkError(FedtuneError):
    """A node cannot be reached, or may not join."""


class LinkLost(NetworkError):
    """The SuperLink no longer answers, or has ended the Flower run: open a new run, or stop."""


class Decline(FedtuneError):
    """A client does not take part in this round; `kind` is the reason in one word."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class RunError(FedtuneError):
    """The run cannot continue."""


class Stopped(KeyboardInterrupt):
    """A person stopped a run; the message says how to resume it."""


def disk_error(bad: BaseException) -> str | None:
    """A description of the disk error (full, over quota, read-only or broken) behind an exception of any library; None if there is none."""
    if isinstance(bad, OSError) and bad.errno in _DISK:
        return f"{bad.filename or 'a file'} cannot be written ({bad.strerror})"
    if (match := re.search(r"([^:]+) \(os error (\d+)\)", str(bad))) and int(match[2]) in _DISK:  # safetensors wraps it as text
        return f"a file cannot be written ({match[1].strip()})"
    return None


def user_message(bad: Exception) -> str:
    """The sentence that a command prints before it exits with code 2. Raises an unexpected exception again: it is a bug in fedtune."""
    if isinstance(bad, FedtuneError):
        return str(bad)
    if isinstance(bad, ModuleNotFoundError) and (library := _OF_TRAINING.get(bad.name or "")):
        return f"this needs {library}, which is not installed: pip install 'fedtune[train]'"
    if (why := disk_error(bad)) is not None:
        return f"{why}: free disk space and start again"
    raise bad
