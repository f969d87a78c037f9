"""Broadcasts on their way down: each tensor itself, or its difference from the run's first adapter where that is smaller.

Every client can draw the first adapter from the run's seed, however many rounds it has missed, so that the difference is always sound, and
the server need not know what each client holds. It is taken from the server's own state each time: rounding never adds up over rounds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError
from fedtune.storage.reading import read_object
from fedtune.traffic.codec import Codec


@dataclass(frozen=True)
class _Broadcast:
    """What is encoded how: the codec's name, and of each tensor name, dtype, shape, and whether it is the difference."""

    codec: str
    tensors: tuple[tuple[str, str, tuple[int, ...], bool], ...]


def encode_broadcast(codec: Codec, adapter: AdapterState, first: Mapping[str, Tensor], seed: int) -> tuple[AdapterState, str]:
    """What travels, and the JSON that says what it is.

    Args:
        codec: How; top-k does not fit, for what it leaves out would never arrive.
        adapter: The tensors.
        first: The run's first adapter.
        seed: Of stochastic rounding.
    """
    total, said = {}, []
    for name, t in adapter.tensors.items():
        start = first.get(name)
        if t.is_floating_point() and start is not None and start.shape == t.shape:
            moved = t.float() - start.float()
            differs = bool(moved.norm() < t.float().norm())
        else:
            moved, differs = t, False
        total[name] = moved if differs else t
        said.append([name, str(t.dtype).removeprefix("torch."), list(t.shape), differs])
    return adapter.replace(codec.encode(total, seed)), json.dumps({"codec": codec.name, "tensors": said})


def decode_broadcast(text: str, got: AdapterState, first: Mapping[str, Tensor]) -> AdapterState:
    """The tensors that `encode_broadcast` wrote, as far as its codec kept them.

    Args:
        text: The JSON.
        got: What came.
        first: The run's first adapter, as the client draws it.

    Raises:
        PlanError: The JSON is not of this version of fedtune, or it builds on a first adapter that this client does not have.
        UpdateMismatch: What came is not what the JSON says.
    """
    try:
        said = read_object(_Broadcast, text, ValueError, "broadcast")
        codec = Codec.from_name(said.codec)
        like = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape, _ in said.tensors}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as bad:
        raise PlanError(f"the server's broadcast cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None
    came = codec.decode(got.tensors, like)
    for name in (name for name, _, _, differs in said.tensors if differs):
        if name not in first or first[name].shape != came[name].shape:
            raise PlanError(
                f"the server sent how '{name[:80]}' differs from the run's first adapter, which has no such tensor at this client"
            )
        came[name] = first[name].float() + came[name]
    return got.replace({n: came[n].to(t.dtype) for n, t in like.items()})


__all__ = ["decode_broadcast", "encode_broadcast"]
