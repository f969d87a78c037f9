"""Many faults in one deployment. It waits before a round for each fault; after the fault, the updates of all clients must count again.

Each fault is one `Cell`. At the end, the adapter of every round is compared with that of a replay, which also detects a fault with a late
effect.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedtune.runs.report import read_metrics
from tests.faults.deployment import ROOT, Deployment, settings, write_rows
from tests.faults.forking import popen
from tests.faults.replay import BOUND, counted_clients
from tests.network.loopback import Link

CLIENTS = ("anna", "bert", "carla")
TARGET = "carla"  # the client of the faults that hit one client
PATIENCE = float(os.environ.get("FEDTUNE_FAULTS_PATIENCE", "240"))  # seconds to wait for an event; after that the deployment counts as hung
POINTS = ("idle", "plan", "training", "uploading", "aggregating", "checkpointing")
VICTIMS = ("client", "child", "server", "superlink", "both")
PROCESSES = 8  # server, SuperLink, three clients with a worker each
OUTSIDE = 75.0  # seconds without network, longer than the lease
DEADLINE = 30.0


class Defect(Exception):
    """The deployment behaved wrongly."""


@dataclass(frozen=True)
class Cell:
    """One fault: its kind, and its place, duration or variant."""

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where}"


@dataclass
class Outcome:
    """The outcome of a cell."""

    cell: Cell
    good: bool = True
    words: list[str] = field(default_factory=list)
    rounds: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def bad(self, why: str) -> None:
        self.good = False
        self.words.insert(0, why)


def all_cells() -> list[Cell]:
    cells = [Cell(f"kill-{victim}", point) for point in POINTS for victim in VICTIMS]
    cells += [Cell(how, seconds) for how in ("cut", "drop") for seconds in ("1", "30", f"{OUTSIDE:g}")]
    cells += [Cell("lie", kind) for kind in ("nan", "shape", "huge", "stale", "other", "weight")]
    cells += [Cell("skew", seconds) for seconds in ("-10", "10", "-3600", "3600")]
    return [*cells, Cell("slow", "client"), Cell("disk", "checkpoint")]


class Campaign:
    """A deployment, and the faults that it is exposed to."""

    def __init__(self, folder: Path, cells: Sequence[Cell], report: Callable[[str], None] = print) -> None:
        self.folder, self.cells, self.report = folder, list(cells), report
        self.points = folder / "points"
        self.points.mkdir(parents=True)
        write_rows(folder / "rows", CLIENTS)
        base = [s for s in settings(folder / "rows", CLIENTS) if not s.startswith(("min_clients", "rounds"))]
        self.experiment = [*base, "min_clients=2", "rounds=1000", "client.schedule=constant", "keep_checkpoints=1000", "eval.every=5"]
        self.experiment += ["weights.max_share=1"]  # the replay has no bound, and a bound would make two of three clients equal
        slow = any(c.kind == "slow" for c in cells)  # in a separate campaign, because this deadline would end other cells
        limit = DEADLINE if slow else 10 * PATIENCE
        self.deployment = Deployment(folder, CLIENTS, [*self.experiment, f"round_timeout_s={limit:g}"])
        self.proxy = Link(self.deployment.port)

    # -- the campaign ---------------------------------------------------------------------------------------------------------------------

    def run(self) -> list[Outcome]:
        """The outcome of each cell up to the first that is bad; another campaign runs the rest."""
        outcomes: list[Outcome] = []
        try:
            try:
                self._start_all()
            except Defect as bad:
                return [Outcome(self.cells[0], False, [f"the deployment did not start: {bad}"])]
            for cell in self.cells:
                outcomes.append(self._run_cell(cell))
                if not outcomes[-1].good:
                    break
            if all(o.good for o in outcomes):
                self._finish(outcomes)
        finally:
            self.deployment.stop()
            self.proxy.close()
            time.sleep(1)
            if (left := self.deployment.processes()) and outcomes:
                outcomes[-1].bad(f"left behind: {', '.join(' '.join(p.cmdline()[-3:]) for p in left)}")
                for process in left:
                    process.kill()
        return outcomes

    def _start_all(self) -> None:
        self._arm("server", "idle")
        self._start_server()
        for name in CLIENTS:
            self._start_client(name)
        self._wait_held("server", "idle")

    def _run_cell(self, cell: Cell) -> Outcome:
        out, began, first = Outcome(cell), time.monotonic(), self._newest() + 1
        sizes = {f: f.stat().st_size for f in self._texts()}
        try:
            getattr(self, f"_{cell.kind.split('-')[0]}")(cell, out)
            self._recover(first + (cell.kind == "kill-client"))  # it may have counted before the kill, and must count again
        except Defect as bad:
            out.bad(str(bad))
        except (OSError, AssertionError, psutil.Error) as bad:
            out.bad(f"{type(bad).__name__}: {bad}")
        out.rounds, out.seconds = (first, self._newest()), time.monotonic() - began
        out.words += self._drops(out.rounds)
        added = {f: f.read_bytes()[sizes.get(f, 0) :].decode(errors="replace") for f in self._texts()}
        if traces := [f.name for f, text in added.items() if "Traceback" in text]:
            out.bad(f"a trace in {traces[0]}")
        if len(now := self.deployment.processes()) > PROCESSES:
            out.bad(f"{len(now)} processes, {PROCESSES} wanted")
        self.report(f"{'ok ' if out.good else 'BAD'} {cell}  rounds {out.rounds}  {out.seconds:.0f} s  {'; '.join(out.words)}")
        return out

    def _finish(self, outcomes: Sequence[Outcome]) -> None:
        """Stop the server with SIGTERM as a service manager does, run one more round to the end, and compare every round."""
        assert self.deployment.server is not None
        self.deployment.server.terminate()
        if (code := self.deployment.server.wait(PATIENCE)) != 130:
            outcomes[-1].bad(f"SIGTERM gives exit code {code}")
        for file in self.points.iterdir():
            file.unlink()
        self.experiment = [s for s in self.experiment if not s.startswith("rounds=")] + [f"rounds={self._newest() + 1}"]
        self.deployment.experiment = self.experiment
        self._start_server()
        code = self.deployment.finish(PATIENCE)
        if code != 0:
            outcomes[-1].bad(f"exit code {code}: {self.deployment.output('server').splitlines()[-1]}")
        turnout, off = counted_clients(self.deployment.run), self._replay()
        for out in outcomes:
            wrong = [r for r in range(out.rounds[0], out.rounds[1] + 1) if not off.get(r, float("inf")) <= BOUND]
            if wrong:
                out.bad(f"round {wrong[0]} is off by {off.get(wrong[0], float('inf')):g} from the replay")
        if not all(v <= BOUND for v in off.values()) or len(off) != max(turnout) + 1:
            outcomes[-1].bad(f"{len(off)} rounds compared, off by up to {max(off.values()):g}")
        records = [r["round"] for r in read_metrics(self.deployment.run) if r["client"] is None]
        if records != list(range(max(turnout) + 1)):
            outcomes[-1].bad(f"metrics.jsonl has the rounds {records}")

    def _replay(self) -> dict[int, float]:
        """Round → difference from the replay, which runs in a separate process."""
        command = [sys.executable, "-m", "tests.faults.replay", str(self.deployment.run), str(self.folder), *self.experiment]
        with (self.folder / "replay.out").open("w") as errors:
            process = popen()(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
            printed, _ = process.communicate()
        if process.returncode:
            raise Defect(f"the replay failed: {(self.folder / 'replay.out').read_text()[-500:]}")
        return {int(r): float(off) for r, off in json.loads(printed.decode().strip().splitlines()[-1]).items()}

    # -- the faults -----------------------------------------------------------------------------------------------------------------------

    def _kill(self, cell: Cell, out: Outcome) -> None:
        victim, point = cell.kind.removeprefix("kill-"), cell.where
        who = (
            "server"
            if point in ("idle", "aggregating", "checkpointing") or (point == "plan" and victim not in ("client", "child"))
            else TARGET
        )
        if point != "idle":
            self._arm(who, point)
            self._release("server", "idle")
            self._wait_held(who, point)
        pids = self._victims(victim)
        self._arm("server", "idle")
        for process in pids:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(pids, timeout=20)
        if victim == "client":
            self.deployment.clients[TARGET].wait()
            self._start_client(TARGET)
        if victim in ("server", "both"):
            assert self.deployment.server is not None
            self.deployment.server.wait()
            self._start_server()
        self._release(who, point)

    def _cut(self, cell: Cell, out: Outcome) -> None:
        self._without_network(self.proxy.cut, cell)

    def _drop(self, cell: Cell, out: Outcome) -> None:
        self._without_network(self.proxy.hold, cell)

    def _without_network(self, cut: Callable[[], None], cell: Cell) -> None:
        self._arm(TARGET, "training")
        self._release("server", "idle")
        self._wait_held(TARGET, "training")
        self._arm("server", "idle")
        cut()
        self._release(TARGET, "training")
        time.sleep(float(cell.where))
        self.proxy.mend()

    def _lie(self, cell: Cell, out: Outcome) -> None:
        (self.points / f"{TARGET}.lie").write_text(cell.where)
        first = self._newest() + 1
        self._arm("server", "idle")
        self._release("server", "idle")
        self._wait_held("server", "idle")
        kinds = [str(r.get("dropped", "")) for r in read_metrics(self.deployment.run) if r["round"] == first and r["client"] == TARGET]
        if not kinds or not kinds[0].startswith("refused"):
            raise Defect(f"the lie was not refused: {kinds}")

    def _skew(self, cell: Cell, out: Outcome) -> None:
        self.deployment.clients[TARGET].terminate()
        self.deployment.clients[TARGET].wait(30)
        begin = len(self.deployment.output(TARGET))
        self._start_client(TARGET, "--skew", cell.where)
        end = time.monotonic() + PATIENCE
        while "connected to" not in (printed := self.deployment.output(TARGET)[begin:]) and "clock" not in printed:
            if time.monotonic() > end:
                raise Defect(f"a client with a skewed clock prints nothing about it: {printed[-300:]}")
            time.sleep(0.1)
        out.words.append(printed.strip().splitlines()[-1])
        self._arm("server", "idle")
        self._release("server", "idle")
        self._wait_held("server", "idle")
        self.deployment.clients[TARGET].terminate()
        self.deployment.clients[TARGET].wait(30)
        self._start_client(TARGET)

    def _slow(self, cell: Cell, out: Outcome) -> None:
        first = self._newest() + 1
        self._arm(TARGET, "training")
        self._arm("server", "idle")
        self._release("server", "idle")
        self._wait_held(TARGET, "training")
        self._wait_held("server", "idle")  # the round has ended while the client still trains
        if not any("late" in w for w in self._drops((first, first))):
            raise Defect("the round did not end as late")
        self._release(TARGET, "training")

    def _disk(self, cell: Cell, out: Outcome) -> None:
        (self.points / "server.disk").touch()
        self._arm("server", "idle")
        self._release("server", "idle")
        assert self.deployment.server is not None
        code = self.deployment.server.wait(PATIENCE)
        line = self.deployment.output("server").strip().splitlines()[-1]
        out.words.append(line)
        if code != 2 or not line.startswith("fedtune-server: "):
            raise Defect(f"a full disk gives exit code {code}")
        self._start_server()

    # -- helpers --------------------------------------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        launcher = ["-m", "tests.faults.launch", "server", str(self.points), "server"]
        self.deployment.start_server("--wait", f"{PATIENCE:g}", launcher=launcher)

    def _start_client(self, name: str, *more: str) -> None:
        port = int(self.proxy.address.rpartition(":")[2]) if name == TARGET else None
        self.deployment.start_client(name, port=port, launcher=["-m", "tests.faults.launch", name, str(self.points), "client", *more])

    def _victims(self, victim: str) -> list[psutil.Process]:
        assert self.deployment.server is not None
        server, client = psutil.Process(self.deployment.server.pid), psutil.Process(self.deployment.clients[TARGET].pid)
        link, child = server.children(), client.children()
        found = {"client": [client], "child": child, "server": [server], "superlink": link, "both": [server, *link]}[victim]
        if not found:
            raise Defect(f"there is no {victim}")
        return found

    def _arm(self, who: str, point: str) -> None:
        (self.points / f"{who}.{point}").touch()

    def _release(self, who: str, point: str) -> None:
        (self.points / f"{who}.{point}.held").unlink(missing_ok=True)

    def _wait_held(self, who: str, point: str) -> None:
        """Wait until a process is held at a point."""
        held, end = self.points / f"{who}.{point}.held", time.monotonic() + PATIENCE
        while not held.exists():
            if self.deployment.server is not None and (code := self.deployment.server.poll()) is not None:
                raise Defect(f"the server ended with exit code {code}: {self.deployment.output('server').strip().splitlines()[-1]}")
            if time.monotonic() > end:
                raise Defect(f"hung: {who} does not reach '{point}' within {PATIENCE:g} s")
            time.sleep(0.05)
        if point == "idle" and int(held.read_text()) != self._newest() + 1:
            raise Defect(f"round {held.read_text()} begins after the checkpoint of round {self._newest()}")

    def _recover(self, first: int) -> None:
        """Run rounds until one counts all clients. Fail after three rounds and 15 s, in which a client has tried to connect again."""
        began = time.monotonic()
        while True:
            self._wait_held("server", "idle")
            done = self._newest()
            if done >= first and len(counted_clients(self.deployment.run)[done]) == len(CLIENTS):
                return
            if done >= first + 3 and time.monotonic() - began > 15:
                raise Defect("three rounds after the fault not all clients count")
            self._arm("server", "idle")
            self._release("server", "idle")
            self._wait_next(done)

    def _wait_next(self, done: int) -> None:
        """Wait until round `done + 1` has its checkpoint."""
        end = time.monotonic() + PATIENCE
        while self._newest() <= done:
            if self.deployment.server is not None and self.deployment.server.poll() is not None or time.monotonic() > end:
                raise Defect(f"round {done + 1} does not end: {self.deployment.output('server').strip().splitlines()[-1]}")
            time.sleep(0.05)

    def _newest(self) -> int:
        found = [int(p.name[6:]) for p in (self.deployment.run / "checkpoints").glob("round-*")]
        return max(found, default=-1)

    def _drops(self, rounds: tuple[int, int]) -> list[str]:
        rows: list[dict[str, Any]] = read_metrics(self.deployment.run) if (self.deployment.run / "metrics.jsonl").exists() else []
        return [
            f"round {r['round']}: {r['client']} {r['dropped']}"
            for r in rows
            if r["client"] and r.get("dropped") and r["round"] >= rounds[0]
        ]

    def _texts(self) -> Iterator[Path]:
        yield from self.folder.glob("*.txt")
        yield from self.folder.glob("state/*/logs/worker.log")
        yield from self.folder.glob("run/logs/*.err")


@contextmanager
def kill_at_end(campaign: Campaign) -> Iterator[Campaign]:
    """A context that ends with all processes of the campaign killed."""
    try:
        yield campaign
    finally:
        with suppress(psutil.Error):
            for process in campaign.deployment.processes():
                process.kill()
