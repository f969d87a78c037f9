"""Arrays as tensors and back, without a copy; a bfloat16 tensor is an array of uint16."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtune.inference.engine.bfloat16 import Array

__all__ = ["as_array", "as_tensor", "arrays"]


def as_tensor(array: Array) -> Tensor:
    """The tensor with an array's memory; a copy if the array is read-only or not contiguous."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> Any:
    """The array with a tensor's memory."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """`as_array` of each."""
    return {name: as_array(tensor) for name, tensor in tensors.items()}
