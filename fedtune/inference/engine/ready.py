"""Packed weights on disk: a model is packed for this CPU when it is first loaded, and memory-mapped afterward.

    $XDG_CACHE_HOME/fedtune/ready/<hash of folder and kind>/index.json    source files and offsets of the parts
                                                            weights.bin   the parts, aligned to 64 bytes

Mapped weights are available at once, are read page by page on use, are shared between processes, and are evicted when memory is short.
Packing handles one linear at a time, so it needs no more memory than one of them.
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.inference.engine.linear import Linear, linear_from_parts
from fedtune.inference.engine.native.choice import packing
from fedtune.inference.engine.opaque import can_wrap, layout_of, raw_bytes, wrap_bytes
from fedtune.inference.engine.package_writer import as_bytes
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["Place", "open_ready", "place", "write_ready"]

LEAST = 1 << 26  # smallest model, in bytes, for which packing pays off
_ALIGNED = 64
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)}
_FEATURES = (torch.cpu._is_vnni_supported, torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The location of a model's packed weights, which may not exist yet.

    Attributes:
        path: Their folder.
        made_from: Their required source: files with sizes and times, kind, torch version, CPU, packing.
    """

    path: Path
    made_from: dict[str, Any]


def place(folder: Path, kind: str | None, files: Iterable[Path]) -> Place | None:
    """The location for a model folder loaded as `kind`; None if the model is small, or this torch cannot map packed weights."""
    folder = folder.resolve()
    stats = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(files) if file.is_file()]
    if sum(size for _, size, _ in stats) < LEAST or not can_wrap():
        return None
    made_from = {
        "folder": str(folder),
        "files": [list(stat) for stat in stats],
        "kind": kind,
        "torch": torch.__version__,
        "cpu": [platform.machine(), torch.backends.cpu.get_cpu_capability(), *(bool(has()) for has in _FEATURES)],
        "native": packing(),
    }
    key = hashlib.sha256(json.dumps([str(folder), kind]).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Place(cache / "fedtune" / "ready" / key, made_from)


def open_ready(place: Place) -> dict[str, Linear] | None:
    """Map the linears, by name; None if they do not exist or have another source."""
    try:
        index = parse_json(read_text(place.path / "index.json"))
        if index["made_from"] != place.made_from or index["seal"] != _seal(index["linears"], index["layouts"], index["size"]):
            return None
        if (place.path / "weights.bin").stat().st_size != index["size"]:
            return None
        whole = torch.from_file(str(place.path / "weights.bin"), shared=False, size=index["size"], dtype=torch.uint8)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    layouts = [bytes.fromhex(layout) for layout in index["layouts"]]
    return {name: _linear(entry, whole, layouts) for name, entry in index["linears"].items()}


def _linear(entry: Mapping[str, Any], whole: Tensor, layouts: Sequence[bytes]) -> Linear:
    parts = dict[str, Tensor]()
    for name, part in entry["parts"].items():
        memory, dtype = whole.narrow(0, part["at"], part["bytes"]), _DTYPES[part["dtype"]]
        if part["layout"] is None:
            parts[name] = memory.view(dtype).view(part["shape"])
        else:
            parts[name] = wrap_bytes(memory, layouts[part["layout"]], part["shape"], dtype)
    linear = linear_from_parts(entry["kind"], parts, n_in=entry["n_in"], n_out=entry["n_out"], group=entry["group"])
    linear.mapped = whole  # wrapped tensors do not keep their memory alive
    return linear


def write_ready(place: Place, linears: Iterable[tuple[str, Linear]]) -> bool:
    """Write linears to disk, one by one. Returns False, with a warning, if they cannot be written.

    Args:
        linears: Name and linear, each built on demand and freed after writing.
    """
    _forget_the_gone(place.path.parent)
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(place.path, mode=0o700, replace=True, durable=False, shared=True) as folder:
            with open(folder / "weights.bin", "wb") as file:
                index = _written(file, linears)
            body = {"made_from": place.made_from, **index, "seal": _seal(index["linears"], index["layouts"], index["size"])}
            (folder / "index.json").write_text(json.dumps(body), encoding="utf-8")
    except OSError as bad:
        _log.warning(
            "packed weights cannot be written to %s (%s): the model is packed again at each start", place.path.parent, bad.strerror or bad
        )
        return False
    _log.warning("packed the weights for this CPU: %d MB in %s, which later starts reuse", index["size"] >> 20, place.path)
    return True


def _written(file: Any, linears: Iterable[tuple[str, Linear]]) -> dict[str, Any]:
    entries, layouts, at = dict[str, Any](), list[str](), 0
    for name, linear in linears:
        parts = dict[str, Any]()
        for part, tensor in linear.parts.items():
            layout = None
            if tensor.is_mkldnn:
                described = layout_of(tensor).hex()
                if described not in layouts:
                    layouts.append(described)
                layout = layouts.index(described)
            memory = as_bytes(raw_bytes(tensor) if tensor.is_mkldnn else tensor)
            file.write(memory)
            file.write(more := bytes(-len(memory) % _ALIGNED))
            parts[part] = {"at": at, "bytes": len(memory), "dtype": str(tensor.dtype), "shape": list(tensor.shape), "layout": layout}
            at += len(memory) + len(more)
        entries[name] = {"kind": linear.kind, "n_in": linear.n_in, "n_out": linear.n_out, "group": linear.group, "parts": parts}
    return {"linears": entries, "layouts": layouts, "size": at}


def _seal(*values: Any) -> str:
    """A digest of the index: a corrupted layout would make torch read outside the file."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _forget_the_gone(root: Path) -> None:
    """Delete packed weights of deleted model folders, and unfinished ones older than a day."""
    for unfinished in root.glob(".*"):
        if unfinished.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(unfinished, ignore_errors=True)
    for index in root.glob("*/index.json"):
        try:
            gone = not Path(parse_json(read_text(index))["made_from"]["folder"]).exists()
        except (OSError, ValueError, KeyError, TypeError):
            gone = True
        if gone:
            shutil.rmtree(index.parent, ignore_errors=True)
