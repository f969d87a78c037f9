"""How far apart clients are in what their adapters do, and who is closest to the others.

A LoRA module does ΔW = s·B·A, and (B G, G⁻¹ A) does the same for every invertible G: distances between factors are distances between
arbitrary coordinates, and a rule that selects by them can be steered by G. Distances between the ΔW need no dense matrix:
⟨B_i A_i, B_j A_j⟩ = tr((B_jᵀ B_i)(A_i A_jᵀ)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState


def distances(adapters: Sequence[AdapterState], origin: AdapterState) -> Tensor:
    """Squared distances (K, K) in float64 between K adapters: of ΔW for each LoRA module, of the tensors themselves for everything else.

    DoRA's magnitudes count as tensors: what they do hangs on W0, which the server does not have.

    Args:
        adapters: Of one shape.
        origin: The state that they started from. Plain tensors are compared as changes of it, so that small changes of large weights count.
    """
    names, count = origin.tensors, len(adapters)
    modules = [m for m in origin.spec.ranks if f"{m}.lora_A" in names and f"{m}.lora_B" in names]
    total = torch.zeros(count, count, dtype=torch.float64)
    for module in modules:
        total += _spread(products([x[f"{module}.lora_A"] for x in adapters], _scaled(adapters, module)))
    factors = {f"{m}.{f}" for m in modules for f in ("lora_A", "lora_B")}
    for name in (n for n in names if n not in factors):
        moved = torch.stack([(x[name].double() - origin[name].double()).flatten() for x in adapters])  # (K, P)
        total += _spread(moved @ moved.T)
    return total


def products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨b_i a_i, b_j a_j⟩ (K, K) in float64, of a_k (r_k, in) and b_k (out, r_k): sums over the blocks of (bᵀb) ∘ (aaᵀ), both (Σr, Σr)."""
    left, right = torch.cat([x.double() for x in b], dim=1), torch.cat([x.double() for x in a])
    owner = torch.repeat_interleave(torch.eye(len(a), dtype=torch.float64), torch.tensor([len(x) for x in a]), dim=0)  # (Σr, K)
    return owner.T @ ((left.T @ left) * (right @ right.T)) @ owner


def krum(distances: Tensor, *, malicious: int, select: int) -> list[int]:
    """Positions of the `select` clients with the least Krum score, best first: the sum of squared distances to the n − f − 2 closest
    others.

    Two that are each other's closest have equal scores but for rounding: scores count to nine digits, and the first of equals wins.

    Args:
        distances: (n, n), squared.
        malicious: f.
        select: How many; all where there are fewer.
    """
    n = len(distances)
    closest = min(max(1, n - malicious - 2), n - 1)
    others = distances.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    scores = others.topk(closest, largest=False).values.sum(1)
    return sorted(range(n), key=lambda i: (float(f"{scores[i]:.9e}"), i))[:select]


def _scaled(adapters: Sequence[AdapterState], module: str) -> list[Tensor]:
    return [x.spec.scaling[module] * x[f"{module}.lora_B"].double() for x in adapters]


def _spread(gram: Tensor) -> Tensor:
    """‖x_i − x_j‖² (K, K) from the inner products; rounding must not make it negative."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0.0)
