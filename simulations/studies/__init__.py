"""Studies on real data, one file each: `python -m fedtune.simulations.studies.NAME`."""
