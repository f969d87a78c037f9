"""Writes an edge package tensor by tensor, so that only one needs to be in memory."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedtune.inference.engine.package import ADAPTERS, CARD, FILES, FORMAT, PACKAGE, StoredLinear, digest, linear_tensors, sealed

__all__ = ["PackageWriter", "TensorFile", "as_bytes"]

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in file order; for a contiguous tensor its own memory, which can be read into."""
    return memoryview(cast(Any, tensor.contiguous().flatten().view(torch.uint8).numpy()))


class TensorFile:
    """A safetensors file whose header is written first; the tensors follow in any order.

    Args:
        path: The file to create.
        specs: Name → dtype and shape, in file order.
        metadata: The header's metadata.
    """

    def __init__(self, path: Path, specs: Specs, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        self.path, self._specs, self._starts, end = path, dict(specs), dict[str, int](), 0
        for name, (dtype, shape) in specs.items():
            size = dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._starts[name], end = end, end + size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(len(raw) + 8) % 64)  # so that mapped tensors are aligned
        self._begin = 8 + len(raw)
        self._file = open(path, "wb")  # noqa: SIM115  held until close
        self._file.write(struct.pack("<Q", len(raw)) + raw)
        self._file.truncate(self._begin + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor with the declared dtype and shape."""
        dtype, shape = self._specs[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"
        self._file.seek(self._begin + self._starts.pop(name))
        self._file.write(as_bytes(tensor))

    def close(self) -> None:
        assert not self._starts, f"{self.path} lacks {next(iter(self._starts))}"
        self._file.close()


class PackageWriter:
    """Writes the weights of a package.

    Args:
        folder: An existing folder, empty except for other files of the package.
        specs: All tensors except linears' weights: name → dtype and shape, in file order.
        linears: All linears, in file order.
    """

    def __init__(self, folder: Path, specs: Specs, linears: Mapping[str, StoredLinear]) -> None:
        self.folder, self._linears = folder, dict(linears)
        every = dict(specs)
        for name, linear in linears.items():
            every |= {part: (_DTYPES[dtype], size) for part, (dtype, size) in linear_tensors(name, linear).items()}
        self._files = {
            _DTYPES[name]: TensorFile(folder / f"{stem}.safetensors", mine)
            for name, stem in FILES.items()
            if (mine := {n: s for n, s in every.items() if s[0] == _DTYPES[name]})
        }

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor other than a linear's weight, in the declared dtype."""
        self._files[tensor.dtype].put(name, tensor)

    def put_linear(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a linear's `weight`, or `packed`, `scale` and (int4) `zero`."""
        for part, tensor in tensors.items():
            self.put(f"{name}.weight" if part == "weight" else f"{name}.weight.{part}", tensor)

    def put_adapter(self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], base: str) -> None:
        """Write a separate adapter: module → A [r, K] and B [N, r] with the scaling in B, float32."""
        (self.folder / ADAPTERS).mkdir(exist_ok=True)
        tensors = {f"{m}.lora_{x}": t for m, pair in factors.items() for x, t in zip("AB", pair, strict=True)}
        specs = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        file = TensorFile(self.folder / ADAPTERS / f"{name}.safetensors", specs, {"fedtune": json.dumps({"base": base})})
        for n, tensor in tensors.items():
            file.put(n, tensor)
        file.close()

    def close(self, config: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Write config.json, the card and package.json, after all tensors and the tokenizer's files."""
        for file in self._files.values():
            file.close()
        linears = {n: {"kind": x.kind, "group": x.group, "shape": list(x.shape)} for n, x in self._linears.items()}
        for name, body in (("config.json", config), (CARD, card)):
            self._write(name, body)
        seals = {path.name: digest(path) for path in sorted(self.folder.iterdir()) if path.is_file() and sealed(path.name)}
        self._write(PACKAGE, {"format": FORMAT, "linears": linears, "sha256": seals})

    def _write(self, name: str, body: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
