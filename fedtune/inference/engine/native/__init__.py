"""Kernels in C for the engine's linear layers, called by ctypes.

`kernels.h` describes the layout of weights, `build.py` compiles the library, `library.py` opens it and chooses an instruction set,
`pack.py` converts a package's tensors, and `choice.py` says which kinds stay torch's.
"""
