"""Damage edge packages in many ways and open them: `python -m tests.inference.fuzz_package COUNT [SEED]`.

Each must open and run as a whole model does, or be refused by a FedtuneError of one sentence; the process may not take more than a GB.
Half of them are damaged by accident, so that what the export has sealed must not open; the other half have digests that fit.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.export.edge import export_edge
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import sealed
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.sealing import seal_again
from tests.models.build import checkpoint, hub, llama_config

MEMORY = 1 << 30


def packages(folder: Path) -> list[Path]:
    """float32 and tied with virtual tokens, int4 and untied, int8 with a separate adapter."""
    from transformers import Qwen3Config

    out = []
    for name, settings, method in [
        ("plain", {}, "prompt"),
        ("int4", {"quantize": "int4"}, "prefix"),
        ("int8", {"quantize": "int8"}, "lora"),
    ]:
        config = llama_config(Qwen3Config, head_dim=4, tie_word_embeddings=name == "plain", num_hidden_layers=1)
        run, _ = make_run(folder / f"run-{name}", hub(checkpoint(folder / f"m-{name}", config=config)), CAUSAL, method=method)
        out.append(export_edge(run, folder / name, separate=name == "int8", **settings))
    return out


def use(folder: Path) -> None:
    """Use a package as a server does."""
    engine = load_engine(folder)
    ids = engine.text.encode("turn on the light")
    cache = engine.cache(limit=engine.virtual_length + len(ids) + 1)
    engine.start(cache)
    for name in (None, *engine.adapters):
        with torch.inference_mode():
            logits = engine.decoder.forward(torch.tensor(ids[:2]), [Span(cache, min(2, len(ids)), adapter=name)])
        cache.crop(engine.virtual_length)
    assert logits.shape == (1, engine.shape.vocab)
    engine.text.decode(ids)


# -- damages: (bytes of a file, generator) → other bytes ----------------------------------------------------------------------------------


def flip(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 40))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_early(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    out[rng.randrange(min(len(out), 300))] = rng.randrange(256)
    return bytes(out)


def truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice((0, 1, 7, 8, rng.randrange(len(raw)), len(raw) - 1))]


def extend(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.randbytes(rng.choice((1, 8, 4096)))


def long_header(raw: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice((2**63, 2**40, 2**31, 2**26, len(raw), len(raw) - 8, 0, 1))) + raw[8:]


def header(raw: bytes, rng: random.Random) -> bytes:
    """Swap names, change a dtype, a shape or an offset, delete a tensor, or nest deeply."""
    (length,) = struct.unpack("<Q", raw[:8])
    document, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [n for n in document if n != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    how = rng.randrange(7)
    if how == 0:
        document[a], document[b] = document[b], document[a]
    elif how == 1:
        document[a]["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "X", None, 3))
    elif how == 2:
        document[a]["shape"] = rng.choice(([], [0], [2**40, 2**40], [-1], document[b]["shape"], document[a]["shape"][::-1], "x", [1.5]))
    elif how == 3:
        document[a]["data_offsets"] = rng.choice(([0, 2**60], [5, 3], [0, 0], document[b]["data_offsets"], [-4, 0], None))
    elif how == 4:
        del document[a]
    elif how == 5:
        document[f"{a}.x"] = document.pop(a)
    text = json.dumps(document)
    if how == 6:
        text = text[:-1] + ', "deep": ' + "[" * rng.choice((50, 5000, 200_000)) + "}"
    return struct.pack("<Q", len(text)) + text.encode() + data


def not_finite(raw: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    out, at = bytearray(raw), 8 + length
    if len(out) - at >= 4:
        place = at + rng.randrange((len(out) - at) // 4) * 4
        out[place : place + 4] = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff" * 4, b"\x00\x00\x80\x7f"))
    return bytes(out)


def nested(raw: bytes, rng: random.Random) -> bytes:
    n = rng.choice((100, 5000, 300_000))
    return (rng.choice(("[", '{"a":')) * n).encode()


def value(raw: bytes, rng: random.Random) -> bytes:
    """Change a value in a JSON file."""
    document = json.loads(raw)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(document)
    if places:
        node, key = rng.choice(places)
        odd = (None, -1, 0, 1, 3, 2**31 - 1, 2**70, 1e308, float("nan"), "", "x" * 9, "\x00", [], {}, [[]], True, {"type": "BPE"})
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(odd)
    return json.dumps(document).encode()


ANY: list[Callable[[bytes, random.Random], bytes]] = [flip, flip_early, truncate, extend]
OF = {".safetensors": [*ANY, long_header, header, header, header, not_finite], ".json": [*ANY, nested, value, value, value]}


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Damage one file at a time, open the package, and restore it. Raises AssertionError if a package is neither valid nor refused."""
    rng, out = random.Random(seed), Counter[str]()
    files = [f for p in packages(folder) for f in sorted(p.rglob("*")) if f.suffix in OF]
    roots = {f: next(p for p in f.parents if (p / "package.json").is_file()) for f in files}
    for root in set(roots.values()):
        use(root)
    for i in range(count):
        file = rng.choice(files)
        whole, how = file.read_bytes(), rng.choice(OF[file.suffix])
        damaged = how(whole, rng)
        file.write_bytes(damaged)
        manifest = (roots[file] / "package.json").read_bytes()
        accident = rng.random() < 0.5
        if not accident:
            with suppress(ValueError, TypeError, RecursionError):  # of a manifest that was damaged itself
                seal_again(roots[file])
        try:
            use(roots[file])
            assert not (accident and damaged != whole and sealed(file.name)), f"case {i}: {how.__name__} of {file.name} was not noticed"
            out["opened"] += 1
        except FedtuneError as bad:
            assert "\n" not in str(bad) and len(str(bad)) < 600, f"case {i}, {how.__name__} of {file.name}: {str(bad)[:900]}"
            out["refused"] += 1
        except Exception as bad:
            shutil.copyfile(file, folder / f"case-{i}-{file.name}")
            raise AssertionError(f"case {i} of seed {seed}, {how.__name__} of {roots[file].name}/{file.name}: {bad!r:.300}") from bad
        finally:
            if not accident:
                (roots[file] / "package.json").write_bytes(manifest)
            file.write_bytes(whole)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        packages(Path(made) / "warm")  # whatever is loaded late
        held = (
            int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))) * 1024
        )
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(made))))
