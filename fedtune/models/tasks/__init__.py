"""Tasks, one file each. A file defines one subclass of `fedtune.contracts.task.Task`; `_rows`, `_tokens` and `_answers` are base classes."""
