"""A run on disk: its directory, checkpoints, metrics, status and report."""
