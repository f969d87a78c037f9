"""Read a PEFT adapter folder without PEFT: plain LoRA factors with their scaling, and a classifier's head."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ModelError

_PREFIX = "base_model.model."
# Settings that change what a merge has to compute; only these values are plain LoRA
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None, "target_parameters": None}


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """What a PEFT adapter folder holds.

    Args:
        factors: Module → (A (r, in), B (out, r), scaling).
        heads: Parameter of the backbone → what replaces it, such as `score.weight`.
        base: Name or folder of the backbone; "" where the adapter does not say.
        fingerprint: The backbone's fingerprint, where fedtune wrote the folder; else "".
        task_type: PEFT's, such as CAUSAL_LM.
    """

    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    heads: Mapping[str, Tensor]
    base: str
    fingerprint: str
    task_type: str


def read_adapter(folder: Path) -> StoredAdapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: A file is missing, damaged or pickled, or the adapter is no plain LoRA.
        CheckpointError: fedtune.safetensors is there but damaged.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        other = tensors.pop(f"{module}.lora_B.weight", None)
        a = tensors.pop(name)
        if other is None or a.ndim != 2 or other.ndim != 2 or other.shape[1] != a.shape[0]:
            raise ModelError(f"{folder}: the factors A and B of '{module}' do not fit each other: the adapter is damaged")
        factors[module] = (a, other, _scaling(config, module))
    if odd := [n for n in tensors if ".lora_" in n]:
        raise ModelError(f"{folder}: '{odd[0]}' is not part of a plain LoRA on linear layers, the only kind that can be merged")
    if not factors:
        raise ModelError(f"{folder}: {folder / 'adapter_model.safetensors'} holds no LoRA factors")
    base = config.get("base_model_name_or_path")
    return StoredAdapter(
        factors=factors,
        heads=tensors,
        base=base if isinstance(base, str) else "",
        fingerprint=_fingerprint(folder),
        task_type=str(config.get("task_type")),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is neither a run directory (config.yaml) nor a PEFT adapter (adapter_config.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
        numbers = [config["r"], config["lora_alpha"], *config.get("rank_pattern", {}).values(), *config.get("alpha_pattern", {}).values()]
        good = all(type(v) in (int, float) and math.isfinite(v) for v in numbers) and config["r"] > 0
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        good, kind, config = False, "", {}
    if kind and kind != "LORA":
        raise ModelError(f"{folder} is a PEFT adapter of the kind {kind}: only LORA can be merged")
    if not good:
        raise ModelError(f"{path} cannot be read: it must be the JSON of a PEFT LoRA adapter")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) not in (plain, None, {}, []):
            raise ModelError(f"{folder}: {key}={config[key]} is not plain LoRA, the only kind that can be merged")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ModelError(f"{folder} has only a pickled adapter_model.bin, which can run code when opened: save it as safetensors first")
        raise ModelError(f"{folder} has no adapter_model.safetensors")
    try:
        with safe_open(path, "pt") as f:
            return {n.removeprefix(_PREFIX): f.get_tensor(n).float() for n in f.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as bad:
        raise ModelError(f"{path} cannot be read ({str(bad)[:80]}): it is damaged or truncated") from None


def _scaling(config: dict[str, Any], module: str) -> float:
    """alpha / r, or alpha / √r for rsLoRA, with PEFT's patterns by module."""

    def of(default: float, patterns: dict[str, float]) -> float:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank, alpha = of(config["r"], config.get("rank_pattern") or {}), of(config["lora_alpha"], config.get("alpha_pattern") or {})
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _fingerprint(folder: Path) -> str:
    path = folder / "fedtune.safetensors"
    if not path.is_file():
        return ""
    from fedtune.state import AdapterState  # late: it loads Flower, which a bare PEFT adapter does not need

    return AdapterState.load(path).spec.base
