"""Generates text from Llama-family decoders with little memory and few CPU cores.

Imports here load torch, safetensors and tokenizers, and no other large library. All computation runs under
`torch.inference_mode()`; the caller sets thread counts.
"""
