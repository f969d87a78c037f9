"""Finds the weight files of a Hugging Face folder. Training, export and the engine use this, so that they read the same files.

The rule is transformers': the file that config.json names as `transformers_weights`, else `model.safetensors`, else the shards of
`model.safetensors.index.json`. An index beside `model.safetensors` is left over from an earlier save and is ignored.
"""

from pathlib import Path
from typing import Any

from fedtune.errors import ModelError
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["has_weights", "weight_files"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The safetensors files of a checkpoint, shards sorted by name. If two files have the same tensor, the later file counts.

    Args:
        folder: Folder of the checkpoint.
        config: Its config.json.

    Raises:
        ModelError: There are no weights, a shard is missing, or there are only pickled weights.
    """
    named = config.get("transformers_weights")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"{folder / 'config.json'} has transformers_weights={named!r}: it must name a .safetensors file here, or its index"
            )
        return _shards(folder / named) if named.endswith(".json") else [_present(folder / named, "file", "config.json")]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded: convert them to safetensors first"
        )
    raise ModelError(f"{folder} has no weights: it needs {SINGLE}, or shards with {INDEX}")


def has_weights(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder has weights at all; a server may have only the config."""
    named = config.get("transformers_weights")
    return any((folder / name).is_file() for name in ([named] if isinstance(named, str) else [SINGLE, INDEX]))


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(read_text(index))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise ModelError(f"{index} cannot be read: it must be JSON with a weight_map of file names") from None
    if outside:
        raise ModelError(f"{index} names the shard '{outside[0]}', which is not a plain file name in its folder")
    return [_present(index.parent / name, "shard", "its index") for name in names]


def _present(file: Path, what: str, where: str) -> Path:
    if not file.is_file():
        raise ModelError(f"{file.parent} lacks the {what} {file.name}, which {where} names: download the checkpoint again")
    return file
