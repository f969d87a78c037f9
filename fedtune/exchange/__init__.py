"""Exchanges: how a cohort's replies become the next state. The config's `privacy` chooses one."""

from pathlib import Path

from fedtune.config import Config
from fedtune.contracts.exchange import Channel, Exchange, NoUpdates
from fedtune.exchange.central_dp import CentralDP
from fedtune.exchange.local_dp import LocalDP
from fedtune.exchange.plain import Plain


def make_exchange(config: Config, clients: int, folder: Path) -> Exchange:
    """The exchange that the config asks for.

    Args:
        config: The experiment.
        clients: How many there are.
        folder: Where the server keeps what each client has spent.

    Raises:
        ConfigError: The noise that it would take cannot be.
    """
    if config.privacy.kind != "user":
        return Plain()
    cohort = min(config.clients_per_round, clients)
    if config.privacy.where == "client":
        return LocalDP(cohort=cohort)
    made = CentralDP(privacy=config.privacy, cohort=cohort, rounds=config.rounds, seed=config.seed, folder=folder)
    if config.privacy.adaptive:
        made.tracker.left(made.noise, made.cohort)
    return made


__all__ = ["CentralDP", "Channel", "Exchange", "LocalDP", "NoUpdates", "Plain", "make_exchange"]
