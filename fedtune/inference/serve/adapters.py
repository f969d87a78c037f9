"""Separate LoRA adapters, selected by a request's `model`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.shape import Shape


def add_adapter(engine: Engine, name: str, folder: Path) -> None:
    """Load the adapter of a folder, so that requests can select it by this name.

    Raises:
        ConfigError: The name is taken.
        ModelError: The folder holds no LoRA adapter or one for another model, or quantization has moved scales between the model's layers.
    """
    if name in engine.adapters:
        raise ConfigError(f"the model already has an adapter named '{name}': give this one another name")
    from fedtune.inference.quantize.model import FOLDING  # lazy, as in `factors`: it loads torch

    quantized = engine.card.get("quantised")
    if isinstance(quantized, dict) and quantized.get("method") in FOLDING:
        raise ModelError(
            f"{engine.folder} was quantized by {quantized['method']}, which moves scales between layers, so separate adapters do not fit:"
            " export the model with --method rtn or gptq"
        )
    engine.add_adapter(name, factors(folder, engine.shape))


def factors(folder: Path, shape: Shape) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Module → A [r, K], multiplied by the scaling s, and B [N, r], float32. They include the run's shifts (updates of its frozen weights).

    Raises:
        ModelError: As in `add_adapter`.
    """
    from fedtune.inference.text_part import of_text_part
    from fedtune.models.adapter_folder import read_adapter
    from fedtune.models.combined import combined_factors
    from fedtune.models.methods import method

    if not folder.is_dir():
        raise ModelError(f"there is no adapter folder {folder}")
    stored = read_adapter(folder)
    if method(stored.state.spec.method).factors is None:
        raise ModelError(f"{folder} holds an adapter of the method '{stored.state.spec.method}': only LoRA adapters can be separate")
    if stored.heads or stored.over:
        raise ModelError(f"{folder} changes more than LoRA's factors: merge it with `fedtune export`")
    found = combined_factors([of_text_part(s) for s in (stored.state, *stored.shifts)], dict(tensor_shapes(shape)), str(folder))
    return {module: (a.numpy(), b.numpy()) for module, (a, b) in found.items()}
