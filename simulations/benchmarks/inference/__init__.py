"""fedtune's engine against transformers, OpenVINO and llama.cpp: `python -m fedtune.simulations.benchmarks.inference`."""
