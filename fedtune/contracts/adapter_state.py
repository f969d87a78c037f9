"""Adapter state: all trainable tensors by name, and the spec that defines their meaning.

Names are canonical: `<module>.lora_A`, `<module>.lora_B` for LoRA, `<module>.<parameter>` for a head, as in the unmodified backbone. They
do not depend on the PEFT library's wrappers, so states, messages, checkpoints and exports use the same names.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtune.config.bounds import require
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import CheckpointError, UpdateMismatch
from fedtune.storage.atomic import flush
from fedtune.storage.ids import shown
from fedtune.storage.parsing import parse_json
from fedtune.storage.reading import read_object

if TYPE_CHECKING:  # a device that only runs inference reads adapters and does not need Flower
    from flwr.app import Array, ArrayRecord

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,  # positions, such as those of a sparse mask
    "int8": torch.int8,  # codes of fedtune.traffic
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The meaning of an adapter's tensors.

    Args:
        method: PEFT method, such as `lora`.
        base: Fingerprint of the backbone; "" if unknown.
        version: Server version: 0 is the initial adapter, t the adapter after round t.
        ranks: LoRA module → its rank r.
        scaling: LoRA module → its factor s, such as alpha / r.
        mask: Method `sparse`: the seed (text) of the positions, for `random_mask`; "" if the positions are tensors of the state.
        basis: The seed (text) of the frozen tensors that the method draws and the state lacks, such as RAVAN's bases; "" if it has none.
    """

    method: str
    base: str = ""
    version: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    mask: str = ""
    basis: str = ""

    def to_json(self) -> str:
        """All fields; an empty basis is omitted."""
        out = {**dataclasses.asdict(self), "ranks": dict(self.ranks), "scaling": dict(self.scaling)}
        return json.dumps({n: v for n, v in out.items() if n != "basis" or v}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "AdapterSpec":
        """Raises UpdateMismatch if `text` is not a spec."""
        spec = read_object(cls, text, UpdateMismatch, "adapter's spec")
        for module, rank in spec.ranks.items():
            require(f"the rank of '{shown(module)}' in the adapter's spec", rank, UpdateMismatch, ge=1)
        return spec


@dataclass(frozen=True)
class AdapterState:
    """Ordered mapping `name → tensor` of exactly the trainable tensors. Tensors are never changed in place."""

    tensors: Mapping[str, Tensor]
    spec: AdapterSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the spec and all tensors."""
        total = hashlib.sha256(self.spec.to_json().encode())
        for name, t in sorted(self.tensors.items()):
            total.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            total.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def replace(self, tensors: Mapping[str, Tensor] | None = None, **spec: Any) -> "AdapterState":
        """A new state with other tensors, or other fields of the spec."""
        return AdapterState(self.tensors if tensors is None else tensors, dataclasses.replace(self.spec, **spec))

    def subset(self, names: list[str]) -> "AdapterState":
        """A state with only these tensors."""
        return self.replace({n: self.tensors[n] for n in names})

    def product(self, module: str) -> Tensor:
        """s·B·A of a LoRA module (out, in), in float32. All merges use this function, so they all add the same values."""
        return self.spec.scaling[module] * (self[f"{module}.lora_B"].float() @ self[f"{module}.lora_A"].float())

    # -- the wire -------------------------------------------------------------------------------------------------------------------------

    def to_arrays(self) -> "ArrayRecord":
        """Convert to a Flower record. bf16 is stored as uint16 bits with the dtype in the array's header, because NumPy has no bf16."""
        from flwr.app import ArrayRecord

        return ArrayRecord({name: _to_array(t) for name, t in self.tensors.items()})

    @classmethod
    def from_arrays(cls, arrays: "ArrayRecord", spec: AdapterSpec, expect: "AdapterState | None" = None) -> "AdapterState":
        """Read a record from the network. Names, shapes and dtypes are checked before decoding.

        Args:
            arrays: The record.
            spec: Its spec.
            expect: Names, shapes and dtypes that it must have.

        Raises:
            UpdateMismatch: A tensor is missing, unexpected, of another shape or dtype, damaged or not finite. Names the first such tensor.
        """
        if expect is not None:
            if missing := [n for n in expect.tensors if n not in arrays]:
                raise UpdateMismatch(f"tensor '{missing[0]}' is missing: wanted {len(expect.tensors)} tensors, got {len(arrays)}")
            if surplus := [n for n in arrays if n not in expect.tensors]:
                raise UpdateMismatch(f"tensor '{surplus[0][:80]}' is not one of the expected tensors")
            for name, wanted in expect.tensors.items():
                got = arrays[name]
                if tuple(got.shape) != tuple(wanted.shape) or got.dtype != _NAMES[wanted.dtype]:
                    raise UpdateMismatch(
                        f"tensor '{name}' is {got.dtype} {tuple(got.shape)}, wanted {_NAMES[wanted.dtype]} {tuple(wanted.shape)}:"
                        " all clients must load the same backbone with the same adapter"
                    )
        order = list(expect.tensors) if expect is not None else list(arrays)
        return cls({name: _from_array(name, arrays[name]) for name in order}, spec)

    # -- the disk -------------------------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write one safetensors file with the spec in its metadata, and flush it to disk."""
        # a single entry, because safetensors writes several in arbitrary order, and equal states must give equal files
        meta = {"fedtune": json.dumps({"order": list(self.tensors), "spec": self.spec.to_json()})}
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, path, meta)
        flush(path)

    @classmethod
    def load(cls, path: Path) -> "AdapterState":
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or not a fedtune adapter.
        """
        try:
            with safe_open(path, "pt") as f:
                meta = f.metadata() or {}
                if "fedtune" not in meta:
                    raise CheckpointError(f"{path} is a safetensors file but not a fedtune adapter: its metadata has no 'fedtune' entry")
                entry = parse_json(meta["fedtune"])
                return cls({n: f.get_tensor(n) for n in entry["order"]}, AdapterSpec.from_json(entry["spec"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as bad:
            raise CheckpointError(f"cannot read the adapter {path}: {str(bad)[:120]}") from None
        except UpdateMismatch as bad:
            raise CheckpointError(f"cannot read the adapter {path}: {bad}") from None


def random_mask(mask: str, module: str, entries: int, count: int) -> Tensor:
    """Sorted positions (count,) int64 of a module's masked entries, in its flattened (out, in) matrix of `entries` entries.

    The positions are drawn without replacement and are the same in every process, so a random mask is never sent.

    Args:
        mask: `AdapterSpec.mask`.
        module: The module; each has its own positions.
        entries: out · in.
        count: Number of positions.
    """
    generator = torch.Generator().manual_seed(derive_seed(mask, "mask", module))
    return torch.randperm(entries, generator=generator)[:count].sort().values


@lru_cache(maxsize=4096)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header that `np.save` writes before an array's data. Cached: writing and parsing it costs more than a small adapter's data."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _to_array(tensor: Tensor) -> "Array":
    from flwr.app import Array
    from flwr.common.constant import SType

    tensor, name = tensor.detach().cpu().contiguous(), _NAMES[tensor.dtype]
    stored = "uint16" if name == "bfloat16" else name
    values = tensor.view(torch.int16).numpy() if stored == "uint16" else tensor.numpy()
    shape = tuple(tensor.shape)
    return Array(dtype=name, shape=shape, stype=SType.NUMPY, data=_npy_header(stored, shape) + values.tobytes())


def _from_array(name: str, array: "Array") -> Tensor:
    from flwr.common.constant import SType

    if array.dtype not in _DTYPES:
        raise UpdateMismatch(f"tensor '{name[:80]}' has dtype {array.dtype[:40]}, wanted one of {', '.join(_DTYPES)}")
    stored, shape = "uint16" if array.dtype == "bfloat16" else array.dtype, tuple(array.shape)
    if array.stype != SType.NUMPY or any(type(d) is not int or d < 0 for d in shape):
        raise UpdateMismatch(f"tensor '{name[:80]}' is '{array.stype[:40]}' of shape {shape}, wanted a NumPy array")
    header, wanted = _npy_header(stored, shape), math.prod(shape) * np.dtype(stored).itemsize
    # accept only the header that np.save writes for this dtype and shape: a peer's header is never parsed
    if len(array.data) != len(header) + wanted or not array.data.startswith(header):
        raise UpdateMismatch(f"tensor '{name[:80]}' is damaged: its {len(array.data)} bytes are not a NumPy array {array.dtype} {shape}")
    values = np.frombuffer(array.data, np.dtype(stored), offset=len(header)).reshape(shape).copy()
    tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if stored == "uint16" else torch.from_numpy(values)
    if not torch.isfinite(tensor).all():
        raise UpdateMismatch(f"tensor '{name[:80]}' has values that are not finite (NaN or infinity)")
    return tensor
