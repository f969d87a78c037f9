"""A run's output for users: terminal progress and tables, metrics.jsonl with its TensorBoard copy, and a self-contained report.html."""

from fedtune.runs.report.card import write_card
from fedtune.runs.report.html import write_report
from fedtune.runs.report.metrics import MetricsWriter, read_metrics
from fedtune.runs.report.progress import Progress, print_partition, print_results

__all__ = ["MetricsWriter", "Progress", "print_partition", "print_results", "read_metrics", "write_card", "write_report"]
