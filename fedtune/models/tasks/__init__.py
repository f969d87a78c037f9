"""Tasks, one file each. A file defines one subclass of `fedtune.contracts.task.Task`; `_rows` and `_tokens` are base classes."""
