"""Benchmarks, one file each: `python -m fedtune.simulations.benchmarks.NAME`."""
