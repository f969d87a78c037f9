"""LoftQ: initialize an adapter with the quantization error of the backbone.

    R = W − Q(W) ≈ U_r Σ_r V_rᵀ,   A = √Σ_r V_rᵀ / √s,   B = U_r √Σ_r / √s,   so that s·B·A is the best rank-r approximation of R

This is one step of the paper's alternation, like PEFT's default. The frozen weights stay Q(W), so all methods, clients and initializations
share one quantized backbone with one cache entry. Further steps would quantize W − s·B·A instead, which needs different frozen weights for
each rank, scaling and set of targets.

PEFT's implementation needs CUDA. Here the checkpoint is read one layer at a time, so that the full-precision model is never in memory. All
arithmetic is on the CPU in float64, so that server and clients get the same factors.

Source: Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv:2310.08659, algorithm 1 with T = 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedtune.config import ModelConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models.backbone import build_config, empty_model, full_tensors, load_backbone
from fedtune.models.checkpoint import find_folder

__all__ = ["factors", "make_up"]


def make_up(drawn: AdapterState, model: ModelConfig, task: TaskConfig, *, num_labels: int, seed: int) -> AdapterState:
    """The adapter whose product approximates the quantization error, within its ranks.

    Layers that are not quantized keep the drawn A and B = 0.

    Args:
        drawn: LoRA's default initialization, with its ranks and scaling.
        model: A model of precision nf4 or int8 whose weights are available.
        task: The run's task.
        num_labels: Number of classes (classification only).
        seed: The run's seed.

    Raises:
        ModelError: See `load_backbone`; the weight names in the checkpoint differ from the model's; or no adapted layer is quantized.
    """
    from fedtune.models.quantize import is_quantized, weight_of  # imported late, because it loads bitsandbytes

    here = dataclasses.replace(model, device="cpu")
    coarse = load_backbone(here, task, num_labels=num_labels, seed=seed).model
    folder = find_folder(here)
    hf_config = build_config(here, task, num_labels=num_labels, folder=folder)
    full = full_tensors(here, task, hf_config, folder, seed, torch.float32)
    bare = dict(empty_model(hf_config, task, trust_remote_code=model.trust_remote_code).named_modules())
    modules, tensors = dict(coarse.named_modules()), dict(drawn.tensors)
    quantized = [m for m in drawn.spec.ranks if is_quantized(modules[m])]
    if not quantized:
        raise ModelError(
            f"peft.init=loftq: none of the adapted layers is quantized with model.precision={model.precision}: take peft.init=default"
        )
    for module in quantized:
        names = f"{module}.lora_A", f"{module}.lora_B"
        approximate = weight_of(modules[module]).double()
        exact = _stored(full, module, coarse.base_model_prefix)
        if exact is not None and isinstance(bare[module], Conv1D):  # Conv1D stores (in, out); the quantized layer is (out, in)
            exact = exact.T
        if exact is None or exact.shape != approximate.shape:
            raise ModelError(
                f"peft.init=loftq needs the weight of '{module}', but {folder} has none of that name and shape: take peft.init=default"
            )
        a, b = factors(exact - approximate, drawn[names[0]].double(), drawn.spec.scaling[module])
        tensors |= {n: t.to(drawn[n].dtype) for n, t in zip(names, (a, b), strict=True)}
    return drawn.replace(tensors)


def factors(residual: Tensor, start: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s·B·A = SVD_r(R), balanced: each has the factor √σ for every direction.

    Args:
        residual: R (out, in), float64.
        start: LoRA's initial A (r, in). Beyond R's rank, A keeps its rows and B is 0: if A were 0 too, both gradients would vanish.
        scaling: s.
    """
    rank = len(start)
    # Uses the smaller of R·Rᵀ and Rᵀ·R (eigenvalues σ²), several times faster than an SVD of R; U_r·U_rᵀ·R is SVD_r(R)
    wide = residual.shape[0] <= residual.shape[1]
    r = residual if wide else residual.T
    values, vectors = torch.linalg.eigh(r @ r.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]  # by descending σ
    known = int((values > values[0].clamp(min=torch.finfo(r.dtype).tiny) * len(r) * torch.finfo(r.dtype).eps).sum())
    sigma, vectors = values[:known].sqrt(), vectors[:, :known]
    # Signs are arbitrary; here the largest entry of each vector is positive, so that runs are reproducible
    vectors = vectors * torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    near = vectors * (sigma / scaling).sqrt()  # (rows of r, known)
    far = (vectors.T @ r) / (sigma * scaling).sqrt()[:, None]  # (known, columns of r)
    a, b = start.clone(), start.new_zeros(len(residual), rank)
    a[:known], b[:, :known] = (far, near) if wide else (near.T, far.T)
    return a, b


def _stored(full: Mapping[str, Any], module: str, prefix: str) -> Tensor | None:
    """The stored weight. A base model's checkpoint lacks the model's prefix; the checkpoint of a model with another head may have it."""
    for name in (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"):
        if (found := full.get(f"{name}.weight")) is not None:
            return cast(Tensor, found[...]).double()
    return None
