"""Where the time of a prefill goes: for each step, its milliseconds, its share of the pass, and its share of the CPU's peak speed.

    python -m fedtune.simulations.benchmarks.inference.steps --models FOLDER

It builds the kernels with FEDTUNE_STEPS in a temporary folder. A figure is the median of the passes' CPU time, with one thread. The peak
is that of AVX-512 instructions that only use registers, measured at the start: 8-bit dot products of 64 numbers for the linear layers,
fused multiply-adds of 16 numbers for attention.
"""

import argparse
import ctypes
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.native import build
from fedtune.inference.engine.native.library import kernels
from fedtune.inference.engine.shape import Shape
from fedtune.inference.engine.threads import set_threads
from fedtune.simulations.benchmarks.inference.models import SIZES, VOCABULARY, package
from fedtune.simulations.benchmarks.inference.models import build as model
from fedtune.simulations.studies.real import hardware

STEPS = (  # numbered as in pass.c
    "around the steps, in Python and C", "norms", "qkv", "rotary embedding, cache", "attention", "o", "gate and up", "activation", "down",
    "head, of the last row",
)  # fmt: skip
PEAK = """
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
#define ONE(i, n) i " %%zmm30, %%zmm31, %%zmm" #n "\\n"
#define FOUR(i, a, b, c, d) ONE(i, a) ONE(i, b) ONE(i, c) ONE(i, d)
#define RATE(name, i) double name(void) { \\
    double least = 1; \\
    for (int k = 0; k < 20; k++) { \\
        double start = now(), took; \\
        for (int n = 0; n < 100000; n++) __asm__ volatile(FOUR(i, 0, 1, 2, 3) FOUR(i, 4, 5, 6, 7) FOUR(i, 8, 9, 10, 11) ::: "memory"); \\
        took = now() - start, least = took < least ? took : least; \\
    } \\
    return 12e5 / least; \\
}
RATE(dots, "vpdpbusd") RATE(sums, "vfmadd231ps")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["125m", "0.4b"], help="models (default: 125m 0.4b)")
    parser.add_argument("--kinds", nargs="+", choices=("int4", "int8"), default=["int4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[128, 512], help="tokens in a prefill (default: 128 512)")
    parser.add_argument("--passes", type=int, default=9, help="timed passes per model, kind and length (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("outputs/bench-inference"), help="folder for the models (default: %(default)s)")
    args = parser.parse_args()
    print(f"{hardware()}; one thread, {args.passes} passes")
    set_threads(1)  # of the kernels and of torch
    with tempfile.TemporaryDirectory() as folder:
        build.LIBRARY = Path(folder) / "kernels.so"
        build.build(build.LIBRARY, ["-DFEDTUNE_STEPS"])
        if (found := kernels()) is None or found.instructions != "avx512":
            raise SystemExit("needs the AVX-512 kernels, but this CPU lacks them or FEDTUNE_NATIVE chooses others")
        seconds = (ctypes.c_double * len(STEPS)).in_dll(ctypes.CDLL(str(build.LIBRARY)), "fedtune_steps")
        dots, sums = rates(Path(folder))
        print(f"{dots / 1e9:.1f} billion 512-bit dot products and {sums / 1e9:.1f} billion multiply-adds a second")
        for size in args.sizes:
            head, rows = [size], [[step] for step in (*STEPS, "all")]
            for kind in args.kinds:
                engine = load_engine(package(model(size, args.models), kind))
                for n in args.rows:
                    head.append(f"{kind}, {n} tokens")
                    took, wanted = measure(engine, n, args.passes, seconds), work(engine.decoder.shape, n)
                    for row in rows:
                        most = 16 * sums if row[0] == "attention" else 64 * dots
                        used = f", {wanted[row[0]] / most / took[row[0]]:.0%}" if row[0] in wanted else ""
                        row.append(f"{1000 * took[row[0]]:.1f}, {took[row[0]] / took['all']:.0%}{used}")
            print("", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), sep="\n", flush=True)


def rates(folder: Path) -> tuple[float, float]:
    """Dot products and fused multiply-adds that one thread executes in a second."""
    (folder / "peak.c").write_text(PEAK)
    command = [*(build.compiler() or ["cc"]), "-O2", "-fPIC", "-shared", str(folder / "peak.c"), "-o", str(folder / "peak.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "peak.so"))
    library.dots.restype = library.sums.restype = ctypes.c_double
    return library.dots(), library.sums()


def work(shape: Shape, rows: int) -> dict[str, float]:
    """Multiplications of the linear layers and of attention, for a prefill of `rows` tokens."""
    width, each = shape.heads * shape.head_dim, shape.layers * rows * shape.hidden
    return {
        "qkv": each * (width + 2 * shape.kv_heads * shape.head_dim), "o": each * width, "gate and up": each * 2 * shape.intermediate,
        "down": each * shape.intermediate, "attention": shape.layers * width * rows * (rows + 1),
    }  # fmt: skip


def measure(engine: Engine, rows: int, passes: int, seconds: "ctypes.Array[ctypes.c_double]") -> dict[str, float]:
    """Median CPU seconds of each step of a prefill, and of the whole pass, "all"."""
    took: dict[str, list[float]] = {step: [] for step in (*STEPS, "all")}
    for i in range(passes + 1):
        ids = [random.Random(i).randrange(1, VOCABULARY) for _ in range(rows)]
        before, start = list(seconds), time.thread_time()
        cache = engine.cache(limit=rows)
        engine.decoder.forward(ids, [Span(cache, rows)])
        whole = time.thread_time() - start
        steps = [now - then for now, then in zip(seconds, before, strict=True)]
        steps[0] = whole - sum(steps[1:])
        for step, value in zip(took, [*steps, whole], strict=True):
            took[step].append(value)
    return {step: statistics.median(values[1:]) for step, values in took.items()}


if __name__ == "__main__":
    main()
