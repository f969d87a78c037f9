"""Read an adapter from its folder, without PEFT: fedtune's own tensors if they exist, or else PEFT's plain LoRA."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.storage.parsing import parse_json, read_text
from fedtune.storage.reading import read_fields

OWN = "fedtune.safetensors"
BESIDE = "adapter"  # subfolder of an export, for an adapter that cannot be merged into weights
OVER = "quantised.json"  # names the quantized weights that the adapter requires
_PREFIX = "base_model.model."
# PEFT settings that change the arithmetic of a merge, with their values for plain LoRA
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None, "target_parameters": None}


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """The content of an adapter folder.

    Args:
        state: All trained tensors, by canonical name; its base is "" if fedtune did not write the folder.
        shifts: The shifts of the frozen weights, in the order of the rounds.
        heads: In PEFT's folder: parameter of the backbone, such as `score.weight` → its replacement. fedtune stores heads in the state.
        base: Name or folder of the backbone; "" if the folder does not contain it.
        task_type: PEFT's task type, such as CAUSAL_LM; "" if the folder does not contain it.
        over: `precision` and `compute` of the quantized weights that the adapter requires (peft.init=loftq); empty if it requires none.
    """

    state: AdapterState
    shifts: tuple[AdapterState, ...] = ()
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = ""
    task_type: str = ""
    over: Mapping[str, str] = field(default_factory=dict)


def read_adapter(folder: Path) -> StoredAdapter:
    """Read `fedtune.safetensors` with its `shift-*.safetensors`, or `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ModelError: A file is missing, damaged or pickled, or PEFT's adapter is not plain LoRA.
        CheckpointError: One of fedtune's files is damaged.
    """
    if not (folder / OWN).is_file():
        return _read_peft(folder)
    config = _json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else {}
    shifts = (AdapterState.load(p) for p in folder.glob("shift-*.safetensors"))
    return StoredAdapter(
        state=AdapterState.load(folder / OWN),
        shifts=tuple(sorted(shifts, key=lambda s: s.spec.version)),
        base=_text(config.get("base_model_name_or_path")),
        task_type=_text(config.get("task_type")),
        over=_over(folder),
    )


def _read_peft(folder: Path) -> StoredAdapter:
    config = _config(folder)
    tensors = _tensors(folder)
    state: dict[str, Tensor] = {}
    ranks, scaling = {}, {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        other = tensors.pop(f"{module}.lora_B.weight", None)
        a = tensors.pop(name)
        if other is None or a.ndim != 2 or other.ndim != 2 or other.shape[1] != a.shape[0]:
            raise ModelError(f"{folder}: the shapes of A and B of '{module}' do not match: the adapter is damaged")
        state[f"{module}.lora_A"], state[f"{module}.lora_B"] = a, other
        ranks[module], scaling[module] = len(a), _scaling(config, module)
    if odd := [n for n in tensors if ".lora_" in n]:
        raise ModelError(f"{folder}: '{odd[0]}' is not part of plain LoRA on linear layers, the only kind that can be merged")
    if not state:
        raise ModelError(f"{folder}: {folder / 'adapter_model.safetensors'} has no LoRA factors")
    return StoredAdapter(
        state=AdapterState(state, AdapterSpec(method="lora", ranks=ranks, scaling=scaling)),
        heads=tensors,
        base=_text(config.get("base_model_name_or_path")),
        task_type=_text(config.get("task_type")),
        over=_over(folder),
    )


@dataclass(frozen=True, kw_only=True)
class _Over:
    """The quantized weights that an adapter was trained on."""

    precision: Literal["nf4", "int8"]
    compute: Literal["bf16", "fp32"]


def _over(folder: Path) -> dict[str, str]:
    if not (folder / OVER).is_file():
        return {}
    try:
        return read_fields(_Over, _json(folder / OVER), ValueError, "file", others=True)
    except ValueError as bad:
        raise ModelError(
            f"{folder / OVER} cannot be read: {bad}; it must give `precision` and `compute` of the adapter's backbone"
        ) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_text(path))
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: it must be the JSON of a PEFT adapter")
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is neither a run directory (config.yaml) nor a PEFT adapter (adapter_config.json)")
    try:
        config = parse_json(read_text(path))
        kind = config["peft_type"]
        patterns = {**(config.get("alpha_pattern") or {}), **(config.get("rank_pattern") or {})}
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        numbers = [*ranks, config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        good = all(type(v) in (int, float) and math.isfinite(v) for v in numbers) and all(r > 0 for r in ranks)
        for name in patterns:  # PEFT reads them as regular expressions
            re.compile(name)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError, re.error):
        good, kind, config = False, "", {}
    if kind and kind != "LORA":
        raise ModelError(f"{folder} is a PEFT adapter of type {kind}: only LORA can be merged")
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
            raise ModelError(f"{folder} has only a pickled adapter_model.bin, which can run code when it is opened: save it as safetensors")
        raise ModelError(f"{folder} has no adapter_model.safetensors")
    try:
        with safe_open(path, "pt") as f:
            return {n.removeprefix(_PREFIX): f.get_tensor(n).float() for n in f.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as bad:
        raise ModelError(f"{path} cannot be read ({str(bad)[:80]}): it is damaged or truncated") from None


def _scaling(config: dict[str, Any], module: str) -> float:
    """alpha / r, or alpha / √r for rsLoRA, with PEFT's patterns for individual modules."""

    def of(default: float, patterns: dict[str, float]) -> float:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

    rank, alpha = of(config["r"], config.get("rank_pattern") or {}), of(config["lora_alpha"], config.get("alpha_pattern") or {})
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
