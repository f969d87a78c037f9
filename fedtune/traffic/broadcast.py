"""Encodes broadcasts: each tensor itself, or its difference from the run's first adapter if that is smaller.

Every client can draw the first adapter from the run's seed, even after missing rounds, so it can always decode the difference, and the
server need not track what each client holds. Each difference starts from the server's own state, so rounding does not accumulate.
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
    """The encoding: the codec's name, and for each tensor its name, dtype, shape, and whether it is a difference."""

    codec: str
    tensors: tuple[tuple[str, str, tuple[int, ...], bool], ...]


def encode_broadcast(codec: Codec, adapter: AdapterState, first: Mapping[str, Tensor], seed: int) -> tuple[AdapterState, str]:
    """Encode an adapter. Returns the encoded state, and the JSON that describes the encoding.

    Args:
        codec: The codec, without top-k: the dropped entries would never arrive.
        adapter: The tensors.
        first: The run's first adapter.
        seed: Seed of stochastic rounding.
    """
    total, described = {}, []
    for name, t in adapter.tensors.items():
        start = first.get(name)
        if t.is_floating_point() and start is not None and start.shape == t.shape:
            moved = t.float() - start.float()
            differs = bool(moved.norm() < t.float().norm())
        else:
            moved, differs = t, False
        total[name] = moved if differs else t
        described.append([name, str(t.dtype).removeprefix("torch."), list(t.shape), differs])
    return adapter.replace(codec.encode(total, seed)), json.dumps({"codec": codec.name, "tensors": described})


def decode_broadcast(text: str, got: AdapterState, first: Mapping[str, Tensor]) -> AdapterState:
    """Decode a broadcast of `encode_broadcast`, up to the codec's rounding.

    Args:
        text: The JSON.
        got: The encoded state.
        first: The run's first adapter, drawn by the client.

    Raises:
        PlanError: The JSON is not valid in this version of fedtune, or the client's first adapter lacks one of the tensors.
        UpdateMismatch: The encoded state does not match the JSON.
    """
    try:
        encoding = read_object(_Broadcast, text, ValueError, "broadcast")
        codec = Codec.from_name(encoding.codec)
        like = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape, _ in encoding.tensors}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as bad:
        raise PlanError(f"the server's broadcast cannot be read ({bad!s:.120}): the peers run different versions of fedtune") from None
    came = codec.decode(got.tensors, like)
    for name in (name for name, _, _, differs in encoding.tensors if differs):
        if name not in first or first[name].shape != came[name].shape:
            raise PlanError(
                f"the server sent '{name[:80]}' as a difference from the run's first adapter, but this client's first adapter does not have"
                " it: use the same model and adapter settings on both ends"
            )
        came[name] = first[name].float() + came[name]
    return got.replace({n: came[n].to(t.dtype) for n, t in like.items()})


__all__ = ["decode_broadcast", "encode_broadcast"]
