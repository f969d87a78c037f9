"""The plain exchange: one message per client, and the strategy sees every update."""

from fedtune.contracts.exchange import Channel, Exchange
from fedtune.contracts.strategy import ServerState, Strategy


class Plain(Exchange):
    """The strategy aggregates the updates as they come."""

    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        return strategy.aggregate(round, state, channel.train())
