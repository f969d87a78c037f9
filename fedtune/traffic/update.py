"""Updates on their way up: the difference from what the client was sent, with error feedback.

u = Δ + e_old;  sent = decode(encode(u));  e_new = u − sent.  So sent + e_new = Δ + e_old: what an update leaves out is late, not lost. What
a reply did carry is lost with the reply, where that does not count, as it is without a codec.

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
    """What travels, and what the client has still to send.

    Args:
        codec: As the plan asks.
        trained: The tensors that the plan asks for, after training.
        sent: What the client was sent. A tensor that was pruned to a smaller rank is compared with the part that is left.
        residual: e_old; only tensors of the same name and shape count, and those that are not sent this time stay as they are.
        seed: Of stochastic rounding.

    Returns:
        The encoded state, and e_new; empty where the codec has no error feedback.
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
    """The trained tensors: what the client was sent plus the difference that came.

    Args:
        codec: As the plan asked.
        got: What came.
        base: The tensors asked for, as the server holds them. Where the broadcast was encoded, the client began beside them; only what it
            learned is added, so that the broadcast's rounding never gets into the server's state.

    Raises:
        UpdateMismatch: What came is not what this codec makes of tensors of these shapes, or the sum is not finite.
    """
    came, out = codec.decode(got.tensors, base.tensors), {}
    for name, start in base.tensors.items():
        out[name] = (start.float() + came[name]).to(start.dtype) if start.is_floating_point() else came[name]
        if not torch.isfinite(out[name]).all():
            raise UpdateMismatch(f"tensor '{name}' has values that are not finite (NaN or infinity)")
    return got.replace(out)


__all__ = ["decode_update", "encode_update"]
