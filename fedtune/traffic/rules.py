"""Applies a config's `traffic` to a round: the codecs of the replies and of the broadcast."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from fedtune.config import TrafficConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import Assignment
from fedtune.traffic.broadcast import encode_broadcast
from fedtune.traffic.codec import Codec


def with_codec(config: TrafficConfig, assignments: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Set the codec of the reply in each assignment.

    Measurements are sent back unencoded. If only the broadcast is encoded, the reply is still a difference: otherwise the broadcast's
    rounding would enter the server's state.
    """
    rounds = config.stochastic and config.up != "fp32"
    up = Codec(values=config.up, share=config.topk or 1.0, stochastic=rounds, feedback=config.error_feedback)
    if up == Codec() and config.down == "fp32":
        return dict(assignments)
    return {
        client: given if given.expect is not None else dataclasses.replace(given, plan=dataclasses.replace(given.plan, codec=up.name))
        for client, given in assignments.items()
    }


def broadcaster(
    config: TrafficConfig, first: AdapterState, seed: int, round: int
) -> Callable[[AdapterState], tuple[AdapterState, str]] | None:
    """The function that encodes a round's adapters; None if they are sent unencoded."""
    if config.down == "fp32":
        return None
    codec = Codec(values=config.down, stochastic=config.stochastic)
    return lambda adapter: encode_broadcast(codec, adapter, first.tensors, derive_seed(seed, "broadcast", round))


def blank_reply(codec: str, wanted: AdapterState) -> AdapterState:
    """A reply of zeros, as large as the wanted one."""
    like = Codec.from_name(codec).layout(wanted.tensors) if codec else wanted.tensors
    return wanted.replace({n: torch.zeros(t.shape, dtype=t.dtype) for n, t in like.items()})
