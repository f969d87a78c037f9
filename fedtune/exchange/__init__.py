"""Exchanges turn a cohort's replies into the next state. The config's `privacy` selects one."""

from pathlib import Path

from fedtune.config import Config
from fedtune.contracts.exchange import Channel, Exchange, NoUpdates
from fedtune.exchange.central_dp import CentralDP
from fedtune.exchange.local_dp import LocalDP
from fedtune.exchange.plain import Plain


def make_exchange(config: Config, clients: int, folder: Path) -> Exchange:
    """The exchange of the config.

    Args:
        config: The experiment.
        clients: Number of clients.
        folder: Folder of the server's privacy ledgers, one per client.

    Raises:
        ConfigError: No noise level satisfies the privacy settings.
    """
    if config.privacy.kind != "user":
        return Plain()
    cohort = min(config.clients_per_round, clients)
    if config.privacy.where == "client":
        return LocalDP(cohort=cohort)
    central = CentralDP(privacy=config.privacy, cohort=cohort, rounds=config.rounds, seed=config.seed, folder=folder)
    if config.privacy.adaptive:
        central.tracker.tensor_noise(central.noise, central.cohort)  # raises if the settings are impossible
    return central


__all__ = ["CentralDP", "Channel", "Exchange", "LocalDP", "NoUpdates", "Plain", "make_exchange"]
