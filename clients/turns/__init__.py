"""The client side of each method, one paper per file: a client's work in a turn, in addition to plain training or instead of it.

A plan contains the turn's name and parameters. The name is that of a class registered in this process, or of a module in this folder that
defines one `Turn`. The client rejects any other name from a server.
"""

from collections.abc import Mapping

from fedtune.clients.turns._base import BatchedTurn, Loss, Minibatch, Stack, Turn, Work
from fedtune.config.registry import Registry
from fedtune.contracts.plan import Plan, Scalar
from fedtune.errors import ConfigError, PlanError
from fedtune.storage.reading import read_fields

TURNS = Registry(__name__, "fedtune.clients.turns._base.Turn")


def register(name: str, kind: type[Turn]) -> None:
    """Register your own turn, such as one from a notebook, for the clients of this process.

    Raises:
        ConfigError: fedtune has a turn of this name.
    """
    if name in TURNS.own():
        raise ConfigError(f"a turn cannot be called '{name}', because fedtune has a turn of that name: choose another name")
    TURNS.register(name, kind)


def find(name: str) -> type[Turn]:
    """The class of a turn.

    Raises:
        PlanError: This client has no such turn.
    """
    try:
        return TURNS.find(name)
    except KeyError:
        raise PlanError(
            f"the plan asks for the turn '{name[:60]}', which this client does not have: update fedtune on the client"
        ) from None


def turn_of(plan: Plan) -> Turn:
    """The plan's turn with the plan's parameters.

    Raises:
        PlanError: The turn or a parameter is unknown, or a value is invalid.
    """
    return make(plan.turn, plan.params)


def make(name: str, params: Mapping[str, Scalar]) -> Turn:
    """The turn of this name with these parameters.

    Raises:
        PlanError: The turn or a parameter is unknown, or a value is invalid.
    """
    kind = find(name)
    turn = kind(**read_fields(kind, params, PlanError, f"turn {name}"))
    turn.check()
    return turn


def check_private(plan: Plan) -> None:
    """Raises PlanError if the plan's privacy does not cover its turn."""
    if plan.privacy != "none" and plan.privacy not in find(plan.turn).private:
        raise PlanError(f"the plan asks for the turn '{plan.turn}', which privacy={plan.privacy} does not cover")


def batched_turn_of(plan: Plan) -> type[BatchedTurn] | None:
    """The batched form of the plan's turn; None if clients run the turn one at a time."""
    return find(plan.turn).batched


__all__ = [
    "TURNS",
    "BatchedTurn",
    "Loss",
    "Minibatch",
    "Stack",
    "Turn",
    "Work",
    "batched_turn_of",
    "check_private",
    "find",
    "make",
    "register",
    "turn_of",
]
