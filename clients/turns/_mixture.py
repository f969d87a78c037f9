"""Weighted sums of LoRA adapters, exact in their products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState


def mixture(*parts: tuple[float, AdapterState]) -> AdapterState:
    """One adapter with the update Σ c·s·B·A of all parts: A = [A_1; A_2; …], B = [c_1·B_1, c_2·(s_2/s_1)·B_2, …]. Its ranks are sums.

    Tensors that are not factors, such as a head, are summed entry by entry.
    """
    first = parts[0][1]
    factors = {f"{m}.{kind}" for m in first.spec.ranks for kind in ("lora_A", "lora_B")}
    tensors = {n: torch.stack([c * p[n] for c, p in parts]).sum(0) for n in first.tensors if n not in factors}
    for module, scale in first.spec.scaling.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        tensors[a] = torch.cat([p[a] for _, p in parts])
        tensors[b] = torch.cat([c * (p.spec.scaling[module] / scale) * p[b] for c, p in parts], dim=1)
    ranks = {m: sum(p.spec.ranks[m] for _, p in parts) for m in first.spec.ranks}
    return first.replace({n: tensors[n] for n in first.tensors}, ranks=ranks)


def of_first(gradients: Mapping[str, Tensor], first: AdapterState, weight: float) -> dict[str, Tensor]:
    """The gradients of the first part, given those of the mixture; `weight` is its c. Zero elsewhere."""
    out = {}
    for name, gradient in gradients.items():
        module, _, kind = name.rpartition(".")
        rank = first.spec.ranks.get(module, 0)
        if not rank:
            out[name] = weight * gradient
            continue
        out[name] = torch.zeros_like(gradient)
        part = slice(rank) if kind == "lora_A" else (slice(None), slice(rank))
        out[name][part] = gradient[part] if kind == "lora_A" else weight * gradient[part]
    return out


__all__ = ["mixture", "of_first"]
