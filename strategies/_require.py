"""Config checks that several strategies share; they run before anything is loaded."""

from fedtune.config import Config
from fedtune.errors import ConfigError


def plain_sgd(config: Config, strategy: str, otherwise: str = "") -> None:
    """Raises ConfigError if a client's step is not its learning rate times a gradient.

    Args:
        config: The experiment.
        strategy: Name of the strategy.
        otherwise: An alternative fix, appended to the error, such as a setting that skips the check.
    """
    if config.client.optimizer != "sgd" or config.client.clip_norm is not None:
        clip = "none" if config.client.clip_norm is None else f"{config.client.clip_norm:g}"
        raise ConfigError(
            f"strategy={strategy} computes gradients from the clients' steps, which needs plain SGD without clipping, but"
            f" client.optimizer={config.client.optimizer} and client.clip_norm={clip}:"
            f" set client.optimizer=sgd client.clip_norm=null with a client.lr to match{otherwise}"
        )


def enough_clients(config: Config, strategy: str, needed: int, why: str) -> None:
    """Raises ConfigError if a round can succeed with fewer clients than the method's guarantee needs."""
    settings = {"clients_per_round": config.clients_per_round, "min_clients": config.min_clients}
    if short := {name: value for name, value in settings.items() if value < needed}:
        has = " and ".join(f"{name}={value}" for name, value in short.items())
        raise ConfigError(
            f"strategy={strategy} needs {why} = {needed} good updates in every round that counts, but {has}:"
            f" set {' '.join(f'{name}={needed}' for name in short)}"
        )


def whole_updates(config: Config, strategy: str, otherwise: str = "") -> None:
    """Raises ConfigError if clients compress their updates; a compressed broadcast is allowed.

    Args:
        config: The experiment.
        strategy: Name of the strategy.
        otherwise: An alternative fix, appended to the error, such as a setting that skips the check.
    """
    t = config.traffic
    if t.up != "fp32" or t.topk not in (None, 1.0):
        topk = "none" if t.topk is None else f"{t.topk:g}"
        useless = " traffic.error_feedback=false" * t.error_feedback + " traffic.stochastic=false" * (t.stochastic and t.down == "fp32")
        raise ConfigError(
            f"strategy={strategy} computes control variates from the clients' updates, which must be uncompressed, but"
            f" traffic.up={t.up} and traffic.topk={topk}: set traffic.up=fp32 traffic.topk=null{useless}{otherwise}"
        )


def no_record_privacy(config: Config, strategy: str) -> None:
    """Raises ConfigError if the config asks for record-level privacy; the strategy's clients compute more gradients than DP-SGD's."""
    if config.privacy.kind == "record":
        raise ConfigError(
            f"strategy={strategy} trains personal adapters with gradients of their own, which privacy=record does not cover: set"
            " privacy=user, or take strategy=fedper"
        )


def sgd_only(config: Config, strategy: str) -> None:
    """Raises ConfigError if the config asks for an optimizer that zeroth-order steps do not use."""
    if config.client.optimizer != "sgd":
        raise ConfigError(
            f"strategy={strategy} takes plain steps along random directions, which client.optimizer={config.client.optimizer} does not"
            " describe: set client.optimizer=sgd"
        )


def no_privacy(config: Config, strategy: str) -> None:
    """Raises ConfigError if the config asks for differential privacy, which no one has proved for these steps here."""
    if config.privacy.kind != "none":
        raise ConfigError(
            f"strategy={strategy} computes slopes of the loss, which fedtune's differential privacy does not cover: set privacy=none, or"
            " take strategy=fedavg"
        )
