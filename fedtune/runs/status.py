"""`fedtune status`: the status of a run, from its server's last report and the run's own records.

The server rewrites RUN/server.json every second. Counted turns come from metrics.jsonl and the newest checkpoint's client records.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtune.errors import CheckpointError, ConfigError, NetworkError
from fedtune.runs.report.metrics import read_metrics
from fedtune.runs.report.summary import client_results, drops_text, duration, primary_metric, size
from fedtune.runs.report.tables import print_table
from fedtune.storage.parsing import parse_json, parse_yaml, read_text

FRESH_S = 15.0  # a server whose report is older no longer works, even if a process has its id
_ASK_S = 5.0


def read_status(run: Path, server: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The status of a run.

    Args:
        run: The run directory.
        server: The server's report; None reads its file in the run directory.

    Returns:
        `state` (running, silent, stopped, finished), `round` of `rounds`, `nodes` by client, `totals`; see `show`.

    Raises:
        CheckpointError: There is no run, or it cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"there is no run {run}: give the folder that holds config.yaml and checkpoints/")
    live, age = (server, 0.0) if server is not None else _server_file(run)
    records = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    done, book = _book(run)
    rounds = int(live["rounds"]) if live and live.get("rounds") else _rounds(run)
    partition = _json(run / "partition.json") or {}
    results = {r.client: r for r in client_results(records, primary_metric(records), partition)}
    seen = {str(n.get("client") or f"node {n.get('node')}"): n for n in (live or {}).get("nodes", [])}
    nodes = []
    for client in sorted({*results, *book, *seen}):
        result, kept, node = results.get(client), book.get(client, {}), seen.get(client, {})
        nodes.append(
            {
                "client": client,
                "device_class": node.get("device_class") or (result.device_class if result else ""),
                "online": node.get("online"),
                "last_seen": node.get("last_seen"),
                "counted": result.counted if result else 0,
                "dropped": dict(result.dropped) if result else {},
                "last": node.get("last") or kept.get("last"),
                "bytes_up": result.bytes_up if result else 0.0,
                "bytes_down": result.bytes_down if result else 0.0,
                "epsilon": kept.get("epsilon"),
            }
        )
    return {
        "run": str(run),
        "state": _state(run, live, age, finished=done >= rounds and (run / "adapter").is_dir()),
        "silent_s": age if live else None,
        "served": live is not None,
        "round": max(done, int((live or {}).get("round") or 0)),
        "kept": done,
        "rounds": rounds,
        "address": (live or {}).get("address"),
        "control": (live or {}).get("control"),
        "started": (live or {}).get("started"),
        "waiting_for": list((live or {}).get("waiting_for") or []),
        "nodes": nodes,
        "totals": _totals(nodes),
    }


def ask(control: str) -> dict[str, Any]:
    """Ask a running server on its private port for the status of its run.

    Raises:
        ConfigError: `control` is not a local HOST:PORT.
        NetworkError: Nothing answers there, or not a fedtune server.
    """
    if not re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\]):\d{1,5}", control):
        raise ConfigError(
            f"--control {control} is not 127.0.0.1:PORT: the server prints its private port, which is on its own machine only"
        )
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        with opener.open(f"http://{control}/fedtune/status", timeout=_ASK_S) as answer:
            live = parse_json(answer.read(1 << 24))
        if not isinstance(live, dict) or "nodes" not in live:
            raise ValueError("no nodes")
    except urllib.error.HTTPError as bad:
        raise NetworkError(f"{control} is not a fedtune server's private port: it answers {bad.code} to /fedtune/status") from None
    except OSError as bad:
        why = getattr(bad, "reason", None) or bad
        raise NetworkError(
            f"nothing answers at {control} ({why}): is the server running? fedtune status RUN shows its last report"
        ) from None
    except ValueError:
        raise NetworkError(f"{control} is not a fedtune server's private port: its answer cannot be read") from None
    run = live.get("run")
    if run and (Path(run) / "config.yaml").is_file():
        return read_status(Path(run), live)
    nodes = [{"counted": None, "dropped": {}, "bytes_up": None, "bytes_down": None, "epsilon": None, **n} for n in live["nodes"]]
    return {
        "run": run,
        "state": "running",
        "served": True,
        "silent_s": 0.0,
        "kept": None,
        "round": 0,
        "rounds": "?",
        "address": None,
        "waiting_for": [],
        **live,
        "nodes": nodes,
        "totals": {},
    }


# -- as text ------------------------------------------------------------------------------------------------------------------------------


def show(status: Mapping[str, Any], *, as_json: bool = False, now: float | None = None, width: int | None = None) -> str:
    """The status as text, or as JSON.

    Args:
        status: Result of `read_status` or `ask`.
        as_json: JSON instead of text.
        now: Current time for "ago", in seconds since 1970; None takes the clock.
        width: Columns of the table; None takes the terminal's, or 80 without a terminal.
    """
    if as_json:
        return json.dumps(status, indent=1)
    now = time.time() if now is None else now
    rows = []
    for n in status["nodes"]:
        spent = n.get("epsilon")
        rows.append(
            [
                str(n.get("client") or f"node {n.get('node')}"),
                str(n.get("device_class") or ""),
                _seen(n, now),
                "–" if n["counted"] is None else str(n["counted"]),
                drops_text(n["dropped"]),
                size(n["bytes_up"]),
                size(n["bytes_down"]),
                "" if spent is None else f"{spent:.2f}",
                str(n.get("last") or ""),
            ]
        )
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as shown:
        header = ["client", "device", "seen", "counted", "dropped", "up", "down", "ε", "last result"]
        print_table(console, header, rows, left=["device", "seen"], wrap=["dropped", "last result"], box=None)
    lines = [_headline(status), ""] + [line.rstrip() for line in shown.get().splitlines()]
    if not status["nodes"]:
        lines[2:] = ["no client has connected yet"]
    if totals := status["totals"]:
        online = f"{totals['online']} of " if status["state"] == "running" and status["served"] else ""
        drops = drops_text(totals["dropped"]) or "none"
        up, down = size(totals["bytes_up"]), size(totals["bytes_down"])
        lines += ["", f"{online}{len(status['nodes'])} clients; turns: {totals['counted']} counted, dropped: {drops}; {up} up, {down} down"]
        if totals["epsilon"] is not None:
            lines[-1] += f"; ε up to {totals['epsilon']:.2f}"
    return "\n".join(lines)


def _headline(status: Mapping[str, Any]) -> str:
    run, of = status["run"] or "the run", f"round {status['round']} of {status['rounds']}"
    if status["state"] == "finished":
        return f"{run} has finished: {of}"
    again = f"fedtune-server --run {run} and the flags for its keys" if status["served"] else f"python -m fedtune.sim resume={run}"
    if status["state"] == "running":
        waiting = ", ".join(map(str, status["waiting_for"]))
        at = f" at {status['address']}" if status["address"] else ""
        return f"{run} is running{at}: {of}" + (f", waiting for {waiting}" if waiting else "")
    if status["state"] == "silent":
        return (
            f"{run}: its server has not reported for {duration(status['silent_s'])}, at {of}; if it hangs, stop it and continue with"
            f" {again}"
        )
    return f"{run} is stopped after {status['kept']} of {status['rounds']} rounds: continue with {again}"


def _seen(node: Mapping[str, Any], now: float) -> str:
    if node.get("online"):
        return "online"
    last = node.get("last_seen")
    return "" if not last else f"{duration(max(0.0, now - last))} ago"


# -- reading ------------------------------------------------------------------------------------------------------------------------------


def _state(run: Path, live: Mapping[str, Any] | None, age: float, *, finished: bool) -> str:
    if live is None and _locked(run):
        return "running"
    if live and _alive(live.get("pid")):
        if age <= FRESH_S:
            return "running"
        if not finished:
            return "silent"
    return "finished" if finished else "stopped"


def _locked(run: Path) -> bool:
    """Whether a process has the run open. Reads the kernel's list: trying the lock could make a run that starts at this moment fail."""
    try:
        inode = str((run / ".lock").stat().st_ino)
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    return any("FLOCK" in line and line.split()[5].rpartition(":")[2] == inode for line in locks if len(line.split()) > 5)


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _server_file(run: Path) -> tuple[Mapping[str, Any] | None, float]:
    """The server's last report, and its age in seconds; None for a run without a server."""
    path = run / "server.json"
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None, 0.0
    live = _json(path)
    if live is None:
        raise CheckpointError(f"{path} cannot be read: it is not a fedtune server's report")
    return live, age


def _book(run: Path) -> tuple[int, Mapping[str, Mapping[str, Any]]]:
    """Round of the newest readable checkpoint, and its client records."""
    for folder in sorted((run / "checkpoints").glob("round-*"), key=lambda p: (len(p.name), p.name), reverse=True):
        body = _json(folder / "checkpoint.json")
        if body and isinstance(body.get("round"), int) and isinstance(body.get("clients"), dict):
            return body["round"], body["clients"]
    return 0, {}


def _rounds(run: Path) -> int:
    try:
        return int(parse_yaml(read_text(run / "config.yaml"))["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{run / 'config.yaml'} cannot be read: it has no valid `rounds`") from None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _totals(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    dropped: dict[str, int] = {}
    for n in nodes:
        for kind, count in n["dropped"].items():
            dropped[kind] = dropped.get(kind, 0) + count
    spent = [n["epsilon"] for n in nodes if n["epsilon"] is not None]
    sums = {key: sum(n[key] for n in nodes) for key in ("counted", "bytes_up", "bytes_down")}
    return {**sums, "dropped": dropped, "online": sum(bool(n["online"]) for n in nodes), "epsilon": max(spent, default=None)}
