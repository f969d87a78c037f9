"""Converts oneDNN's packed weights to bytes, and bytes to packed weights without a copy.

A packed weight is a tensor without strides in an internal layout of oneDNN. libtorch can wrap memory as such a tensor, given a description
of its layout. It does so for the constants of ahead-of-time compiled models, through its stable C interface, which is used here.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.inference.engine.reference.tensors import as_array

__all__ = ["can_wrap", "layout_of", "opaque_part", "raw_bytes", "wrap_array", "wrap_bytes"]

_DTYPES = {torch.int8: "aoti_torch_dtype_int8", torch.bfloat16: "aoti_torch_dtype_bfloat16"}
_NUMPY = {torch.int8: "int8", torch.bfloat16: "uint16"}


def opaque_part(part: Tensor) -> tuple[Any, str, tuple[int, ...], bytes | None]:
    """A part of a linear as an array, the name of its dtype in numpy, its shape and, if it is packed by oneDNN, its layout."""
    if not part.is_mkldnn:
        array = as_array(part)
        return array, str(array.dtype), array.shape, None
    return raw_bytes(part).numpy(), _NUMPY[part.dtype], tuple(part.shape), layout_of(part)


def wrap_array(memory: Any, layout: bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """The inverse of `opaque_part` for a packed part, whose memory must outlive it."""
    (own,) = (torch_name for torch_name, name in _NUMPY.items() if name == dtype)
    return wrap_bytes(torch.from_numpy(memory), layout, shape, own)


def raw_bytes(packed: Tensor) -> Tensor:
    """A [bytes] uint8 view of the memory of `packed`, valid while `packed` exists."""
    count = torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.uint8)


def layout_of(packed: Tensor) -> bytes:
    """oneDNN's description of the layout, valid for this oneDNN version and CPU."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def wrap_bytes(memory: Tensor, layout: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Wrap `memory` [bytes] uint8 as a packed weight; the memory must outlive it.

    Args:
        layout: Result of `layout_of`; a wrong one is not detected.
        shape, dtype: Those of the packed tensor.
    """
    lib, capsule = _libtorch(), ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    sizes, described = (ctypes.c_int64 * len(shape))(*shape), (ctypes.c_uint8 * len(layout)).from_buffer_copy(layout)
    handle = ctypes.c_void_p()
    failed = lib.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(len(shape)), sizes, sizes, ctypes.c_int64(0),
        ctypes.c_int32(getattr(lib, _DTYPES[dtype])()), ctypes.c_int32(lib.aoti_torch_device_type_cpu()), ctypes.c_int32(0),
        ctypes.byref(handle), ctypes.c_int32(lib.aoti_torch_layout__mkldnn()), described, ctypes.c_int64(len(layout)),
    )  # fmt: skip
    if failed:
        raise RuntimeError("libtorch cannot wrap a packed weight")
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle, None, None))  # pyright: ignore[reportAttributeAccessIssue]


@cache
def can_wrap() -> bool:
    """Whether this torch supports `wrap_bytes`: tests that a wrapped weight gives the same product."""
    if not torch.backends.mkldnn.is_available():
        return False
    codes, x = torch.arange(-60, 60, dtype=torch.int8).view(8, 15), torch.arange(15, dtype=torch.uint8)[None]
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    one, none = torch.ones(8), torch.zeros(8, dtype=torch.int32)

    def product(weight: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, weight, one, none, None, 1.0, 0, torch.float32, "none", [], "")

    try:
        memory = raw_bytes(packed).clone()
        return torch.equal(product(wrap_bytes(memory, layout_of(packed), packed.shape, packed.dtype)), product(packed))
    except (AttributeError, RuntimeError, OSError):
        return False


@cache
def _libtorch() -> Any:
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.CDLL(str(next(path for path in sorted(folder.iterdir()) if path.name.endswith(_ENDINGS))))


_ENDINGS = ("torch_cpu.so", "torch_cpu.dylib", "torch_cpu.dll")
