"""Packed weights on the disk: a model is packed for this CPU when it is first opened, and mapped from then on.

    $XDG_CACHE_HOME/fedtune/ready/<of folder and kind>/index.json    what it was made from, and where each part lies
                                                       weights.bin   the parts, each at a multiple of 64 bytes

Mapped weights are there at once, come into memory page by page as they are used, are shared by the processes that use them, and go again
where memory is short, for they are on the disk already. Packing goes linear by linear, so it takes no more memory than one of them.
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

from fedtune.inference.engine.linear import CLASSES, Linear
from fedtune.inference.engine.opaque import can_wrap, layout_of, raw_bytes, wrap_bytes
from fedtune.inference.engine.package_writer import as_bytes
from fedtune.storage.atomic import new_folder
from fedtune.storage.parsing import parse_json, read_text

__all__ = ["Place", "open_ready", "place", "write_ready"]

LEAST = 1 << 26  # bytes of a model's files from which it pays
_ALIGNED = 64
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)}
_FEATURES = (torch.cpu._is_vnni_supported, torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a model's packed weights lie, or would.

    Attributes:
        path: Their folder.
        made_from: What they must have been made from: files with sizes and times, kind, torch, CPU.
    """

    path: Path
    made_from: dict[str, Any]


def place(folder: Path, kind: str | None, files: Iterable[Path]) -> Place | None:
    """Of a model folder that is opened as `kind`; None where it is too small to matter, or this torch cannot map packed weights."""
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
    }
    key = hashlib.sha256(json.dumps([str(folder), kind]).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Place(cache / "fedtune" / "ready" / key, made_from)


def open_ready(place: Place) -> dict[str, Linear] | None:
    """The linears by name, mapped; None where they were not made yet, or from something else."""
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
    return {name: _linear(said, whole, layouts) for name, said in index["linears"].items()}


def _linear(said: Mapping[str, Any], whole: Tensor, layouts: Sequence[bytes]) -> Linear:
    parts = dict[str, Tensor]()
    for name, part in said["parts"].items():
        memory, dtype = whole.narrow(0, part["at"], part["bytes"]), _DTYPES[part["dtype"]]
        if part["layout"] is None:
            parts[name] = memory.view(dtype).view(part["shape"])
        else:
            parts[name] = wrap_bytes(memory, layouts[part["layout"]], part["shape"], dtype)
    made = CLASSES[said["kind"]](parts, n_in=said["n_in"], n_out=said["n_out"], group=said["group"])
    made.mapped = whole  # what is wrapped does not hold on to its memory
    return made


def write_ready(place: Place, linears: Iterable[tuple[str, Linear]]) -> bool:
    """Keep them, one after the other; False, with a warning, where the disk does not take them.

    Args:
        linears: Name and linear, each made when it is asked for and let go when it is written.
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
        _log.warning("%s takes no packed weights (%s): the model is packed anew at each start", place.path.parent, bad.strerror or bad)
        return False
    _log.warning("packed for this CPU once: %d MB in %s, which later starts map", index["size"] >> 20, place.path)
    return True


def _written(file: Any, linears: Iterable[tuple[str, Linear]]) -> dict[str, Any]:
    said, layouts, at = dict[str, Any](), list[str](), 0
    for name, made in linears:
        parts = dict[str, Any]()
        for part, tensor in made.parts.items():
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
        said[name] = {"kind": made.kind, "n_in": made.n_in, "n_out": made.n_out, "group": made.group, "parts": parts}
    return {"linears": said, "layouts": layouts, "size": at}


def _seal(*said: Any) -> str:
    """A layout that a failing disk has changed would be followed out of the file."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _forget_the_gone(root: Path) -> None:
    """Take away what was made from folders that are no more, and what was not finished a day ago."""
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
