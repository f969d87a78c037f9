"""The strategy that a config names, checked against the rest of the config before torch or any data is loaded."""

import importlib
import importlib.util
import inspect
import sys
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config
from fedtune.config.compose import choices
from fedtune.config.values import typed
from fedtune.errors import ConfigError, FedtuneError

if TYPE_CHECKING:  # imports torch
    from fedtune.contracts.strategy import Strategy


def make_strategy(config: Config) -> "Strategy":
    """The strategy that `config.strategy` names: any importable subclass of Strategy.

    Raises:
        ConfigError: There is no such class, it is no strategy, it does not take these arguments, or it makes no sense with this config.
    """
    from fedtune.contracts.strategy import Strategy  # imports torch

    args = dict(config.strategy)
    target = str(args.pop("_target_"))
    kind = _imported(target, config)
    if not inspect.isclass(kind) or not issubclass(kind, Strategy):
        raise ConfigError(f"strategy._target_={target} is not a strategy: it must be a subclass of fedtune.contracts.strategy.Strategy")
    name = kind.__name__
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as bad:
        known = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ConfigError(f"strategy {name}: {bad} (its arguments: {known})") from None
    plain = {int, float, str, bool, type(None)}  # richer types are the strategy's own to check
    try:
        for key, hint in typing.get_type_hints(kind).items():
            if key in args and (hint in plain or set(typing.get_args(hint)) <= plain and isinstance(hint, types.UnionType)):
                args[key] = typed(hint, args[key], f"strategy.{key}")
        strategy = kind(**args)
    except FedtuneError:
        raise
    except Exception as bad:  # whatever a class of the user's raises, such as TypeError where `aggregate` is missing
        raise ConfigError(f"strategy._target_={target} cannot be made: {_raised(bad)}") from None
    check_strategy(strategy, config)
    return strategy


def check_strategy(strategy: "Strategy", config: Config) -> None:
    """Raises ConfigError where the config asks for what the strategy does not allow, or the method makes no sense with it."""
    name, needs = type(strategy).__name__, strategy.requirements
    if not needs.mixes_ranks and any(device.rank not in (None, config.peft.rank) for device in config.devices.classes.values()):
        raise ConfigError(f"{name} needs one rank: leave out devices.classes.*.rank, or take a strategy that mixes ranks, such as flexlora")
    if not needs.keeps_basis and config.traffic.error_feedback:
        raise ConfigError(
            f"{name} makes new factors in every round, to which what was left out of an older update cannot be added:"
            " set traffic.error_feedback=false"
        )
    if needs.assumes_zero_init and config.peft.init == "loftq":
        raise ConfigError(f"{name} takes the adapter that a run begins with for zero, peft.init=loftq does not: take peft.init=default")
    if config.late == "use" and not needs.accepts_stale:
        raise ConfigError(f"{name} cannot use an update of an older version: set late=drop, or take strategy=fedavg")
    private = config.privacy.kind
    if private != "none" and needs.extra_disclosure:
        raise ConfigError(f"{name} has clients tell {needs.extra_disclosure}, which privacy={private} does not cover: take strategy=fedavg")
    if private == "user" and not needs.needs_only_mean:
        raise ConfigError(f"{name} needs each client's own update, privacy=user shows it their noised mean only: take strategy=fedavg")
    strategy.check(config)


def _imported(target: str, config: Config) -> object:
    """What `package.module.Class` names: in an installed package, or in a module of the working directory, which comes last."""
    module, _, name = target.rpartition(".")
    if "" not in sys.path:  # `python -m` looks in the working directory; the commands that pip installs do not
        sys.path.append("")
    try:
        if config.resume:  # which code runs is not a run directory's to say
            _refuse_code_of(Path(config.resume), module, target)
        found = getattr(importlib.import_module(module), name, None) if module else None
        why = f"there is no {name} in {module}" if module else "it names no module"
    except FedtuneError:
        raise
    except Exception as bad:  # whatever a module of the user's raises while it is imported
        found, why = None, _raised(bad)
    if found is None:
        known = "|".join(choices("strategy"))
        raise ConfigError(
            f"strategy._target_={target} cannot be imported: pick one of strategy={known}, or name a class of an installed package or of a"
            f" module in the working directory ({why})"
        )
    return found


def _refuse_code_of(run: Path, module: str, target: str) -> None:
    """Raises ConfigError where a part of the dotted name lies in the run directory; nothing of it has been imported then."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:i]))
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        if any(Path(place).resolve().is_relative_to(run.resolve()) for place in places if place):
            raise ConfigError(f"strategy._target_={target} names code inside the run directory {run}: keep the module outside of it")


def _raised(bad: Exception) -> str:
    return f"{type(bad).__name__}: {bad}".splitlines()[0].strip().removesuffix(":")
