"""The model card of an adapter: training, results, privacy and use."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.privacy.ledger import most_spent
from fedtune.runs.report.snippet import how_to_load
from fedtune.runs.report.summary import Record, earlier_result, primary_metric, rounds, value

if TYPE_CHECKING:
    from fedtune.models import Backbone


def write_card(
    run_dir: Path,
    config: dict[str, Any],
    spec: dict[str, Any],
    prompt: str | None,
    labels: list[str],
    records: Sequence[Record],
    backbone: "Backbone",
    note: str = "",
) -> None:
    """Write `adapter/README.md` over PEFT's template.

    Args:
        run_dir: The run directory, with its `adapter/` already written.
        config, spec, prompt, labels, records, backbone: The run's.
        note: A limitation of the adapter; "" for none.
    """
    metric, done = primary_metric(records), rounds(records)
    scores = [(r["round"], v) for r in done if (v := value(r, metric)) is not None]
    task = task_of(TaskConfig(**config["task"]))
    base = config["model"]["name"] or "fedtune's embedded backbone (fedtune/models/nano)"
    lines = [
        "---\nlibrary_name: peft\n---",
        f"# {config['name']}: {config['peft']['method']} adapter, federated",
        f"- backbone: {base}, fingerprint `{spec['base']}`",
        f"- task: {config['task']['kind']}; data: {config['data']['source']} {config['data']['name'] or config['data']['path']}".rstrip(),
        f"- strategy: `{config['strategy']['_target_']}`, {config['rounds']} rounds of up to {config['clients_per_round']} clients",
        f"- seed: {config['seed']}; every setting is in the run's config.yaml",
    ]
    if note:
        lines.append(f"- {note}")
    start = next((r["start"] for r in done if "start" in r), None)
    if start:
        lines.append(
            f"- warm start: from the adapter of `{start['from']}` (round {start['round']}, file's sha256 `{start['sha256']}`); the rows"
            " that trained it are not among those described here, and the privacy below does not cover them"
        )
    if scores:
        (first, before), (last, after) = scores[0], scores[-1]
        what = "the untuned backbone" if start is None else "the start"
        lines.append(f"- {metric} on the global test: {before:.4g} in round {first} (0 is {what}), {after:.4g} after round {last}")
    if kept := earlier_result(done):
        lines.append(f"- {kept.sentence()}")
    lines += _privacy(config["privacy"], _spent(run_dir, config["privacy"], records))
    if prompt:
        lines.append(f"- prompt template: `{json.dumps(prompt)}`")
    if task.conversational:
        lines.append("- prompts: conversations in the chat template of chat_template.jinja (transformers: tokenizer.apply_chat_template)")
    if task.classes:
        lines.append(f"- labels, in the order of their ids: {', '.join(labels)}")
    lines += how_to_load(run_dir / "adapter", config, backbone, task.outputs(len(labels)))
    (run_dir / "adapter" / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _spent(run_dir: Path, p: dict[str, Any], records: Sequence[Record]) -> list[float]:
    """ε of the clients, as far as this machine knows. Includes the run's ledgers: the metrics lack turns whose reply was lost, and turns
    after the checkpoint that the run resumed from."""
    if p["kind"] == "none":
        return []
    reported = [v for r in records if (v := value(r, "epsilon")) is not None]
    recorded = most_spent(run_dir / "privacy", p["delta"], p["accountant"])
    return [*reported, *[recorded] * (recorded > 0)]


def _privacy(p: dict[str, Any], spent: Sequence[float]) -> list[str]:
    """The privacy guarantee, its unit and its assumptions."""
    if p["kind"] == "none":
        return ["- privacy: no differential privacy"]
    cost = f"(ε, δ) = ({max(spent):.3g}, {p['delta']:g})" if spent else f"no private turn was taken (δ = {p['delta']:g})"
    if p["kind"] == "record":
        unit = (
            "one training row of a client (one block of text if task.stride_texts joins texts), its contribution replaced by zero;"
            " the number of rows n is fixed (zero-out adjacency)"
        )
        how = "Poisson sampling of each step's rows; a client pays for each turn it takes, without amplification by sampling of clients"
        bound = f"each row's gradient clipped to norm {p['clip']:g} over all trained tensors (DP-SGD)"
    else:
        local = p["where"] == "client"
        zeroed = "its contribution replaced by zero; the planned cohort m is fixed (zero-out adjacency)"
        unit = "one client with all its rows, " + ("replaced by any other" if local else zeroed)
        how = "fixed-size cohorts, known to the server: no amplification by sampling is claimed; a client pays for each turn that counts"
        clip = f"an adaptive norm (quantile {p['clip_quantile']:g}, start {p['clip']:g})" if p["adaptive"] else f"norm {p['clip']:g}"
        bound = f"each update clipped to {clip} over all sent tensors, noise added by the {p['where']}"
    accountant = {"prv": "PRV, upper bound", "rdp": "RDP"}[p["accountant"]]
    disclosed = "metrics that clients report on held-out rows (none with eval.clients=0)"
    if p["kind"] == "user" and p["where"] == "server":
        disclosed += ", training statistics that they report to the server (losses, device, memory, time; in metrics.jsonl)"
    else:
        disclosed += ", when a reply arrives, whether and why a turn fails"
    lines = [
        f"- privacy: {cost} for the client that spent most; accountant: {accountant}",
        f"- privacy unit: {unit}",
        f"- privacy sampling: {how}; counts of rows and of blocks of text are public",
        f"- privacy clipping: {bound}",
        f"- not covered: {disclosed}, and decisions that people based on these",
    ]
    if not p["secure_rng"]:
        lines.append("- the noise was drawn from the run's seed (a simulation): anyone who knows the seed can subtract it")
    return lines
