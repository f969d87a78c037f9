"""A training step of LoRA on decoders that keeps little: few tensors per layer, and no table of logits.

`decoder.py` has the layer, `functions.py` its parts, `loss.py` the loss, `step.py` says which models use them. PEFT's modules hold the
parameters and remain the reference: evaluation, per-row gradients, client batches, and all other models use them.
"""

from fedtune.models.lean.step import disable, enable, keeping, step_of, why_not

__all__ = ["disable", "enable", "keeping", "step_of", "why_not"]
