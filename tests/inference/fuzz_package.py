"""Damage edge packages in many ways and open them: `python -m tests.inference.fuzz_package COUNT [SEED] [--sanitized]`.

Each damaged package must open and run like an undamaged one, or give a FedtuneError of one sentence, in at most a GB of memory.
Half of the damages leave the digests unchanged, so that the package must not open; the other half have matching digests. In some cases the
packed weights on disk are damaged instead. A second process without torch opens them; `--sanitized` compiles its kernels with
the sanitizers of gcc for addresses and undefined behavior, which end the process at the first access outside a buffer.
"""

import argparse
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.inference.engine import linear, ready
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.native import build
from fedtune.inference.engine.native.library import SETS, VARIABLE, kernels
from fedtune.inference.engine.package import sealed
from tests.inference.sealing import seal_again

MEMORY, LIBRARY = 1 << 30, "kernels.so"
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS = f"detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb={MEMORY >> 20}"


def packages(folder: Path) -> list[Path]:
    """float32 and tied with virtual tokens, int4 and untied, int8 and int4 with a separate adapter."""
    from transformers import Qwen3Config  # lazy, as the imports below: the process that opens packages has no torch

    from fedtune.export.edge import export_edge
    from tests.export.test_huggingface import CAUSAL, make_run
    from tests.models.build import checkpoint, hub, llama_config

    out = []
    for name, settings, method in [
        ("plain", {}, "prompt"),
        ("int4", {"quantize": "int4"}, "prefix"),
        ("int8", {"quantize": "int8", "separate": True}, "lora"),
        ("wide", {"quantize": "int4", "separate": True}, "lora"),
    ]:
        sizes = {"hidden_size": 48, "intermediate_size": 72, "head_dim": 12, "num_hidden_layers": 2}
        sizes = sizes if name == "wide" else {"head_dim": 4, "num_hidden_layers": 1}
        config = llama_config(Qwen3Config, tie_word_embeddings=name == "plain", **sizes)
        run, _ = make_run(folder / f"run-{name}", hub(checkpoint(folder / f"m-{name}", config=config)), CAUSAL, method=method)
        out.append(export_edge(run, folder / name, **settings))
    return out


def use(folder: Path, kind: str | None = None) -> None:
    """Use a package as a server does, with every kind of cache and adapter, and prompts longer than a pass of the small caches."""
    engine = load_engine(folder, kind)
    shape, entries = engine.shape, engine.entries
    ids = engine.text.encode("turn on the light in the kitchen and set the heat to two")
    limit = engine.virtual_length + len(ids) + 2
    small: list[Cache] = [WindowCache(shape, limit, 3, 2, undo=2, dtype=entries)]
    small += [KiviCache(shape, limit, bits, residual=3, group=4, undo=1, dtype=entries) for bits in (2, 8)]
    names = (None, *engine.adapters)
    paged = PagedPool(shape, -(-limit // 4), 4, entries).cache(limit)
    for cache in (engine.cache(limit=limit), paged, *small):
        engine.start(cache)
        for name, part in zip(names, (ids, ids[:1]), strict=False):
            logits = engine.decoder.forward(part, [Span(cache, len(part), adapter=name)])
            assert logits.shape == (1, shape.vocab)
    caches = [engine.cache(limit=limit) for _ in names]
    spans = [Span(cache, len(ids), None, name) for cache, name in zip(caches, names, strict=True)]
    logits = engine.decoder.forward(ids * len(names), spans)
    assert logits.shape == (len(ids) * len(names), shape.vocab)
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


def nest(raw: bytes, rng: random.Random) -> bytes:
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
OF = {".safetensors": [*ANY, long_header, header, header, header, not_finite], ".json": [*ANY, nest, value, value, value]}


def seal_index(folder: Path) -> None:
    """Recompute the digest of the index of packed weights."""
    index = json.loads((folder / "index.json").read_text())
    index["seal"] = ready._seal(index["linears"], index["layouts"], index["size"])
    (folder / "index.json").write_text(json.dumps(index))


def fuzz(count: int, seed: int, roots: Sequence[Path], cache: Path) -> Counter[str]:
    """Damage one file at a time, open the package, and restore it.

    Args:
        count: Number of damages.
        seed: Of the damages.
        roots: Packages.
        cache: Folder for packed weights.

    Raises:
        AssertionError: A package is neither valid nor refused.
    """
    rng, out = random.Random(seed), Counter[str]()
    here = kernels()
    sets = [name for name in SETS if here is not None and here.library.fedtune_supports(SETS.index(name))]
    for i in range(count):
        root, kind, accident = rng.choice(roots), rng.choice((None, None, None, "fp32", "bf16")), rng.random() < 0.5
        os.environ[VARIABLE] = rng.choice(sets) if sets else ""
        ready.LEAST, mapped = (0, rng.random() < 0.5) if rng.random() < 0.4 else (1 << 26, False)
        if mapped:
            use(root, kind)
        files = sorted(f for f in (cache if mapped else root).rglob("*") if f.name in ("index.json", "weights.bin") or f.suffix in OF)
        file = rng.choice(files)
        whole, how = file.read_bytes(), rng.choice(OF.get(file.suffix, ANY))
        damaged = how(whole, rng)
        file.write_bytes(damaged)
        manifest = (root / "package.json").read_bytes()
        case = f"case {i} of seed {seed}, {how.__name__} of {root.name}/{file.name} as {kind} by {os.environ[VARIABLE]}"
        if not accident:
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # the manifest or index itself may be damaged
                (seal_index if mapped else seal_again)(file.parent if mapped else root)
        try:
            use(root, kind)
            assert mapped or not (accident and damaged != whole and sealed(file.name)), f"{case} was not noticed"
            out["opened"] += 1
        except FedtuneError as bad:
            assert "\n" not in str(bad) and len(str(bad)) < 600, f"{case}: {str(bad)[:900]}"
            out["refused"] += 1
        except Exception as bad:
            raise AssertionError(f"{case}: {bad!r:.300}") from bad
        finally:
            if not mapped:
                (root / "package.json").write_bytes(manifest)
                file.write_bytes(whole)
            shutil.rmtree(cache / "fedtune", ignore_errors=True)
    return out


weights_of = linear.weights_of


def weights_apart(parts: dict[str, Any], *rest: Any) -> Any:
    """`weights_of` on copies: the sanitizers detect reads beyond an allocation, but not beyond a part of a mapped file."""
    parts.update({name: part.copy() for name, part in parts.items()})
    return weights_of(parts, *rest)


def open_damaged(args: argparse.Namespace, folder: Path) -> None:
    """Open the damaged packages; the second process runs this."""
    sys.modules["torch"] = None  # pyright: ignore
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    roots = sorted(file.parent for file in folder.glob("*/package.json"))
    if args.sanitized:
        build.LIBRARY = folder / LIBRARY
        linear.weights_of = weights_apart
    for root in roots:
        use(root)
    if args.sanitized:
        assert (native := kernels()) is not None and native.library._name == str(build.LIBRARY)
    else:
        held = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
        most = int(held) * 1024 + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps(fuzz(args.count, args.seed, roots, folder / "cache")))


def build_sanitized(library: Path) -> dict[str, str]:
    """Compile the kernels with sanitizers. Returns the environment of a process that opens them."""
    os.environ["CC"] = "gcc"
    build.build(library, SANITIZERS)
    more = {"LD_PRELOAD": sanitizer() or "", "ASAN_OPTIONS": OPTIONS, "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "2"}
    return os.environ | more


def sanitizer() -> str | None:
    """gcc's library that must be loaded first; None if there is none."""
    if not shutil.which("gcc"):
        return None
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(found).is_absolute() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--sanitized", action="store_true")
    parser.add_argument("--folder", type=Path, help="open the packages in this folder")
    args = parser.parse_args()
    if args.folder:
        open_damaged(args, args.folder)
        return 0
    with tempfile.TemporaryDirectory() as made:
        packages(Path(made))
        environment = build_sanitized(Path(made) / LIBRARY) if args.sanitized else dict(os.environ)
        command = [sys.executable, "-m", "tests.inference.fuzz_package", *sys.argv[1:], "--folder", made]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
