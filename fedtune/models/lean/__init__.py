"""The lean step: a training step for LoRA on decoders and encoders that keeps few tensors per layer for the backward pass, and never all
logits at once.

`decoder.py` and `encoder.py` have the layers, `layer.py` what they share, `functions.py` their parts, `loss.py` the loss, `places.py`
leaves out padding, and `step.py` decides which models use them. PEFT's modules hold the parameters and remain the reference: evaluation,
per-row gradients and all other models use them.
"""

from fedtune.models.lean.step import disable, enable, keeping, step_of, why_not

__all__ = ["disable", "enable", "keeping", "step_of", "why_not"]
