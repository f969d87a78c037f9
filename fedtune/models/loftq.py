"""LoftQ: an adapter that starts as what quantization took from the backbone.

    R = W − Q(W) ≈ U_r Σ_r V_rᵀ,   A = √Σ_r V_rᵀ / √s,   B = U_r √Σ_r / √s,   so that Q(W) + s·B·A is the nearest to W of its rank

One step of the paper's alternation, which is PEFT's default too: the frozen weights stay Q(W), so that one quantized backbone, and its
entry in the cache, serves every method, every client and every start. Each further step would quantize W − s·B·A instead: other frozen
weights, to be made and kept for each rank, scaling and set of targets.

PEFT's own needs CUDA. Here the checkpoint is read one layer at a time, so that the full-precision model is never in memory, and everything
is computed on the CPU in float64, so that the server and every client come to the same factors.

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
    """The adapter that makes up for what quantization took, as far as its ranks go.

    Layers that are left whole lose nothing: they keep what was drawn, B = 0.

    Args:
        drawn: LoRA as it starts otherwise, with its ranks and scaling.
        model: Of precision nf4 or int8; its weights must be at hand.
        task: Of the run.
        num_labels: Classes (classification only).
        seed: The run's.

    Raises:
        ModelError: As `load_backbone`; the checkpoint names its weights otherwise than the model; no layer that is adapted is quantized.
    """
    from fedtune.models.quantize import is_quantized, weight_of  # late: it loads bitsandbytes

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
            f"peft.init=loftq: none of the layers that are adapted is quantized with model.precision={model.precision}:"
            " take peft.init=default"
        )
    for module in quantized:
        names = f"{module}.lora_A", f"{module}.lora_B"
        approximate = weight_of(modules[module]).double()
        exact = _stored(full, module, coarse.base_model_prefix)
        if exact is not None and isinstance(bare[module], Conv1D):  # GPT-2's layers store (in, out), until they are quantized
            exact = exact.T
        if exact is None or exact.shape != approximate.shape:
            raise ModelError(
                f"peft.init=loftq reads the weight of '{module}' from {folder}, which has none of that name and shape:"
                " take peft.init=default"
            )
        a, b = factors(exact - approximate, drawn[names[0]].double(), drawn.spec.scaling[module])
        tensors |= {n: t.to(drawn[n].dtype) for n, t in zip(names, (a, b), strict=True)}
    return drawn.replace(tensors)


def factors(residual: Tensor, start: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s·B·A = SVD_r(R), and both of one size: each has √σ of every direction.

    Args:
        residual: R (out, in), float64.
        start: A (r, in) as LoRA draws it. Directions in which R has nothing keep its rows, with B = 0: with A = 0 too they would have no
            gradient for ever.
        scaling: s.
    """
    rank = len(start)
    # From the smaller of R·Rᵀ and Rᵀ·R, several times quicker than an SVD of R: its eigenvalues are σ², and U_r·U_rᵀ·R is SVD_r(R)
    wide = residual.shape[0] <= residual.shape[1]
    r = residual if wide else residual.T
    values, vectors = torch.linalg.eigh(r @ r.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]  # by falling σ
    known = int((values > values[0].clamp(min=torch.finfo(r.dtype).tiny) * len(r) * torch.finfo(r.dtype).eps).sum())
    sigma, vectors = values[:known].sqrt(), vectors[:, :known]
    # The sign of a direction is open; its largest entry is positive, so that equal runs get equal factors
    vectors = vectors * torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    near = vectors * (sigma / scaling).sqrt()  # (rows of r, known)
    far = (vectors.T @ r) / (sigma * scaling).sqrt()[:, None]  # (known, columns of r)
    a, b = start.clone(), start.new_zeros(len(residual), rank)
    a[:known], b[:, :known] = (far, near) if wide else (near.T, far.T)
    return a, b


def _stored(full: Mapping[str, Any], module: str, prefix: str) -> Tensor | None:
    """The weight as it is stored; a checkpoint of the bare body lacks the model's prefix, one of another head may have it beside."""
    for name in (module, module.removeprefix(f"{prefix}."), f"{prefix}.{module}"):
        if (found := full.get(f"{name}.weight")) is not None:
            return cast(Tensor, found[...]).double()
    return None
