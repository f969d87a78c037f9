"""Generate text from Llama-family decoders in little memory on a few CPU cores.

Importing anything here loads torch, safetensors and tokenizers, and nothing else that is large. All arithmetic runs under
`torch.inference_mode()`; thread counts are the caller's.
"""
