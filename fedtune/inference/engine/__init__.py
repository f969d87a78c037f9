"""Generates text from Llama-family decoders with little memory and few CPU cores.

Imports here load numpy, safetensors and tokenizers, and no other large library; torch only where the native kernels do not run. The caller
sets thread counts.
"""
