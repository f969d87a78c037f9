"""Random directions from seeds, the same in every process: zeroth-order methods send seeds in place of tensors."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.contracts.seeds import derive_seed

MOST = 1 << 16  # of FedKSeed's directions; the paper has 4096
# FedKSeed's tensors: coefficients up to the snapshot (K,) and since then (R, K); a client's sums (3, K); weights of the draw (K,)
TOTAL, SINCE, SUMS, CHANCES = "fedkseed.total", "fedkseed.since", "fedkseed.sums", "fedkseed.chances"


def candidate_seeds(seed: int, count: int) -> list[int]:
    """The seeds of FedKSeed's K = `count` directions."""
    return [derive_seed(seed, "fedkseed", j) for j in range(count)]


def direction(seed: int, name: str, shape: Iterable[int]) -> Tensor:
    """z ~ N(0, I) of the tensor `name`, float32 on the CPU: other devices and dtypes draw other numbers.

    On a CPU without AVX2, torch's draws differ in the last bit.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "direction", name))
    return torch.randn(tuple(shape), generator=generator)


def move(tensors: Mapping[str, Tensor], seed: int, by: float) -> None:
    """In place: w ← w + by·z for each tensor, with one z in memory at a time."""
    for name, tensor in tensors.items():
        tensor.add_(direction(seed, name, tensor.shape).to(tensor.device), alpha=by)


def replay(tensors: Mapping[str, Tensor], coefficients: Tensor, seeds: Iterable[int], lr: float) -> dict[str, Tensor]:
    """w − lr·Σ_j a_j·z_j, in the order of j, float32. The same bits for everyone who starts from the same bits.

    Args:
        tensors: w.
        coefficients: a (K,).
        seeds: K seeds.
        lr: η.
    """
    used = [(seed, float(a)) for seed, a in zip(seeds, coefficients.tolist(), strict=True) if a]
    out = {n: t.clone() for n, t in tensors.items()}
    for seed, a in used:
        move(out, seed, -lr * a)
    return out
