"""The server's plan for one client in one round, and the client's update.

A `Plan` is one JSON string in the message's ConfigRecord (which does not support None or nesting). A client rejects an unknown field or
value, with its name. A new strategy should need only new plan values, rarely new client code.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ConfigError, PlanError, UpdateError
from fedtune.storage.ids import LONGEST_NAME, short
from fedtune.storage.reading import SCALAR as Scalar
from fedtune.storage.reading import read_object

PLAIN = "plain"  # name of the turn for ordinary training
OPTIMIZERS = ("adamw", "sgd")
MEASURES = ("start_loss",)
PRIVACIES = ("none", "record", "user")
ACCOUNTANTS = ("prv", "rdp")
_BOUNDS: dict[str, Any] = {
    "optimizer": {"choices": OPTIMIZERS},
    "privacy": {"choices": PRIVACIES},
    "dp_accountant": {"choices": ACCOUNTANTS},
    "batch_size": {"ge": 1},
    "accumulate": {"ge": 1},
    "steps": {"ge": 1},
}
_PRIVATE: dict[str, Any] = {  # bounds that apply to a plan with privacy
    "dp_clip": {"gt": 0},
    "dp_noise": {"gt": 0},
    "dp_epsilon": {"gt": 0},
    "dp_delta": {"gt": 0, "lt": 1},
    "dp_turns": {"ge": 1},
}
MAX_NUMBERS = 64  # maximum number of metrics and measurements in one update: the metrics file stores all of them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One client's work in one round.

    Args:
        round: The round, from 1.
        client: Logical id of the client.
        base_version: Version of the adapter in the message; the update must repeat it.
        turn: Name of the client side of the method, a turn in `clients/turns/`.
        params: Parameters of the turn, by name; the turn's class defines them.
        train: Patterns (see `matching`) of the tensors to train; the others stay fixed.
        send: Patterns of the tensors to send back.
        keep: Patterns of the client's personal tensors. The client keeps their values for its next turn. Its first turn starts from the
            sent values or from those drawn from the run's seed.
        rank: LoRA rank that the client's device requests; None means the config's. A strategy that mixes ranks uses it.
        measure: Extra measurements: `start_loss`, the mean loss over the client's rows before the first step.
        steps: Optimizer steps; None uses `epochs`.
        epochs: Passes over the client's rows.
        batch_size: Examples per micro-batch.
        accumulate: Micro-batches per optimizer step.
        optimizer: Local optimizer: AdamW or plain SGD.
        keep_optimizer: Whether the client continues the optimizer's state of its last turn; else each turn starts with a new state.
        lr: Learning rate of the first step.
        lr_last: Learning rate of the last step; linear in between. The server sets the schedule over rounds.
        weight_decay: Decoupled weight decay (both optimizers).
        clip_norm: Largest gradient norm over all trained tensors; None does not clip.
        codec: Encoding of the reply as a difference from the sent adapter, such as `topk=0.05+int8`; "" sends the tensors unencoded.
        privacy: `none`, `record` (the client trains with DP-SGD), or `user` (the client clips its update and adds noise).
        dp_clip: Largest norm of a row's gradient (`record`) or of the update (`user`).
        dp_noise: Standard deviation of the noise as a multiple of `dp_clip`; None: the client computes it from `dp_epsilon`.
        dp_epsilon: The client's budget ε over the run; None is unlimited.
        dp_delta: δ.
        dp_turns: Turns that the budget must cover.
        dp_accountant: Accountant that sums the privacy cost.
        seed: Seed of this turn's shuffling and dropout.
    """

    round: int
    client: str
    base_version: int
    turn: str = PLAIN
    params: Mapping[str, Scalar] = field(default_factory=dict)
    train: tuple[str, ...] = ("*",)
    send: tuple[str, ...] = ("*",)
    keep: tuple[str, ...] = ()
    rank: int | None = None
    measure: tuple[str, ...] = ()
    steps: int | None = None
    epochs: float | None = 1.0
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    keep_optimizer: bool = False
    lr: float = 1e-3
    lr_last: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    codec: str = ""
    privacy: str = "none"
    dp_clip: float = 1.0
    dp_noise: float | None = None
    dp_epsilon: float | None = None
    dp_delta: float = 1e-5
    dp_turns: int = 1
    dp_accountant: str = "prv"
    seed: int = 0

    def with_turn(self, turn: str, **params: Scalar) -> "Plan":
        """The plan with another turn.

        Raises:
            ConfigError: The plan already has a turn, such as `fedprox` from `client.prox`.
        """
        if self.turn not in (PLAIN, turn):
            raise ConfigError(f"the strategy needs the turn '{turn}', but the config sets the turn '{self.turn}': leave client.prox at 0")
        return dataclasses.replace(self, turn=turn, params=params)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan from the network.

        Raises:
            PlanError: `text` is not a plan, or has a field or value that this version does not know.
        """
        plan = read_object(cls, text, PlanError, "plan")
        for name, bounds in (_BOUNDS | (_PRIVATE if plan.privacy != "none" else {})).items():
            require(f"the plan's {name}", getattr(plan, name), PlanError, **bounds)
        if plan.privacy != "none" and plan.dp_noise is None and plan.dp_epsilon is None:
            raise PlanError(f"the plan asks for privacy={plan.privacy} but sets neither dp_noise nor dp_epsilon: set one of them")
        for measure in plan.measure:
            require("the plan's measure", measure, PlanError, choices=MEASURES)
        if plan.steps is None and plan.epochs is None:
            raise PlanError("the plan sets neither steps nor epochs: set one of them")
        return plan


@dataclass(frozen=True, kw_only=True)
class Update:
    """One client's reply to its plan.

    Args:
        client: Logical id.
        round: The plan's round.
        base_version: Version of the adapter at the start of training.
        adapter: The trained tensors, possibly of this client's own rank.
        examples: Training rows that the client used: the n_k of the weighted mean.
        metrics: Name → number, such as `loss`.
        measurements: Name → number for a strategy or the report, such as `steps`, `seconds`, `peak_mb`, `virtual_s`.
        device_class: The client's device class; "" if it has none.
        precision: Precision of the frozen backbone that the device chose; "" for the config's.
    """

    client: str
    round: int
    base_version: int
    adapter: AdapterState = field(repr=False)
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    measurements: Mapping[str, float] = field(default_factory=dict)
    device_class: str = ""
    precision: str = ""

    def to_json(self) -> str:
        """All fields except the tensors; an empty precision is omitted."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "adapter"}
        return json.dumps({n: v for n, v in out.items() if n != "precision" or v})

    @classmethod
    def from_json(cls, text: str, adapter: AdapterState) -> "Update":
        """Read an update from the network.

        Raises:
            UpdateError: `text` is not an update, or a number is out of range.
            OverflowError: An integer is too large for a float.
        """
        update = read_object(cls, text, UpdateError, "update", adapter=adapter)
        require("the update's examples", update.examples, UpdateError, ge=1)
        if len(update.metrics) + len(update.measurements) > MAX_NUMBERS:
            count = len(update.metrics) + len(update.measurements)
            raise UpdateError(f"the update reports {count} numbers, more than the limit of {MAX_NUMBERS}: report fewer metrics")
        for name in (*update.metrics, *update.measurements, update.device_class, update.precision):
            if not short(name):
                raise UpdateError(f"the update has the name {name[:20]!r}…: names have at most {LONGEST_NAME} printable characters")
        for number in (update.examples, *update.metrics.values(), *update.measurements.values()):
            float(number)
        return update


@dataclass(frozen=True, kw_only=True)
class LateUpdate:
    """A good update that arrived after its round.

    Args:
        update: The update; `adapter` contains Δ = w_k − w_τ instead of the tensors, at least in float32.
        due: The round in which it is aggregated.
    """

    update: Update
    due: int


def matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The names, in order, that match a pattern (fnmatch) and no negated pattern (one that begins with `!`)."""
    wanted, unwanted = [p for p in patterns if p[0] != "!"], [p[1:] for p in patterns if p[0] == "!"]

    def match(name: str, any_of: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in any_of)

    return [n for n in names if match(n, wanted) and not match(n, unwanted)]


__all__ = [
    "ACCOUNTANTS",
    "LONGEST_NAME",
    "MEASURES",
    "MAX_NUMBERS",
    "OPTIMIZERS",
    "PLAIN",
    "PRIVACIES",
    "Plan",
    "Scalar",
    "Update",
    "matching",
    "short",
]
