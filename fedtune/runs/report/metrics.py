"""metrics.jsonl, one JSON object per line, and its copy in TensorBoard.

Each line is appended and flushed at once, so a kill can damage only the last one. Resuming drops a damaged last line and all lines after
the checkpoint.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.contracts.task import metrics
from fedtune.errors import CheckpointError
from fedtune.runs.report.summary import NO_CLASS, value
from fedtune.storage.atomic import write_text
from fedtune.storage.parsing import content_of, parse_json

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes a run's records as they come.

    Round lines become TensorBoard scalars `global/<key>`; client lines become, per round and device class, `clients/<class>/<key>/mean`
    and, for metrics, `…/worst`.

    Args:
        run_dir: The existing run directory.
        resume_round: Round of the checkpoint to resume from: later lines and an incomplete last line are dropped first. None: a new run.

    Raises:
        CheckpointError: A new run's directory already has metrics, or a line before the last is damaged.
    """

    def __init__(self, run_dir: Path, resume_round: int | None) -> None:
        path, replay = run_dir / FILE, []
        if resume_round is None and path.exists():
            raise CheckpointError(f"{path} already exists: give a new run its own directory, or continue this one with resume={run_dir}")
        if resume_round is not None and path.exists():
            kept = [r for r in read_metrics(run_dir) if int(r["round"]) <= resume_round]
            write_text(path, "".join(map(_line, kept)))
            replay = [r for r in kept if int(r["round"]) == resume_round]
        self._tensorboard = _summary_writer(run_dir, resume_round)
        self._round, self._turns = -1, {}
        for record in replay:  # TensorBoard purges this round, whose copy may not have reached the disk
            self._mirror(record)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record (NaN and infinity become null) and flush it."""
        clean = _clean(record)
        self._file.write(_line(clean))
        self._file.flush()
        self._mirror(clean)

    def close(self) -> None:
        self._flush_turns()
        self._tensorboard.close()
        self._file.close()

    def _mirror(self, record: Mapping[str, Any]) -> None:
        step = int(record["round"])
        if step != self._round:
            self._flush_turns()
            self._round = step
        if record.get("client") is not None:
            self._turns.setdefault(str(record.get("device_class") or NO_CLASS), []).append(record)
            return
        flat = {**record, **{f"dropped/{why}": n for why, n in (record.get("dropped") or {}).items()}}
        for key in flat:
            if key != "round" and (v := value(flat, key)) is not None:
                self._tensorboard.add_scalar(f"global/{key}", v, step)
        self._tensorboard.flush()

    def _flush_turns(self) -> None:
        scored = metrics()
        for device_class, turns in self._turns.items():
            for key in sorted({k for t in turns for k in t} - {"round", "client"}):
                if values := [v for t in turns if (v := value(t, key)) is not None]:
                    self._tensorboard.add_scalar(f"clients/{device_class}/{key}/mean", sum(values) / len(values), self._round)
                    if key in scored:
                        worst = (min if scored[key] else max)(values)
                        self._tensorboard.add_scalar(f"clients/{device_class}/{key}/worst", worst, self._round)
        self._turns = {}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, without an incomplete last line, which a kill can leave.

    Raises:
        CheckpointError: metrics.jsonl is missing, or a line before the last is not a record.
    """
    path = run_dir / FILE
    try:
        lines = content_of(path).split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): is {run_dir} a run directory?") from error
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    records = []
    for i, line in enumerate(lines[: last + 1]):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("round"), int):
                raise ValueError("not an object with a round")
        except ValueError as error:  # covers JSON and UTF-8 errors
            if i == last:
                break
            raise CheckpointError(f"{path} line {i + 1} is damaged ({error}): restore it or delete that line") from error
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n"


def _clean(v: Any) -> Any:
    if isinstance(v, Mapping):
        return {str(k): _clean(x) for k, x in v.items()}
    if isinstance(v, (list, tuple)):
        return [_clean(x) for x in v]
    if hasattr(v, "item"):  # a NumPy or torch number
        v = v.item()
    return None if isinstance(v, float) and not math.isfinite(v) else v


def _summary_writer(run_dir: Path, resume_round: int | None) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard loads TensorFlow if installed, which logs to stderr
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, so only a run imports it

    return SummaryWriter(str(run_dir), purge_step=resume_round)
