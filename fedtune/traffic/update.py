"""Encodes updates: the difference from the adapter that the client was sent, with error feedback.

u = Δ + e_old;  sent = decode(encode(u));  e_new = u − sent.  So sent + e_new = Δ + e_old: the error of an update is delayed, not lost. The
sent part is lost if the reply does not count, as without a codec.

Sources: Seide et al. 2014, 1-Bit Stochastic Gradient Descent, Interspeech; Stich et al. 2018, Sparsified SGD with Memory, arXiv:1809.07599.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import UpdateMismatch
from fedtune.traffic.codec import Codec


def encode_update(
    codec: Codec, trained: AdapterState, sent: Mapping[str, Tensor], residual: Mapping[str, Tensor], seed: int
) -> tuple[AdapterState, dict[str, Tensor]]:
    """Encode an update.

    Args:
        codec: The plan's codec.
        trained: The plan's tensors, after training.
        sent: The tensors that the client was sent. For a tensor pruned to a smaller rank, only the remaining part is compared.
        residual: e_old. Only tensors of the same name and shape are added; residuals of tensors that are not sent are kept.
        seed: Seed of stochastic rounding.

    Returns:
        The encoded state, and e_new; empty if the codec has no error feedback.
    """
    total = {
        name: t if not t.is_floating_point() else t.cpu().float() - sent[name][tuple(slice(d) for d in t.shape)].float()
        for name, t in trained.tensors.items()
    }
    if not codec.feedback:
        return trained.replace(codec.encode(total, seed)), {}
    total = {n: u + residual[n] if n in residual and residual[n].shape == u.shape else u for n, u in total.items()}
    encoded = codec.encode(total, seed)
    arrived = codec.decode(encoded, total)
    left = {n: u - arrived[n] for n, u in total.items() if u.is_floating_point()}
    return trained.replace(encoded), {**residual, **left}


def decode_update(codec: Codec, got: AdapterState, base: AdapterState) -> AdapterState:
    """Decode an update: the trained tensors, as the server's tensors plus the received difference.

    Args:
        codec: The plan's codec.
        got: The encoded state.
        base: The plan's tensors, with the server's values. If the broadcast was encoded, the client started from rounded values; only the
            difference is added, so the broadcast's rounding never enters the server's state.

    Raises:
        UpdateMismatch: The encoded state does not match this codec and these shapes, or the sum is not finite.
    """
    came, out = codec.decode(got.tensors, base.tensors), {}
    for name, start in base.tensors.items():
        out[name] = (start.float() + came[name]).to(start.dtype) if start.is_floating_point() else came[name]
        if not torch.isfinite(out[name]).all():
            raise UpdateMismatch(f"tensor '{name}' has values that are not finite (NaN or infinity)")
    return got.replace(out)


__all__ = ["decode_update", "encode_update"]
