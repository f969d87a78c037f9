"""Strategies whose clients combine the shared LoRA adapter with one of their own: each has half of the config's rank."""

from typing import ClassVar

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.strategy import Requirements, ServerState
from fedtune.errors import ConfigError
from fedtune.strategies._lowrank import at_ranks, require_product
from fedtune.strategies._require import no_record_privacy
from fedtune.strategies.fedavg import FedAvg


class DualAdapter(FedAvg):
    """FedAvg over a shared adapter of rank r/2. r is `peft.rank`, the rank of a client's slot, which holds both adapters."""

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, needs_only_mean=True, accepts_stale=True)

    def check(self, config: Config) -> None:
        name = str(config.strategy["_target_"]).rsplit(".", 1)[-1].lower()
        no_record_privacy(config, name)
        require_product(config, name, why="it adds LoRA products")
        if odd := [r for r in (config.peft.rank, *config.peft.rank_pattern.values()) if r % 2]:
            raise ConfigError(
                f"strategy={name} gives each of two adapters half of the rank, but {odd[0]} is odd: set even ranks (peft.rank)"
            )

    def start(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter=at_ranks(adapter, {m: max(1, r // 2) for m, r in adapter.spec.ranks.items()}))
