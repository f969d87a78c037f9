"""Generates text from Llama-family decoders with little memory and few CPU cores.

Imports here load numpy, torch, safetensors and tokenizers, and no other large library. The caller sets thread counts.
"""
