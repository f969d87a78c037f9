"""Everybody who is told how a run goes: the terminal, metrics.jsonl, TensorBoard, the log, and the report where it is watched."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.runs.report import MetricsWriter, Progress, write_report

_log = logging.getLogger("fedtune.run")


class Watch:
    """The bridge's watcher.

    Args:
        run: The run's directory.
        resumed: Round of the checkpoint that it goes on from; None where it is new.
        live: Whether report.html is made anew after each round.

    Attributes:
        clients: Logical id → Flower's node and the device class, of those that have said hello.
        round: The round at hand.
        waiting: Clients of its cohort that have not answered yet.
    """

    def __init__(self, run: Path, resumed: int | None, *, live: bool = False) -> None:
        self._run, self._writer, self._progress = run, MetricsWriter(run, resumed), Progress()
        self.clients: dict[str, tuple[int, str]] = {}
        self.round, self.waiting = 0, set[str]()
        self._stale, self._closed = threading.Event(), False
        self._reporter = threading.Thread(target=self._report, name="report", daemon=True) if live else None

    def __enter__(self) -> "Watch":
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
        """Rounds do not wait for their plots; of two that are quick one after the other, the later is drawn."""
        while not self._closed:
            self._stale.wait()
            self._stale.clear()
            if self._closed:  # whoever ends the run writes the last report
                return
            try:
                write_report(self._run)
            except (FedtuneError, OSError) as bad:
                _log.warning("report.html could not be made anew: %s", bad)
