"""A turn's `Work` built by hand, as `clients/app.py` does for a message."""

from collections.abc import Sequence
from typing import Any

from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.turns import Work
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DeviceClass, TaskConfig
from fedtune.contracts.plan import Plan
from fedtune.data import Example


def work(live: Any, examples: Sequence[Example], plan: Plan, task: TaskConfig, pad_id: int = 2, **more: Any) -> Work:
    """The work of a loaded slot, starting from its current tensors."""
    start = more.pop("start", None) or live.read(version=plan.base_version)
    return Work(live=live, start=start, plan=plan, task=task, examples=examples, pad_id=pad_id, **more)


def host_for(config: Config, device: DeviceClass | None = None, loaded: Workspace | None = None) -> ClientHost:
    """A host with temporary storage."""
    return ClientHost(config, Storage.temporary(config), device, loaded=loaded)


def work_in(space: Workspace, plan: Plan, **more: Any) -> Work:
    """The work of a workspace's own slot on the training rows of the plan's client."""
    rows = more.pop("examples", None) or space.examples(plan.client, "train")
    return work(space.live, rows, plan, space.config.task, space.pad_id, **more)
