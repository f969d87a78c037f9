"""Warm starts (`peft.from`): a run begins with the adapter of an earlier run, and measures what it forgets of that run's task."""

from fedtune.warm_start.earlier import EarlierRows
from fedtune.warm_start.fit import fit
from fedtune.warm_start.folder import read_start, write_start
from fedtune.warm_start.source import Source, read_source

__all__ = ["EarlierRows", "Source", "fit", "read_source", "read_start", "write_start"]
