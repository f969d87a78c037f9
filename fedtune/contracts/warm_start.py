"""The start of a run that continues an earlier adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtune.contracts.adapter_state import AdapterState


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The model before round 1: W0 + `shifts` + `adapter`.

    Args:
        adapter: The adapter of version 0. Unless clients can draw it, the server sends it where a message omits some of its tensors.
        shifts: What is merged into the frozen weights from the start: at most one shift, of version 0.
        about: Where it comes from, as JSON types, for round 0 of the metrics and the model cards.
    """

    adapter: AdapterState
    shifts: tuple[AdapterState, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
