"""Reads a complete model, merged elsewhere or never tuned, as the source of an export."""

from pathlib import Path
from typing import Any

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.inference.engine.package import is_package
from fedtune.inference.generate import read_card
from fedtune.models.adapter_folder import OWN, StoredAdapter
from fedtune.models.checkpoint import read_config

__all__ = ["is_whole", "read_whole"]


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a model, and not a run or an adapter, which may have a config.json too."""
    return (folder / "config.json").is_file() and not any((folder / n).is_file() for n in ("config.yaml", "adapter_config.json", OWN))


def read_whole(folder: Path) -> tuple[StoredAdapter, dict[str, Any]]:
    """Return an adapter that changes nothing, and the model's fedtune.json ({} if it has none).

    Raises:
        ModelError: It is an edge package, a classifier, or quantized; it has an unmerged adapter, or a damaged card or config.
    """
    if is_package(folder):
        raise ModelError(f"{folder} is already an edge package: give the run or the model that it was made from")
    card = read_card(folder)
    if "peft" in card:
        raise ModelError(f"{folder} has an unmerged adapter: give the run that it was exported from")
    if quantized := read_config(folder).get("quantization_config"):
        how = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(f"{folder} is already quantized ({how or 'quantization_config'}): give the unquantized model")
    state = AdapterState({}, AdapterSpec(method="full"))
    return StoredAdapter(state=state, base=str(folder), task_type="CAUSAL_LM"), card
