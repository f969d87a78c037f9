"""Provenance of an exported model, from the run's files, for its card."""

import math
import re
from pathlib import Path
from typing import Any

from fedtune.contracts.task import metrics
from fedtune.errors import CheckpointError
from fedtune.export.origin import Origin
from fedtune.storage.parsing import content_of, parse_json, read_text

__all__ = ["provenance"]


def provenance(origin: Origin) -> dict[str, Any]:
    """Return `provenance`, `metric` and `privacy` of the card; only the spec for a bare adapter folder, only the name for a complete model.

    The metric is that of the global test (else the clients' mean) in the adapter's round; for a personal model, the client's own. ε is the
    largest of any client: the adapter's README includes the ledgers, metrics.jsonl only the reported turns.

    Raises:
        CheckpointError: metrics.jsonl is damaged.
    """
    spec, config = origin.adapter.state.spec, origin.config
    if origin.whole is not None:
        return {"provenance": {"model": origin.source.resolve().name}, "metric": None, "privacy": None}
    about: dict[str, Any] = {"method": spec.method, "round": spec.version, "base": spec.base}
    if config is None:
        return {"provenance": about, "metric": None, "privacy": None}
    run = origin.run or origin.source
    about |= {
        "run": run.resolve().name,
        "name": config.name,
        "strategy": str(config.strategy.get("_target_", "")).rpartition(".")[2],
        "rounds": config.rounds,
        "clients_per_round": config.clients_per_round,
        "seed": config.seed,
        "model": _model(config.model.name) or config.model.source,
    }
    records = _records(run / "metrics.jsonl")
    if start := next((r["start"] for r in records if isinstance(r.get("start"), dict)), None):  # a warm start
        about["start"] = {key: start.get(key) for key in ("from", "round", "sha256")}
    privacy = None
    if config.privacy.kind != "none":
        unit = {"record": "one training row of a client", "user": "one client with all its rows"}[config.privacy.kind]
        reported = [v for r in records if (v := _number(r, "epsilon")) is not None]
        spent = max([*reported, *_epsilon_on_card(run / "adapter" / "README.md")], default=None)
        privacy = {"kind": config.privacy.kind, "unit": unit, "epsilon": spent, "delta": config.privacy.delta}
    return {"provenance": about, "metric": _metric(records, spec.version, origin.client), "privacy": privacy}


def _model(name: str) -> str:
    """A hub name, or the last part of a folder's path: the full path on the run's machine is private."""
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).is_dir() else name


def _metric(records: list[dict[str, Any]], version: int, client: str | None) -> dict[str, Any] | None:
    """Name, value and round of the primary metric of the run or the client, in the adapter's round or the last one evaluated before."""
    every = [r for r in records if r.get("client") is not None]
    of_client = [r for r in every if r["client"] == client]
    for mine in ([r for r in records if r.get("client") is None], every) if client is None else (of_client,):
        for name in metrics():
            found = [(r["round"], v) for r in mine if r["round"] <= version and (v := _number(r, name)) is not None]
            if found:
                last = max(when for when, _ in found)
                values = [v for when, v in found if when == last]
                return {"name": name, "value": sum(values) / len(values), "round": last}
    return None


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = content_of(path).split(b"\n")
    out = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or type(record.get("round")) is not int:
                raise ValueError("not an object with a round")
        except ValueError as bad:
            if i >= len(lines) - 1:  # an incomplete last line, left by a kill
                break
            raise CheckpointError(f"{path} line {i + 1} is damaged ({bad}): restore it or delete that line") from None
        out.append(record)
    return out


def _number(record: dict[str, Any], key: str) -> float | None:
    v = record.get(key)
    return float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) else None


def _epsilon_on_card(path: Path) -> list[float]:
    """ε as written by `report.card`, to three digits."""
    if not path.is_file():
        return []
    found = re.search(r"privacy: \(ε, δ\) = \(([0-9.e+-]+), ", read_text(path))
    return [float(found[1])] if found else []
