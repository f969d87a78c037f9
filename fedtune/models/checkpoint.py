"""A checkpoint's folder: find it, reject damaged and pickled files, and compute its fingerprint."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedtune.config import ModelConfig
from fedtune.errors import ModelError
from fedtune.storage.checkpoint_files import weight_files
from fedtune.storage.parsing import parse_json, read_text
from fedtune.storage.tensor_files import StoredTensor, read_header

NANO = Path(__file__).parent / "nano"  # the embedded backbone
# Keys of config.json that may change if the same weights are saved again or loaded for another task
_PASSING = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "num_labels", "id2label", "label2id",
    "problem_type", "pad_token_id", "_attn_implementation_autoset",
}  # fmt: skip
_CHUNK, _CHUNKS = 512, 8


def find_folder(config: ModelConfig, *, weights: bool = True) -> Path:
    """The folder of the checkpoint; a hub name is downloaded into the hub's cache first.

    Args:
        config: Its `source`, `name` and `revision` are used.
        weights: False downloads only config.json, which is enough for a server.

    Raises:
        ModelError: The folder or hub name does not exist, or the hub cannot be reached.
    """
    if config.source == "nano":
        if not (NANO / "config.json").is_file():
            raise ModelError(f"the embedded backbone is missing from {NANO}: reinstall fedtune, or take model=hub with a model.name")
        return NANO
    path = Path(config.name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"model.name={config.name} is a file: give the folder with config.json and the safetensors weights")
    if path.is_absolute() or config.name.startswith(("~", ".")) or config.name.count("/") > 1:
        raise ModelError(f"model.name={config.name}: no such folder; give a local folder or a hub name")
    return _fetch(config, weights)


def _fetch(config: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    # Only files in the root and no pickles: subfolders contain other formats, consolidated* is a copy of the weights
    wanted = ["config.json"] if not weights else ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    if weights and config.trust_remote_code:
        wanted.append("*.py")
    try:
        found = snapshot_download(config.name, revision=config.revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"])
    except GatedRepoError:
        raise ModelError(f"model.name={config.name} is gated on the hub: accept its terms there and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"model.name={config.name} is neither a local folder nor a public hub repository: check the name") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model.name={config.name} is not a local folder and not in the hub's cache, and the hub cannot be reached:"
            " check the name and the network, or give a local folder"
        ) from None
    except (HFValidationError, HfHubHTTPError, OSError) as bad:
        raise ModelError(f"model.name={config.name} cannot be downloaded from the hub: {first_line(bad)}") from None
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict.

    Raises:
        ModelError: It is missing or not the JSON of a Hugging Face model.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter, not a model: merge it first with fedtune export {folder}")
        raise ModelError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    if (folder / "adapter_config.json").is_file():  # transformers would load the backbone that the adapter names instead
        raise ModelError(f"{folder} holds a model and an adapter (adapter_config.json): move the adapter to its own folder")
    try:
        raw = parse_json(read_text(path))
    except (ValueError, OSError) as bad:
        raise ModelError(f"{path} cannot be read as JSON: {first_line(bad)}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path} has no model_type: it is not the config of a Hugging Face model")
    return raw


def refuse_quantized(folder: Path) -> None:
    """Raises ModelError if the checkpoint is already quantized: training and exports need the exact weights."""
    raw = read_config(folder)
    found = raw.get("quantization_config") or next(
        (c["quantization_config"] for c in raw.values() if isinstance(c, dict) and c.get("quantization_config")), None
    )
    if found:
        how = found.get("quant_method") if isinstance(found, dict) else None
        raise ModelError(
            f"{folder} is quantized already ({how or 'quantization_config'}): give the original checkpoint;"
            " model.precision=nf4 quantizes it while it is read"
        )


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of the checkpoint sorted by name, from the files' headers alone.

    Raises:
        ModelError: See `weight_files`; or a file is not safetensors, truncated or damaged.
    """
    return sorted((t for path in weight_files(folder, read_config(folder)) for t in read_header(path)[0].values()), key=lambda t: t.name)


def fingerprint(folder: str | Path) -> str:
    """The backbone's id: a hash of its config and of sampled bytes of every tensor, 16 hex digits.

    It does not depend on the loading precision or the sharding. Fine-tuned or rounded copies have other fingerprints.

    Raises:
        ModelError: The config or the weights are missing or damaged.
    """
    folder = Path(folder)
    tensors = stored_tensors(folder)
    return digest(read_config(folder), ((f"{t.name} {t.dtype} {list(t.shape)}", sampled(t)) for t in tensors))


def digest(config: dict[str, Any], parts: Iterable[tuple[str, bytes]]) -> str:
    """Hash of a config's keys (except those that may change) and of `(label, bytes)` pairs."""
    kept = {k: v for k, v in config.items() if k not in _PASSING}
    out = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for label, data in parts:
        out.update(f"\x1f{label}\x1f".encode() + data)
    return out.hexdigest()[:16]


def sampled(tensor: StoredTensor) -> bytes:
    """Chunks of a tensor's bytes, spread evenly from the first to the last byte."""
    last = tensor.size - _CHUNK
    offsets = [math.floor(last * i / (_CHUNKS - 1)) for i in range(_CHUNKS)] if last > 0 else [0]
    with open(tensor.file, "rb") as f:
        out = b""
        for offset in offsets:
            f.seek(tensor.start + offset)
            out += f.read(min(_CHUNK, tensor.size))
    return out


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
