"""The client half of a method, one paper a file: what its clients do in a turn beside plain training, or instead of it.

A plan names the turn and gives its parameters. `find` looks for a class that was registered under the name, then for the `Turn` subclass in
the module of that name in this folder. A name from a server leads nowhere else.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping

from fedtune.clients.turns.base import Batch, Stack, Turn, Work
from fedtune.errors import ConfigError, PlanError
from fedtune.plan import Plan, Scalar
from fedtune.reading import read_fields

_REGISTERED: dict[str, type[Turn]] = {}
_NO_TURN = {"base"}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def register(name: str, kind: type[Turn]) -> None:
    """Make a turn that is written elsewhere, such as in a notebook, known to the clients of this process.

    Raises:
        ConfigError: The name is one of fedtune's own turns, or no name.
    """
    if not _NAME.fullmatch(name) or _is_own(name):
        raise ConfigError(f"a turn cannot be called '{name}': take a name of small letters, digits and _ that fedtune has no turn of")
    _REGISTERED[name] = kind


def _is_own(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in _NO_TURN and importlib.util.find_spec(f"{__name__}.{name}") is not None


def find(name: str) -> type[Turn]:
    """The class of a turn.

    Raises:
        PlanError: This client has no such turn.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if _is_own(name):
        dotted = f"{__name__}.{name}"
        module = importlib.import_module(dotted)
        kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, Turn) and k.__module__ == dotted]
        return kinds[0]
    raise PlanError(f"the plan asks for the turn '{name[:60]}', which this client does not have: update fedtune on the client")


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


__all__ = ["Batch", "Stack", "Turn", "Work", "batch_of", "check_private", "find", "make", "register", "turn_of"]
