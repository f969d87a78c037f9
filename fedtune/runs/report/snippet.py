"""Commands and code for an adapter's card that load the trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.task import task_of

if TYPE_CHECKING:
    from fedtune.models import Backbone


def how_to_load(adapter: Path, config: dict[str, Any], backbone: "Backbone", outputs: int) -> list[str]:
    """Markdown lines that load the trained model: with PEFT if that gives the same model, else by an export, else with fedtune.

    Args:
        adapter: The folder that `save_peft` wrote.
        config: The run's config.
        backbone: The run's backbone.
        outputs: Outputs of the task's head; 0 without one.
    """
    from fedtune.models.methods import mergeable  # imported late: a report of a finished run needs no models

    method, trusted = config["peft"]["method"], ", trust_remote_code=True" * config["model"]["trust_remote_code"]
    task = task_of(TaskConfig(**config["task"]))
    auto = task.auto_class(backbone.seq2seq)
    why = _why_not_peft(adapter, config, backbone)
    if not why:
        return _with_peft(config, backbone, auto, trusted, outputs)
    if not mergeable(method):
        return _with_fedtune(why, config, outputs)
    return [
        f"- {why}. `fedtune export` writes the merged model:",
        "\n```sh\nfedtune export path/to/this/run --out merged\n```",
        f'\n```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("merged"{trusted})\n```\n',
    ]


def _why_not_peft(adapter: Path, config: dict[str, Any], backbone: "Backbone") -> str:
    """Why PEFT on the checkpoint does not give the trained model; "" if it does."""
    if config["peft"]["init"] == "loftq":
        return (
            f"the adapter includes the quantization error of the backbone's {config['model']['precision']} weights (peft.init=loftq), so it"
            " does not fit the checkpoint's own weights"
        )
    if config["model"]["init"] == "random":
        return "trained on a random backbone (model.init=random), which is in no checkpoint"
    if backbone.completed:
        return f"the checkpoint lacks '{backbone.completed[0]}', which transformers initializes randomly and fedtune sets to the identity"
    return "" if (adapter / "adapter_config.json").is_file() else f"PEFT cannot open adapters of peft.method={config['peft']['method']}"


def _with_peft(config: dict[str, Any], backbone: "Backbone", auto: str, trusted: str, outputs: int) -> list[str]:
    from fedtune.models.checkpoint import read_config

    model = config["model"]
    name = backbone.name if model["source"] == "hub" else "path/to/fedtune/models/nano"
    given = f", num_labels={outputs}" * bool(outputs) + f", revision={model['revision']!r}" * bool(model["revision"]) + trusted
    lines = [f"from peft import PeftModel\nfrom transformers import {auto}\n", f"base = {auto}.from_pretrained({name!r}{given})"]
    stored, pad = read_config(backbone.folder), backbone.model.config.get_text_config().pad_token_id
    if outputs and stored.get("text_config", stored).get("pad_token_id") != pad:  # a decoder classifies at the last token before padding
        lines.append(f"base.config.get_text_config().pad_token_id = {pad}")
    return ["\n```python", *lines, 'model = PeftModel.from_pretrained(base, "path/to/this/folder")', "```\n"]


def _with_fedtune(why: str, config: dict[str, Any], outputs: int) -> list[str]:
    def call(default: ModelConfig | PeftConfig | TaskConfig, values: dict[str, Any]) -> str:
        given = [f"{name}={value!r}" for name, value in values.items() if value != getattr(default, name)]
        return f"{type(default).__name__}({', '.join(given)})"

    size = f", num_labels={outputs}" if outputs else ""
    seed = f", seed={config['seed']}" if config["model"]["init"] == "random" else ""
    return [
        f"- {why}, and the adapter cannot be merged into weights: load it with fedtune"
        + ("" if outputs else ", or use `fedtune export`, then `fedtune generate` with the exported folder"),
        "\n```python",
        "from pathlib import Path\n",
        "from fedtune.config import ModelConfig, PeftConfig, TaskConfig",
        "from fedtune.models import LiveAdapter, load_backbone\nfrom fedtune.contracts.adapter_state import AdapterState\n",
        f"task = {call(TaskConfig(), config['task'])}",
        f"backbone = load_backbone({call(ModelConfig(), config['model'])}, task{size}{seed})",
        f"adapter = LiveAdapter(backbone, {call(PeftConfig(), config['peft'])}, task)",
        'adapter.load(AdapterState.load(Path("path/to/this/folder/fedtune.safetensors")))',
        "model = adapter.model.eval()",
        "```\n",
    ]
