"""Packed weights on disk: a model is packed for this CPU when it is first loaded, and memory-mapped afterward.

    $XDG_CACHE_HOME/fedtune/ready/<hash of folder and kind>/index.json    source files and offsets of the parts
                                                            weights.bin   the parts, aligned to 64 bytes

Mapped weights are available at once, are read page by page on use, are shared between processes, and are evicted when memory is short.
Packing handles one linear at a time, so it needs no more memory than one of them.
"""

import hashlib
import importlib.metadata
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

import numpy as np

from fedtune.errors import ModelError
from fedtune.inference.engine.aligned import ALIGNED
from fedtune.inference.engine.bfloat16 import Array
from fedtune.inference.engine.linear import KINDS, Linear, Native
from fedtune.inference.engine.make_linear import linear_from_parts
from fedtune.inference.engine.native.choice import cpu_features, packing
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["Place", "open_ready", "place", "write_ready"]

LEAST = 1 << 26  # smallest model, in bytes, for which packing pays off
_DTYPES = {str(dtype): dtype for dtype in map(np.dtype, ("f4", "u2", "i1", "u1"))}
_log = logging.getLogger(__name__)


class _CannotMap(Exception):
    """This torch cannot map packed weights."""


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
    """The location for a model folder loaded as `kind`; None if the model is small."""
    folder = folder.resolve()
    stats = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(files) if file.is_file()]
    if sum(size for _, size, _ in stats) < LEAST:
        return None
    native = packing()
    made_from = {
        "folder": str(folder),
        "files": [list(stat) for stat in stats],
        "kind": kind,
        "torch": "" if len(native) == len(KINDS) else _torch_version(),  # where all parts are native, torch does not matter
        "cpu": [platform.machine(), *sorted(cpu_features())],
        "native": native,
    }
    key = hashlib.sha256(json.dumps([str(folder), kind]).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Place(cache / "fedtune" / "ready" / key, made_from)


def open_ready(place: Place) -> dict[str, Linear] | None:
    """Map the linears, by name; None if they do not exist, are damaged or have another source."""
    try:
        index = parse_json(read_text(place.path / "index.json"))
        if index["made_from"] != place.made_from or index["seal"] != _seal(index["linears"], index["layouts"], index["size"]):
            return None
        if (place.path / "weights.bin").stat().st_size != index["size"]:
            return None
        whole = np.asarray(np.memmap(place.path / "weights.bin", np.uint8, "c", shape=(index["size"],)))
        layouts = [bytes.fromhex(layout) for layout in index["layouts"]]
        return {name: _linear(entry, whole, layouts) for name, entry in index["linears"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError, ModelError):
        return None


def _linear(entry: Mapping[str, Any], whole: Array, layouts: Sequence[bytes]) -> Linear:
    parts = dict[str, Any]()
    for name, part in entry["parts"].items():
        if part["at"] % ALIGNED:
            raise ValueError
        memory = whole[part["at"] : part["at"] + part["bytes"]]
        if part["layout"] is None:
            parts[name] = memory.view(_DTYPES[part["dtype"]]).reshape(part["shape"])
        else:
            from fedtune.inference.engine.reference.opaque import wrap_array  # lazy: it loads torch

            parts[name] = wrap_array(memory, layouts[part["layout"]], part["shape"], part["dtype"])
    linear = linear_from_parts(entry["kind"], parts, n_in=entry["n_in"], n_out=entry["n_out"], group=entry["group"])
    linear.mapped = whole  # wrapped tensors do not keep their memory alive
    return linear


def write_ready(place: Place, linears: Iterable[tuple[str, Linear]]) -> bool:
    """Write linears to disk, one by one. Returns False if they cannot be written: with a warning, or because this torch cannot map
    its packed weights.

    Args:
        linears: Name and linear, each built on demand and freed after writing.
    """
    _delete_stale(place.path.parent)
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(place.path, mode=0o700, replace=True, durable=False, shared=True) as folder:
            with open(folder / "weights.bin", "wb") as file:
                index = _written(file, linears)
            body = {"made_from": place.made_from, **index, "seal": _seal(index["linears"], index["layouts"], index["size"])}
            (folder / "index.json").write_text(json.dumps(body), encoding="utf-8")
    except _CannotMap:
        return False
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
        for part, (array, dtype, shape, described) in _arrays(linear).items():
            layout = None
            if described is not None:
                if described.hex() not in layouts:
                    layouts.append(described.hex())
                layout = layouts.index(described.hex())
            memory = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            file.write(memory)
            file.write(more := bytes(-len(memory) % ALIGNED))
            parts[part] = {"at": at, "bytes": len(memory), "dtype": dtype, "shape": list(shape), "layout": layout}
            at += len(memory) + len(more)
        entries[name] = {"kind": linear.kind, "n_in": linear.n_in, "n_out": linear.n_out, "group": linear.group, "parts": parts}
    return {"linears": entries, "layouts": layouts, "size": at}


def _arrays(linear: Linear) -> dict[str, tuple[Array, str, tuple[int, ...], bytes | None]]:
    """A linear's parts as arrays, with dtype, shape and oneDNN's layout of opaque ones."""
    if isinstance(linear, Native):
        return {name: (array, str(array.dtype), array.shape, None) for name, array in linear.parts.items()}
    from fedtune.inference.engine.reference.opaque import can_wrap, opaque_part  # lazy: it loads torch

    if not can_wrap():
        raise _CannotMap
    return {name: opaque_part(part) for name, part in linear.parts.items()}


def _torch_version() -> str:
    """The version of torch, without loading it; "" if it is not installed."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _seal(*values: Any) -> str:
    """A digest of the index: a corrupted layout would make torch or native code read outside the file."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _delete_stale(root: Path) -> None:
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
