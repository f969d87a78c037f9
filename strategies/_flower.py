"""Runs Flower's aggregation classes on fedtune's updates and server state.

Flower's strategies are objects with state; fedtune's are functions of a saved state. Each round a new Flower object gets its state from
`ServerState.memory` and aggregates; its new state is stored in the memory again. Every round starts this way, so a resumed run gives the
same results.

Source: flwr.serverapp.strategy, Flower 1.41 (Beutel et al. 2020, arXiv:2007.14390).
"""

import contextlib
import dataclasses
import gc
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import UpdateError, UpdateMismatch
from fedtune.strategies._mean import doubles

_EXAMPLES = "num-examples"  # the key under which Flower's classes look for weights


@dataclass(frozen=True)
class _Reply:
    """The part of a Flower message that aggregation reads; only a process with a SuperLink's identity can create a real one."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def numpy(tensors: Mapping[str, Tensor]) -> dict[str, NDArray]:
    """Tensors as NumPy arrays. bfloat16 (NumPy lacks it) and float16 (sums lose precision) become float32."""
    small = (torch.bfloat16, torch.float16)
    return {n: (t.float() if t.dtype in small else t).detach().cpu().numpy() for n, t in tensors.items()}


def arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a Flower record, which copies them."""
    return ArrayRecord({n: Array(a) for n, a in numpy(tensors).items()})


def reply(tensors: Mapping[str, Tensor], examples: int, **metrics: float) -> Message:
    """The reply of a Flower client."""
    content = RecordDict({"arrays": arrays(tensors), "metrics": MetricRecord({_EXAMPLES: examples, **metrics})})
    return typing.cast(Message, _Reply(content))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A context in which Flower's records do not run the garbage collector; some do after every record: 0.3 s per client with torch loaded.

    `gc.freeze` would do too, but `gc.unfreeze` also undoes what the rest of the process has frozen.
    """
    module: Any = sys.modules[ArrayRecord.__module__]
    module.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        module.gc = gc


def aggregated(by: flower.FedAvg, round: int, replies: Sequence[Message], like: AdapterState) -> AdapterState | None:
    """Flower's aggregate of the replies, with the dtypes and the spec of `like`; None if Flower rejects them."""
    with no_collection():
        record, _ = by.aggregate_train(round, replies)
    if record is None:
        return None
    return like.replace({n: torch.from_numpy(np.array(record[n].numpy())).to(t.dtype) for n, t in like.tensors.items()})


def remembered(memory: Mapping[str, Tensor], what: str, names: Iterable[str]) -> dict[str, NDArray] | None:
    """The tensors stored as `what/<name>`, in float64; None before the first round."""
    found = {n: memory[f"{what}/{n}"].double().numpy() for n in names if f"{what}/{n}" in memory}
    return found or None


def to_remember(what: str, values: Mapping[str, NDArray] | None) -> dict[str, Tensor]:
    """The inverse of `remembered`, in float32."""
    return {f"{what}/{n}": torch.from_numpy(np.array(v)).float() for n, v in (values or {}).items()}


def fed_opt(by: flower.FedAdam | flower.FedYogi | flower.FedAdagrad, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
    """One round of Flower's FedOpt family: a server step along the mean change Δ = w̄ − w, where `mean` is w̄ in float64.

    Memory: the moments `m/<tensor>` and `v/<tensor>`, and `t`, the number of steps since they were 0. Flower's FedAdam corrects the bias
    with the exponent `round` + 1; with t passed as the round, this is Adam's standard correction.
    """
    now = doubles(state.adapter.tensors)  # float64 represents small changes of large weights exactly
    taken = int(state.memory.get("t", torch.tensor(0)))
    by.current_arrays = numpy(now)
    by.m_t, by.v_t = remembered(state.memory, "m", now), remembered(state.memory, "v", now)
    adapter = aggregated(by, taken, [reply(mean, 1)], state.adapter)
    moments = to_remember("v", by.v_t) | (to_remember("m", by.m_t) if by.beta_1 else {})  # β₁ = 0 forgets m
    memory = {"t": torch.tensor(taken + 1), **moments}
    return dataclasses.replace(state, adapter=adapter or state.adapter, memory=memory)


def cohort(state: ServerState, updates: Iterable[Update]) -> list[Update]:
    """All updates, sorted by logical client id: robust rules need every model at once and break ties by this order.

    Raises:
        UpdateMismatch: An update lacks a tensor of the state, or its shape differs.
    """
    found = sorted(updates, key=lambda u: u.client)
    for update in found:
        for name, wanted in state.adapter.tensors.items():
            got = update.adapter.tensors.get(name)
            if got is None or got.shape != wanted.shape:
                came = "missing" if got is None else str(tuple(got.shape))
                raise UpdateMismatch(
                    f"client {update.client}: tensor '{name}' is {came} instead of {tuple(wanted.shape)}:"
                    " this strategy compares clients coordinate by coordinate, give all clients the same rank"
                )
    return found


def measured(update: Update, values: Mapping[str, float], name: str) -> float:
    """A measurement that the method requires.

    Raises:
        UpdateError: The measurement is missing or negative.
    """
    value = values.get(name)
    if value is None or value < 0:
        raise UpdateError(
            f"client {update.client} sent {name}={value} instead of a number >= 0: run the same version of fedtune on the client"
        )
    return value
