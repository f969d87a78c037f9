"""Distances between the clients' weight updates ΔW, and Krum's selection by them.

A LoRA module changes W by ΔW = s·B·A, and (B G, G⁻¹ A) gives the same ΔW for every invertible G. Distances between factors depend on this
arbitrary choice of G (the gauge), so an attacker can use G to manipulate a selection by them. Distances between the ΔW need no dense
matrix: ⟨B_i A_i, B_j A_j⟩ = tr((B_jᵀ B_i)(A_i A_jᵀ)).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState


def distances(adapters: Sequence[AdapterState], origin: AdapterState) -> Tensor:
    """Squared distances (K, K) in float64 between K adapters: between the ΔW of LoRA modules, and between all other tensors themselves.

    DoRA's magnitudes count as plain tensors: their effect depends on W0, which the server does not have.

    Args:
        adapters: K adapters of equal shapes.
        origin: The adapters' initial state. It is subtracted from plain tensors, so that large weights do not hide small changes.
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
    """⟨b_i a_i, b_j a_j⟩ (K, K) in float64, for a_k (r_k, in) and b_k (out, r_k).

    Sums the blocks of (bᵀb) ∘ (aaᵀ), both (Σr, Σr), where b and a are the stacked factors.
    """
    left, right = torch.cat([x.double() for x in b], dim=1), torch.cat([x.double() for x in a])
    owner = torch.repeat_interleave(torch.eye(len(a), dtype=torch.float64), torch.tensor([len(x) for x in a]), dim=0)  # (Σr, K)
    return owner.T @ ((left.T @ left) * (right @ right.T)) @ owner


def krum(distances: Tensor, *, malicious: int, select: int) -> list[int]:
    """Indices of the `select` clients with the lowest Krum scores, best first.

    A client's score is the sum of squared distances to its n − f − 2 nearest neighbors. Mutual nearest neighbors have equal scores up to
    rounding errors, so scores are rounded to ten digits, and ties go to the first client.

    Args:
        distances: (n, n), squared.
        malicious: f.
        select: Number of clients; at most n are returned.
    """
    n = len(distances)
    closest = min(max(1, n - malicious - 2), n - 1)
    others = distances.masked_fill(torch.eye(n, dtype=torch.bool), torch.inf)
    scores = others.topk(closest, largest=False).values.sum(1)
    return sorted(range(n), key=lambda i: (float(f"{scores[i]:.9e}"), i))[:select]


def _scaled(adapters: Sequence[AdapterState], module: str) -> list[Tensor]:
    return [x.spec.scaling[module] * x[f"{module}.lora_B"].double() for x in adapters]


def _spread(gram: Tensor) -> Tensor:
    """‖x_i − x_j‖² (K, K) from the inner products, clamped to 0 against rounding."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0.0)
