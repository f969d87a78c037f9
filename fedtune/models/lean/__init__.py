"""The lean step: a training step for LoRA on decoders that keeps few tensors per layer for the backward pass, and never all logits at once.

`decoder.py` has the layer, `functions.py` its parts, `loss.py` the loss, and `step.py` decides which models use them. PEFT's modules hold
the parameters and remain the reference: evaluation, per-row gradients, client batches and all other models use them.
"""

from fedtune.models.lean.step import disable, enable, keeping, step_of, why_not

__all__ = ["disable", "enable", "keeping", "step_of", "why_not"]
