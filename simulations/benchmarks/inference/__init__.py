"""This engine against transformers, OpenVINO and llama.cpp, interleaved: `python -m fedtune.simulations.benchmarks.inference`."""
