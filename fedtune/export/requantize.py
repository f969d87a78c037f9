"""Merging with quantized backbones: dequantizes the weights that an adapter was trained on, and quantizes a merged model again.

Quantization rounds away changes that are small relative to a weight, such as an adapter's. So the error is reported next to the size of the
change that the run made.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.config import ModelConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.backbone import Backbone, load_backbone, quiet
from fedtune.models.checkpoint import first_line

__all__ = ["PROBE", "put_dequantized", "quantize_again", "describe_requantized", "text_logits"]

PROBE = "Turn on the light in the kitchen, and then tell me about the small dog that found its way home through the snow."


def put_dequantized(model: PreTrainedModel, config: ModelConfig, task: TaskConfig, *, num_labels: int, seed: int) -> None:
    """Copy the dequantized weights of the quantized model of `config` into a float32 model, in place.

    Raises:
        ModelError: As `load_backbone`.
    """
    from fedtune.models.quantize import is_quantized, weight_of  # lazy: it imports bitsandbytes

    coarse = load_backbone(dataclasses.replace(config, device="cpu"), task, num_labels=num_labels, seed=seed).model
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in coarse.named_modules():
            if is_quantized(layer):
                weight = weight_of(layer)
                cast(Tensor, own[name].weight).copy_(weight.T if isinstance(own[name], Conv1D) else weight)


def quantize_again(merged: Backbone, precision: str, compute: str, folder: Path, before: Tensor) -> dict[str, Any]:
    """Write a quantized copy of a merged float32 model, which plain transformers can load, and measure its error.

    Args:
        merged: The merged backbone.
        precision: `nf4` or `int8`.
        compute: model.compute.
        folder: Destination of config.json and the weights.
        before: `text_logits` of the checkpoint without the run's adapter, but with the trained head.

    Returns:
        precision, compute; ‖Q(W) − W‖ / ‖W‖ (Frobenius) over the quantized layers: `weights_mean`, `weights_max` and its layer `worst`; of
        the probe text's logits, relative to the merged model's: `logits`, the change by quantization; `adapter`, the change by the run.

    Raises:
        ModelError: The model cannot be quantized, or the written file cannot be loaded.
    """
    from fedtune.models import quantize as quantize  # lazy: it imports bitsandbytes

    model, cpu = merged.model, torch.device("cpu")
    dtype = quantize.compute_dtype(compute, cpu)
    try:
        with quiet(), torch.random.fork_rng():
            coarse = quantize.quantized(model, quantize.recipe(model, precision, dtype, merged.fingerprint))
            save_file(quantize.unique_tensors(coarse), folder / "model.safetensors", metadata={"format": "pt"})
            coarse.config.architectures = [type(model).__name__]
            coarse.config.save_pretrained(folder)
            del coarse
            opened, info = cast(Any, type(model)).from_pretrained(folder, device_map={"": cpu}, output_loading_info=True)
    except (ModelError, OSError):
        raise
    except Exception as bad:  # transformers and bitsandbytes raise many types
        raise ModelError(f"the merged model cannot be quantized again: {first_line(bad)}; export it without --requantize") from None
    if lost := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ModelError(f"the quantized model's '{lost[0]}' cannot be read back: export it without --requantize")
    own = dict(model.named_modules())
    # before computing logits, which repacks 4-bit weights into another layout
    errors = {n: _off(quantize.weight_of(m).double(), _weight(own[n])) for n, m in opened.named_modules() if quantize.is_quantized(m)}
    worst, exact = max(errors, key=lambda n: errors[n]), text_logits(model, merged.tokenizer)
    return {
        "precision": precision,
        "compute": "bf16" if dtype is torch.bfloat16 else "fp32",
        "weights_mean": sum(errors.values()) / len(errors),
        "weights_max": errors[worst],
        "worst": worst,
        "logits": _off(text_logits(opened, merged.tokenizer), exact),
        "adapter": _off(before, exact),
        "probe": PROBE,
    }


def describe_requantized(figures: dict[str, Any]) -> str:
    """Describe the figures of `quantize_again` in one sentence."""
    f = figures
    lost = "; the error is no smaller, so the training may be lost: export without --requantize" if f["logits"] >= f["adapter"] else ""
    return (
        f"merged and quantized again to {f['precision']}: the relative error of the weights is {f['weights_mean']:.1%} on average and"
        f" {f['weights_max']:.1%} at most ('{f['worst']}'); quantization changes the logits of a probe text by {f['logits']:.1%}, the run"
        f" changed them by {f['adapter']:.1%}{lost}"
    )


def text_logits(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """The model's logits of the probe text, float64."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    ids = torch.tensor([tokenizer(PROBE).input_ids[: min(longest - 2, 512)]])  # RoBERTa's positions start at 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return cast(Any, model.eval())(**inputs).logits.double()


def _weight(layer: nn.Module) -> Tensor:
    weight = cast(Tensor, layer.weight).detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
