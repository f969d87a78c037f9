"""Describes a client's turns for its log: one sentence for a person, and the same figures as fields."""

from collections.abc import Mapping
from typing import Any

from flwr.app import Message, RecordDict

from fedtune.contracts.delivery import DELIVER, END, DeliveryState, Manifest
from fedtune.contracts.hello import REJECTED
from fedtune.errors import PlanError
from fedtune.storage.parsing import parse_json


def describe(message: Message, reply: Message, seconds: float) -> tuple[str, dict[str, Any]]:
    """Describe a request and its reply in a sentence, with its figures for the log.

    Args:
        message: The server's request.
        reply: This client's reply.
        seconds: Time to produce the reply.

    Returns:
        "" if there is nothing to tell.
        For a turn: its round, steps, seconds, loss and bytes, as far as the plan discloses them. For a refusal: its reason.
    """
    kind, group = message.metadata.message_type.split(".")[0], message.metadata.group_id
    if kind == "query":
        what, fields = "", {}
    else:
        what, fields = (f"round {group}: ", {"round": int(group)}) if group.isdecimal() else ("", {})
    if reply.has_error():
        return f"{what}could not answer: {reply.error.reason}", {**fields, "why": reply.error.reason}
    if (declined := reply.content.config_records.get("declined")) is not None:
        why, sort = str(declined.get("why", "")), str(declined.get("kind", "failed"))
        verb = {"query": "cannot take part", "evaluate": "did not evaluate"}.get(kind, "did not train")
        verb = "did not install the model" if message.metadata.message_type == DELIVER else verb
        return f"{what}{verb} ({sort}): {why}", {**fields, "declined": sort, "why": why}
    if message.metadata.message_type == DELIVER:
        return _delivery(message.content, reply.content)
    if message.metadata.message_type == REJECTED:
        why = _short(message.content.config_records.get("rejected", {}).get("why"))
        return f"the server does not let this client take part: {why}", {"why": why}
    if message.metadata.message_type == END:
        end = message.content.config_records.get("end", {})
        return f"run {_short(end.get('run'))} has ended after {end.get('rounds')} rounds", {"run": _short(end.get("run"))}
    if kind == "query":
        run, hello = _json(message.content, "hello").get("run"), _json(reply.content, "hello")
        rows = f"{hello.get('examples', 0)} training rows and {hello.get('held_out', 0)} held-out rows"
        device = f"; this device: {hello['device']}" if hello.get("device") else ""
        return f"takes part in run {_short(run)} as client {hello.get('client')}, with {rows}{device}", {"run": _short(run)}
    fields |= {"seconds": round(seconds, 3), "bytes_down": tensor_bytes(message.content), "bytes_up": tensor_bytes(reply.content)}
    traffic = f"{fields['bytes_down'] / 1e6:.2f} MB down, {fields['bytes_up'] / 1e6:.2f} MB up"
    if kind == "evaluate":
        metrics = _json(reply.content, "metrics")
        scores = ", ".join(f"{name} {v:.4g}" for name, v in sorted(metrics.items()) if isinstance(v, (int, float)))
        return f"{what}evaluated in {seconds:.1f} s: {scores or 'no scores'}; {traffic}", {**fields, **metrics}
    update = _json(reply.content, "update")
    steps, loss = update.get("measurements", {}).get("steps", 0), update.get("metrics", {}).get("train_loss")
    done = f"trained {steps:g} steps" if steps else "scored its rows without training"
    loss_text = "" if loss is None else f", loss {loss:.4g}"
    return f"{what}{done} in {seconds:.1f} s{loss_text}; {traffic}", {**fields, "steps": steps, "loss": loss}


def _delivery(content: RecordDict, reply: RecordDict) -> tuple[str, dict[str, Any]]:
    """Describe a message of a delivery; "" for a part in the middle of a download."""
    try:
        manifest = Manifest.from_json(str(content.config_records["manifest"]["text"]))
        state = DeliveryState.from_content(reply)
    except (KeyError, ValueError, PlanError):
        return "delivery: its messages cannot be read", {}
    what, fields = f"model of round {manifest.round} of run {_short(manifest.run)}", {"run": _short(manifest.run), "round": manifest.round}
    match state.state:
        case "wants" if "part" not in content.config_records:
            return f"downloads the {what}: {manifest.bytes / 1e6:.2f} MB, {state.have / 1e6:.2f} MB of them are here", fields
        case "wants":
            return "", fields
        case "kept":
            return f"keeps its present model: it scores better on this device's rows than the {what}", fields
        case _:
            which = f", its {state.chosen} form" if state.chosen else ""
            return f"installed the {what}{which}", fields


def tensor_bytes(content: RecordDict) -> int:
    """Bytes of the tensors in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _json(content: RecordDict, name: str) -> Mapping[str, Any]:
    """A record's JSON object; empty if missing or invalid."""
    try:
        found = parse_json(str(content.config_records[name]["json"]))
    except (KeyError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(name: object) -> str:
    """A name from the server, shortened and with only printable characters."""
    return "".join(c if c.isprintable() else " " for c in str(name or "")[:200])
