"""oneDNN's packed weights as plain bytes, and plain bytes as such weights without copying them.

A packed weight is a tensor without strides, whose layout oneDNN alone knows. libtorch can wrap memory that holds one, given a description
of its layout; it does so for the constants of models that are compiled ahead of time, through its stable C interface, and so do we.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_wrap", "layout_of", "raw_bytes", "wrap_bytes"]

_DTYPES = {torch.int8: "aoti_torch_dtype_int8", torch.bfloat16: "aoti_torch_dtype_bfloat16"}


def raw_bytes(packed: Tensor) -> Tensor:
    """[bytes] uint8, the memory of `packed` itself: to be used while `packed` lives."""
    count = torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.uint8)


def layout_of(packed: Tensor) -> bytes:
    """oneDNN's description of the layout, which holds for this version of it on this CPU."""
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())


def wrap_bytes(memory: Tensor, layout: bytes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The packed weight that lies in `memory` [bytes] uint8, which must outlive it.

    Args:
        layout: Of `layout_of`; one that does not belong to the memory is not found out.
        shape, dtype: Of the packed tensor.
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
        raise RuntimeError("libtorch did not take a packed weight")
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle, None, None))  # pyright: ignore[reportAttributeAccessIssue]


@cache
def can_wrap() -> bool:
    """Whether this torch can: one weight of each kind there and back multiplies as before."""
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
