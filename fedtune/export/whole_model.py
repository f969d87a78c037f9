"""A model that is whole already, merged elsewhere or never tuned: what an export reads of it in place of an adapter."""

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
    """Whether the folder holds a model, and neither a run nor an adapter: those may keep a config.json too."""
    return (folder / "config.json").is_file() and not any((folder / n).is_file() for n in ("config.yaml", "adapter_config.json", OWN))


def read_whole(folder: Path) -> tuple[StoredAdapter, dict[str, Any]]:
    """An adapter that changes nothing, and the model's fedtune.json, {} where it has none.

    Raises:
        ModelError: It is an edge package, a classifier or quantized, keeps an adapter beside its weights, or has a damaged card or config.
    """
    if is_package(folder):
        raise ModelError(f"{folder} is an edge package already: give the run or the model that it was made of")
    card = read_card(folder)
    if "peft" in card:
        raise ModelError(f"{folder} keeps its adapter beside its weights: give the run that it was exported from")
    if quantized := read_config(folder).get("quantization_config"):
        how = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(f"{folder} is quantized already ({how or 'quantization_config'}): give the model from before that")
    state = AdapterState({}, AdapterSpec(method="full"))
    return StoredAdapter(state=state, base=str(folder), task_type="CAUSAL_LM"), card
