"""The run observer: passes a run's events to the terminal, metrics.jsonl, TensorBoard, the log and, in live mode, the report."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.runs.report import MetricsWriter, Progress, write_report

_log = logging.getLogger("fedtune.run")


class RunObserver:
    """Receives the events of the bridge.

    Args:
        run: The run directory.
        resumed: Round of the checkpoint that the run resumes from; None for a new run.
        live: Whether to rewrite report.html after each round.

    Attributes:
        clients: Logical id → Flower's node id and the device class, of the clients that have said hello.
        round: The current round.
        waiting: Clients of its cohort that have not answered.
    """

    def __init__(self, run: Path, resumed: int | None, *, live: bool = False) -> None:
        self._run, self._writer, self._progress = run, MetricsWriter(run, resumed), Progress()
        self.clients: dict[str, tuple[int, str]] = {}
        self.round, self.waiting = 0, set[str]()
        self._stale, self._closed = threading.Event(), False
        self._reporter = threading.Thread(target=self._report, name="report", daemon=True) if live else None

    def __enter__(self) -> "RunObserver":
        self._progress.__enter__()
        if self._reporter:
            self._reporter.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.__exit__(*exc)
        self._closed = True
        if self._reporter:
            self._stale.set()
            self._reporter.join()
        self._writer.close()

    def client_known(self, client: str, node: int, device_class: str) -> None:
        _log.info("hello", extra={"client": client, "node": node, "device_class": device_class})
        self.clients[client] = node, device_class

    def round_started(self, round: int, rounds: int, cohort: Sequence[str]) -> None:
        _log.info("round started", extra={"round": round, "rounds": rounds, "cohort": list(cohort)})
        self.round, self.waiting = round, set(cohort)
        self._progress.round_started(round, rounds, len(cohort))

    def client_done(self, client: str, dropped: str | None) -> None:
        _log.info("dropped" if dropped else "counted", extra={"client": client, "why": dropped})
        self.waiting.discard(client)
        self._progress.client_done(client, dropped)

    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None:
        for line in (*clients, record):
            self._writer.write(line)
        _log.info("round done", extra={k: v for k, v in record.items() if k not in ("client", "name")})
        self._progress.round_done(record)
        self._stale.set()

    def note(self, text: str) -> None:
        _log.info(text)
        self._progress.note(text)

    def _report(self) -> None:
        """Write reports in a thread, so that rounds do not wait. If rounds end faster than reports are written, some are skipped."""
        while not self._closed:
            self._stale.wait()
            self._stale.clear()
            if self._closed:  # the end of the run writes the last report
                return
            try:
                write_report(self._run)
            except (FedtuneError, OSError) as bad:
                _log.warning("report.html could not be rewritten: %s", bad)
