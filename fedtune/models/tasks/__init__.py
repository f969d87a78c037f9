"""Tasks, one file each. A file defines one subclass of `fedtune.contracts.task.Task`; files that begin with `_` hold base classes."""
