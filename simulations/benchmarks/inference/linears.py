"""Time of a Llama's linear layers by the native kernels and by torch, one beside the other.

    python -m fedtune.simulations.benchmarks.inference.linears --threads 1

The layers are those of one block of the 0.4 B model of `models.py`, repeated so that a pass reads more than the caches hold. Passes of
torch and of each instruction set alternate, so that other work on the machine slows all of them: quote the ratios. A figure is the lower
quartile of the passes.
"""

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from unittest.mock import patch

import torch

from fedtune.inference.engine.linear import Linear, portable
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.native.library import SETS, VARIABLE
from fedtune.inference.engine.reference.linears import apply
from fedtune.simulations.studies.real import hardware

SHAPES = ((1152, 896), (896, 896), (9728, 896), (896, 4864))  # N and K of qkv, o, gate and up, down
ROWS = (1, 4, 8, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=("int4", "int8", "bf16"), default=["int4", "int8", "bf16"])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["avx512", "avx2"], help="instruction sets (default: avx512 avx2)")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of four layers (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=20, help="passes of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"{hardware()}; {args.threads} threads, {args.passes} passes in turn\n",
        "| | rows | ms by torch | times as fast |",
        "|---|---|---|---|",
    ]
    for kind in args.kinds:
        sides = {"off": layers(kind, args.blocks, "off"), **{name: layers(kind, args.blocks, name) for name in args.sets}}
        for rows in ROWS:
            seconds = measure(sides, rows, args.passes)
            ratios = ", ".join(f"{name} {seconds['off'] / seconds[name]:.2f}" for name in args.sets)
            lines.append(f"| {kind} | {rows} | {1000 * seconds['off']:.2f} | {ratios} |")
    print("\n".join(lines))


def layers(kind: str, blocks: int, choice: str) -> list[Linear]:
    """The layers, packed for a value of FEDTUNE_NATIVE."""
    torch.manual_seed(0)
    with patch.dict(os.environ, {VARIABLE: choice}):
        assert choice == "off" or why_torch(kind) is None
        return [linear_from_tensors(kind, portable(kind, torch.randn(n, k).numpy()), n_in=k) for _ in range(blocks) for n, k in SHAPES]


def measure(sides: Mapping[str, Sequence[Linear]], rows: int, passes: int) -> dict[str, float]:
    """Seconds of a pass over the layers by each side: the lower quartile, after a pass that warms up."""
    x = {k: torch.randn(rows, k) for _, k in SHAPES}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(passes + 1):
        for name, linears in sides.items():
            start = time.perf_counter()
            for linear in linears:
                apply(linear, x[linear.n_in])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.quantiles(took[1:], n=4)[0] for name, took in seconds.items()}


if __name__ == "__main__":
    main()
