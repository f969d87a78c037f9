"""The card of an adapter: what it is, how it came about, how to use it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.report.summary import Record, primary_metric, rounds, value


def write_card(
    run_dir: Path, config: dict[str, Any], spec: dict[str, Any], prompt: str | None, labels: list[str], records: Sequence[Record]
) -> None:
    """Write `adapter/README.md` over the blank one that PEFT leaves."""
    metric, done = primary_metric(records), rounds(records)
    scores = [(r["round"], v) for r in done if (v := value(r, metric)) is not None]
    classes = config["task"]["kind"] == "classification"
    auto = "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"
    base = config["model"]["name"] or "fedtune's embedded backbone (fedtune/models/nano)"
    folder = config["model"]["name"] or "path/to/fedtune/models/nano"
    size = f", num_labels={len(labels)}" if classes else ""
    lines = [
        "---\nlibrary_name: peft\n---",
        f"# {config['name']}: {config['peft']['method']} adapter, federated",
        f"- backbone: {base}, fingerprint `{spec['base']}`",
        f"- task: {config['task']['kind']}; data: {config['data']['source']} {config['data']['name'] or config['data']['path']}".rstrip(),
        f"- strategy: `{config['strategy']['_target_']}`, {config['rounds']} rounds of up to {config['clients_per_round']} clients",
        f"- seed: {config['seed']}; every setting is in the run's config.yaml",
    ]
    if scores:
        (first, before), (last, after) = scores[0], scores[-1]
        lines.append(
            f"- {metric} on the global test: {before:.4g} in round {first} (0 is the untuned backbone), {after:.4g} after round {last}"
        )
    if prompt:
        lines.append(f"- prompt template: `{json.dumps(prompt)}`")
    if classes:
        lines.append(f"- labels, in the order of their ids: {', '.join(labels)}")
    lines += [
        "\n```python",
        f"from peft import PeftModel\nfrom transformers import {auto}\n",
        f"base = {auto}.from_pretrained({folder!r}{size})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```\n",
    ]
    (run_dir / "adapter" / "README.md").write_text("\n".join(lines), encoding="utf-8")
