"""What the server asks of one client in one round, and what comes back.

A `Plan` is one JSON string in the message's ConfigRecord (which takes no None and no nesting). A client refuses, by name, what it does not
understand. A new strategy should need new Plan values, seldom new client code.
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

PLAIN = "plain"  # the turn that only trains
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
_PRIVATE: dict[str, Any] = {  # of a plan that asks for privacy
    "dp_clip": {"gt": 0},
    "dp_noise": {"gt": 0},
    "dp_epsilon": {"gt": 0},
    "dp_delta": {"gt": 0, "lt": 1},
    "dp_turns": {"ge": 1},
}
MOST_NUMBERS = 64  # of what a client says about itself: every line of the metrics holds it


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One client's work in one round.

    Args:
        round: The round, from 1.
        client: Logical id of the client.
        base_version: Version of the adapter that the message carries; the update must name the same.
        turn: What the client does beside plain training, or instead of it: the name of a turn in `clients/turns/`.
        params: Parameters of the turn, by name; the turn's class says which there are.
        train: Patterns of the tensors to train, as `matching` reads them; the rest stay as sent.
        send: Patterns of the tensors to send back.
        keep: Patterns of the tensors that are the client's own: it goes on with them as it left them in its last turn (in its first, as
            sent or as drawn from the run's seed), and keeps them for its next.
        rank: LoRA rank that the client's device asks for; None is the config's. A strategy that can mix ranks heeds it.
        measure: What to measure beside the usual: `start_loss`, the mean loss over the client's rows before the first step.
        steps: Optimizer steps; None goes by `epochs`.
        epochs: Passes over the client's rows.
        batch_size: Examples of one micro-batch.
        accumulate: Micro-batches of one optimizer step.
        optimizer: Local optimizer, fresh each round: AdamW, or plain SGD.
        lr: Learning rate of the first step ...
        lr_last: ... and of the last; between them it is linear. The schedule over rounds is the server's.
        weight_decay: Decoupled weight decay (both optimizers).
        clip_norm: Largest gradient norm, over all trained tensors; None leaves it.
        codec: How the reply is encoded, such as `topk=0.05+int8`, as the difference from what was sent; "" sends the tensors as they are.
        privacy: What the client does for it: nothing, DP-SGD (`record`), or its own noise on its clipped update (`user`).
        dp_clip: Largest norm of a row's gradient, or of the update.
        dp_noise: Standard deviation of the noise as a multiple of `dp_clip`; None has the client solve for `dp_epsilon`.
        dp_epsilon: The client's budget over the run; None is without bounds.
        dp_delta: δ.
        dp_turns: Turns that the budget must last for.
        dp_accountant: How the cost is added up.
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
            ConfigError: The plan has a turn already, such as the proximal one of `client.prox`.
        """
        if self.turn not in (PLAIN, turn):
            raise ConfigError(
                f"the strategy's clients take the turn '{turn}', and the config asks for the turn '{self.turn}': leave client.prox at 0"
            )
        return dataclasses.replace(self, turn=turn, params=params)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan that came over the network.

        Raises:
            PlanError: Not a plan, or it asks for something that this version does not know.
        """
        plan = read_object(cls, text, PlanError, "plan")
        for name, bounds in (_BOUNDS | (_PRIVATE if plan.privacy != "none" else {})).items():
            require(f"the plan's {name}", getattr(plan, name), PlanError, **bounds)
        if plan.privacy != "none" and plan.dp_noise is None and plan.dp_epsilon is None:
            raise PlanError(f"the plan asks for privacy={plan.privacy} with neither noise nor epsilon, which promises nothing")
        for measure in plan.measure:
            require("the plan's measure", measure, PlanError, choices=MEASURES)
        if plan.steps is None and plan.epochs is None:
            raise PlanError("plan sets neither steps nor epochs: the client cannot know how much to train")
        return plan


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sends back.

    Args:
        client: Logical id.
        round: The round it answers.
        base_version: Version of the adapter that it started from.
        adapter: The tensors sent, possibly of this client's own rank.
        examples: Training rows that the client holds and used: the n_k of the weighted mean.
        metrics: Name → number, such as `loss`.
        measurements: Name → number that a strategy or the report needs, such as `steps`, `seconds`, `peak_mb`, `virtual_s`.
        device_class: The client's device class, "" where there is none.
        precision: Of the frozen backbone that a device chose; "" where it is the config's.
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
        """Everything but the tensors, and a precision only where there is one."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "adapter"}
        return json.dumps({n: v for n, v in out.items() if n != "precision" or v})

    @classmethod
    def from_json(cls, text: str, adapter: AdapterState) -> "Update":
        """Read an update that came over the network.

        Raises:
            UpdateError: Not an update, or its numbers cannot be.
            OverflowError: A whole number is too large for a float.
        """
        update = read_object(cls, text, UpdateError, "update", adapter=adapter)
        require("the update's examples", update.examples, UpdateError, ge=1)
        if len(update.metrics) + len(update.measurements) > MOST_NUMBERS:
            count = len(update.metrics) + len(update.measurements)
            raise UpdateError(f"the update reports {count} numbers, at most {MOST_NUMBERS} are allowed: report fewer metrics")
        for name in (*update.metrics, *update.measurements, update.device_class, update.precision):
            if not short(name):
                raise UpdateError(f"the update has the name {name[:20]!r}…, wanted are at most {LONGEST_NAME} printable characters")
        for number in (update.examples, *update.metrics.values(), *update.measurements.values()):
            float(number)
        return update


@dataclass(frozen=True, kw_only=True)
class LateUpdate:
    """A good update that its round did not wait for.

    Args:
        update: The update; `adapter` holds Δ = w_k − w_τ in place of the tensors, in float32 at least.
        due: The round in which it counts.
    """

    update: Update
    due: int


def matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that match any of the patterns (fnmatch) and none of those that begin with `!`, in their own order."""
    wanted, unwanted = [p for p in patterns if p[0] != "!"], [p[1:] for p in patterns if p[0] == "!"]

    def match(name: str, any_of: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in any_of)

    return [n for n in names if match(n, wanted) and not match(n, unwanted)]


__all__ = [
    "ACCOUNTANTS",
    "LONGEST_NAME",
    "MEASURES",
    "MOST_NUMBERS",
    "OPTIMIZERS",
    "PLAIN",
    "PRIVACIES",
    "Plan",
    "Scalar",
    "Update",
    "matching",
    "short",
]
