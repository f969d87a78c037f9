"""Create the strategy that a config names, and check it against the config before any data or model is loaded."""

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
        ConfigError: The class does not exist, is not a strategy, rejects these arguments, or does not support this config.
    """
    from fedtune.contracts.strategy import Strategy  # imports torch

    args = dict(config.strategy)
    target = str(args.pop("_target_"))
    kind = _import(target, config)
    if not inspect.isclass(kind) or not issubclass(kind, Strategy):
        raise ConfigError(f"strategy._target_={target} is not a strategy: it must be a subclass of fedtune.contracts.strategy.Strategy")
    name = kind.__name__
    try:
        inspect.signature(kind).bind(**args)
    except TypeError as bad:
        known = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ConfigError(f"strategy {name}: {bad} (its arguments: {known})") from None
    plain = {int, float, str, bool, type(None)}  # the strategy checks arguments of richer types itself
    try:
        for key, hint in typing.get_type_hints(kind).items():
            if key in args and (hint in plain or set(typing.get_args(hint)) <= plain and isinstance(hint, types.UnionType)):
                args[key] = typed(hint, args[key], f"strategy.{key}")
        strategy = kind(**args)
    except FedtuneError:
        raise
    except Exception as bad:  # a user's class may raise anything, such as TypeError if `aggregate` is missing
        raise ConfigError(f"strategy._target_={target} cannot be constructed: {_describe(bad)}") from None
    check_strategy(strategy, config)
    return strategy


def check_strategy(strategy: "Strategy", config: Config) -> None:
    """Raises ConfigError if the strategy does not support this config."""
    name, needs = type(strategy).__name__, strategy.requirements
    if not needs.mixes_ranks and any(device.rank not in (None, config.peft.rank) for device in config.devices.classes.values()):
        raise ConfigError(
            f"{name} needs the same rank on all clients: leave out devices.classes.*.rank, or take a strategy that mixes ranks, such as"
            " flexlora"
        )
    if not needs.keeps_basis and config.traffic.error_feedback:
        raise ConfigError(
            f"{name} computes new factors in every round, so a client cannot add the residual of an older update: set"
            " traffic.error_feedback=false"
        )
    if needs.assumes_zero_init and config.peft.init == "loftq":
        raise ConfigError(f"{name} assumes B·A = 0 before round 1, but peft.init=loftq starts elsewhere: set peft.init=default")
    if config.peft.target_parameters and not needs.averages_entries:
        raise ConfigError(
            f"{name} computes with LoRA's products s·B·A, which stacked experts do not have in that form: take strategy=fedavg, or"
            " leave out peft.target_parameters"
        )
    if config.late == "use" and not needs.accepts_stale:
        raise ConfigError(f"{name} cannot use late updates: set late=drop, or take strategy=fedavg")
    private = config.privacy.kind
    if private != "none" and needs.extra_disclosure:
        raise ConfigError(
            f"{name}'s clients also report {needs.extra_disclosure}, which privacy={private} does not cover: take strategy=fedavg"
        )
    if private == "user" and not needs.needs_only_mean:
        raise ConfigError(f"{name} needs each client's own update, but privacy=user reveals only a noised mean: take strategy=fedavg")
    strategy.check(config)


def _import(target: str, config: Config) -> object:
    """Import `package.module.Class` from an installed package, or else from a module in the working directory."""
    module, _, name = target.rpartition(".")
    if "" not in sys.path:  # `python -m` searches the working directory; console scripts do not
        sys.path.append("")
    try:
        if config.resume:  # a run directory must not be able to run its own code
            _refuse_code_of(Path(config.resume), module, target)
        found = getattr(importlib.import_module(module), name, None) if module else None
        why = f"there is no {name} in {module}" if module else "it has no module name"
    except FedtuneError:
        raise
    except Exception as bad:  # a user's module may raise anything on import
        found, why = None, _describe(bad)
    if found is None:
        known = "|".join(choices("strategy"))
        raise ConfigError(
            f"strategy._target_={target} cannot be imported: pick one of strategy={known}, or name a class of an installed package or of a"
            f" module in the working directory ({why})"
        )
    return found


def _refuse_code_of(run: Path, module: str, target: str) -> None:
    """Raises ConfigError, before the import, if a part of the dotted name is in the run directory."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:i]))
        places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
        if any(Path(place).resolve().is_relative_to(run.resolve()) for place in places if place):
            raise ConfigError(f"strategy._target_={target} names code inside the run directory {run}: keep the module outside of it")


def _describe(bad: Exception) -> str:
    return f"{type(bad).__name__}: {bad}".splitlines()[0].strip().removesuffix(":")
