"""Reads the source of an export: a run, a client's folder in a run, an adapter folder, or a complete model."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import Config, ModelConfig, TaskConfig, template_text
from fedtune.config.stored import read_config, read_labels
from fedtune.contracts.task import adapter_tasks, task_of
from fedtune.data.columns import DEMO_PROMPT
from fedtune.errors import CheckpointError, ModelError
from fedtune.export.personal import ClientState, client_of, global_note, personal_adapter, run_of
from fedtune.export.whole_model import is_whole, read_whole
from fedtune.models.adapter_folder import OVER, OWN, StoredAdapter, read_adapter
from fedtune.models.checkpoint import NANO, fingerprint


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The source of an export.

    Args:
        source: The run directory, the adapter folder, or a complete model.
        config: The run's config; None for a bare adapter folder or model.
        adapter: The trained adapter; for a complete model, one that changes nothing.
        labels: Names of a classifier's classes.
        task: The task of the run or the adapter.
        model: The backbone's config, for float32 on the CPU.
        settings: Arguments of `load_backbone`.
        whole: A complete model's card, {} if it has none; None for other sources.
        run: The run directory; None for a bare adapter folder or model.
        client: The client of a personal model; None for the global model.
        note: What a global adapter lacks, or which state a personal one has; "" if there is nothing to say.
    """

    source: Path
    config: Config | None
    adapter: StoredAdapter
    labels: list[str]
    task: TaskConfig
    model: ModelConfig
    settings: dict[str, Any]
    whole: dict[str, Any] | None = None
    run: Path | None = None
    client: str | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """A name for programs that serve several models: lower-case letters, digits, - and _."""
        own = self.config.name if self.config else self.source.resolve().name
        return re.sub(r"[^a-z0-9_-]+", "-", own.lower()).strip("-_") or "model"

    @property
    def card(self) -> dict[str, Any]:
        """Task, prompt template and longest answer, for programs that run the model."""
        if self.whole is not None:
            own = self.whole or {"task": self.task.kind, "prompt": None, "max_new_tokens": None}
            return {name: own[name] for name in ("task", "prompt", "max_new_tokens")}
        longest = self.task.max_new_tokens if self.config and task_of(self.task).prompted else None
        about = {"client": self.client, "note": self.note or None}
        card = {"task": self.task.kind, "prompt": prompt_template(self.config), "max_new_tokens": longest}
        return {**card, **{name: value for name, value in about.items() if value is not None}}


def read_origin(source: Path, *, state: ClientState | None = None, trust_remote_code: bool = False) -> Origin:
    """Read a run directory, a client's folder in it, an adapter folder, or a complete model, without the backbone's weights.

    Args:
        source: The folder; a client's folder need not exist if the client has only a turn's state.
        state: State from elsewhere of the client whose personal model this is, for a run or an adapter folder.
        trust_remote_code: Whether code in the backbone's folder may run; `source` itself cannot allow it.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter, or as in `personal_adapter`.
        ModelError: The adapter is invalid, or as in `personal_adapter` or `read_whole`.
    """
    whole, run, note = None, None, ""
    if is_whole(source):
        (adapter, whole), config, labels = read_whole(source), None, []
    else:
        own = client_of(source)
        run, state = own.folder.parent if own else run_of(source), state or own
        config, adapter, labels = _read(run or source)
        if state:
            adapter, note = personal_adapter(adapter, state)
        else:
            note = global_note(run, adapter.state, adapter.shifts)
    task = config.task if config else _task(adapter, source)
    if config and config.peft.init == "loftq" and not adapter.over:
        raise ModelError(f"{source / 'adapter' / OVER} is missing, which names the adapter's base weights: the run is damaged")
    model, settings = _model_config(config, adapter, source), _settings(config, adapter, task)
    model.trust_remote_code = trust_remote_code
    return Origin(
        source=source,
        config=config,
        adapter=adapter,
        labels=labels,
        task=task,
        model=model,
        settings=settings,
        whole=whole,
        run=run,
        client=state.client if state else None,
        note=note,
    )


def check_base(origin: Origin, fingerprint: str, name: str) -> None:
    """Raise ModelError if the adapter belongs to a backbone with another fingerprint."""
    mark = origin.adapter.state.spec.base
    if mark and mark != fingerprint:
        raise ModelError(
            f"the adapter in {origin.source} belongs to the backbone {mark}, but {name} is {fingerprint}:"
            " use the checkpoint that it was trained on"
        )


def prompt_template(config: Config | None) -> str | None:
    """The run's prompt template; None if prompts are used unchanged or in the chat template."""
    if config is None or not task_of(config.task).prompted or task_of(config.task).conversational:
        return None
    if config.data.prompt is not None:
        return template_text(config.data.prompt)
    if "{" in (column := config.data.columns.get("prompt", "")):
        return template_text(column)
    if config.data.source != "demo":
        return None
    return DEMO_PROMPT


def _read(source: Path) -> tuple[Config | None, StoredAdapter, list[str]]:
    """Return the run's config (None for a bare adapter folder), the adapter, and a classifier's label names."""
    if not source.is_dir():
        raise CheckpointError(f"there is no folder {source}: give a run directory, a PEFT adapter folder or a model")
    if not (source / "config.yaml").is_file():
        return None, read_adapter(source), []
    if not any((source / "adapter" / name).is_file() for name in (OWN, "adapter_config.json")):
        raise CheckpointError(f"{source} has no adapter/ yet: the run has not ended, continue it with resume={source}")
    return read_config(source), read_adapter(source / "adapter"), read_labels(source)


def _task(adapter: StoredAdapter, source: Path) -> TaskConfig:
    kinds = adapter_tasks()
    if adapter.task_type not in kinds:
        raise ModelError(f"{source}: task_type={adapter.task_type or 'unknown'} cannot be exported: {', '.join(kinds)} can")
    return TaskConfig(kind=kinds[adapter.task_type], max_length=2)


def _model_config(config: Config | None, adapter: StoredAdapter, source: Path) -> ModelConfig:
    """The backbone's config, for float32 on the CPU."""
    if config:
        return dataclasses.replace(config.model, precision="fp32", device="cpu")
    # An adapter of the embedded backbone names the folder of the machine that trained it
    if adapter.state.spec.base and (NANO / "config.json").is_file() and adapter.state.spec.base == fingerprint(NANO):
        return ModelConfig(source="nano", device="cpu")
    if not adapter.base:
        raise ModelError(f"{source} does not name its backbone: set base_model_name_or_path in its adapter_config.json")
    return ModelConfig(source="hub", name=adapter.base, device="cpu")


def _settings(config: Config | None, adapter: StoredAdapter, task: TaskConfig) -> dict[str, Any]:
    # The last matrix of a head has a row for each class
    tensors = {**adapter.state.tensors, **adapter.heads}
    classes = [t.shape[0] for n, t in tensors.items() if t.ndim == 2 and n.endswith("weight")]
    return {"num_labels": classes[-1] if classes and task_of(task).head else 0, "seed": config.seed if config else 0}
