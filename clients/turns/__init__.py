"""The client half of a method, one paper a file: what its clients do in a turn beside plain training, or instead of it.

A plan names the turn and gives its parameters: a class that this process has registered, or the `Turn` of the module of that name in this
folder. A name from a server leads nowhere else.
"""

from collections.abc import Mapping

from fedtune.clients.turns._base import Batch, Stack, Turn, Work
from fedtune.config.registry import Registry
from fedtune.contracts.plan import Plan, Scalar
from fedtune.errors import ConfigError, PlanError
from fedtune.storage.reading import read_fields

TURNS = Registry(__name__)


def register(name: str, kind: type[Turn]) -> None:
    """Make a turn that is written elsewhere, such as in a notebook, known to the clients of this process.

    Raises:
        ConfigError: The name is one of fedtune's own turns.
    """
    if name in TURNS.own():
        raise ConfigError(f"a turn cannot be called '{name}', for fedtune has one of that name: give it another")
    TURNS.register(name, kind)


def find(name: str) -> type[Turn]:
    """The class of a turn.

    Raises:
        PlanError: This client has no such turn.
    """
    try:
        return TURNS.find(name, Turn)
    except KeyError:
        asked = f"the plan asks for the turn '{name[:60]}'"
        raise PlanError(f"{asked}, which this client does not have: update fedtune on the client") from None


def turn_of(plan: Plan) -> Turn:
    """The plan's turn with the plan's parameters.

    Raises:
        PlanError: The turn, one of its parameters or a value is not known.
    """
    return make(plan.turn, plan.params)


def make(name: str, params: Mapping[str, Scalar]) -> Turn:
    """The turn of this name with these parameters.

    Raises:
        PlanError: The turn, one of its parameters or a value is not known.
    """
    kind = find(name)
    turn = kind(**read_fields(kind, params, PlanError, f"turn {name}"))
    turn.check()
    return turn


def check_private(plan: Plan) -> None:
    """Raises PlanError where the plan asks for privacy that does not cover its turn."""
    if plan.privacy != "none" and not find(plan.turn).private:
        raise PlanError(f"the plan asks for the turn '{plan.turn}', which privacy={plan.privacy} does not cover")


def batch_of(plan: Plan) -> type[Batch] | None:
    """The batched form of the plan's turn; None where clients take it one after the other."""
    return find(plan.turn).batch


__all__ = ["TURNS", "Batch", "Stack", "Turn", "Work", "batch_of", "check_private", "find", "make", "register", "turn_of"]
