"""A training step of LoRA on decoders that keeps little: few tensors per layer, and no table of logits."""
