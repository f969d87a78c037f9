"""The plan for a client from the config alone, before the strategy changes it."""

import math

from fedtune.config import Config
from fedtune.contracts.plan import PLAIN, Plan
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.seeds import derive_seed


def base_plan(config: Config, round: int, client: str, version: int, rank: int | None = None) -> Plan:
    """The config's plan for a client whose hello requests LoRA rank `rank`."""
    c = config.client
    return Plan(
        round=round,
        client=client,
        base_version=version,
        rank=rank,
        steps=c.steps,
        epochs=c.epochs if c.steps is None else None,
        batch_size=c.batch_size,
        accumulate=c.accumulate,
        optimizer=c.optimizer,
        lr=c.lr * schedule(config, round - 1),
        lr_last=c.lr * schedule(config, round),
        weight_decay=c.weight_decay,
        clip_norm=None if config.privacy.kind == "record" else c.clip_norm,  # DP-SGD clips each row's gradient instead
        turn="fedprox" if c.prox else PLAIN,
        params={"mu": c.prox} if c.prox else {},
        seed=derive_seed(config.seed, "turn", round, client),
        **terms(config),  # pyright: ignore[reportArgumentType]
    )


def schedule(config: Config, rounds_done: float) -> float:
    """Learning rate after `rounds_done` rounds, as a share of the peak: warm-up, then constant, or linear or cosine decay to
    `client.lr_end`."""
    c, warm = config.client, config.client.warmup_rounds
    if rounds_done < warm:
        return rounds_done / warm
    share = min(1.0, (rounds_done - warm) / max(config.rounds - warm, 1e-9))
    falling = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share)}[c.schedule]
    return falling if c.schedule == "constant" else c.lr_end + (1.0 - c.lr_end) * falling
