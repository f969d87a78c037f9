"""Tasks, one file each. A file defines one subclass of `fedtune.task.Task`; `_rows` and `_tokens` hold what several of them share."""
