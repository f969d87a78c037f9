"""An encoder layer as one autograd function.

    x2 = norm(x + o(attention(q, k, v)))          q, k, v = linear(x)
    y = norm(x2 + down(act(up)))                  up = linear(x2)

For the backward pass a layer keeps x, the inputs of both norms, the outputs of q, k, v and up, and the input of o; or only x, from which it
computes the others again.
"""

from typing import Any, cast

import torch
from torch import Tensor

from fedtune.models.lean.functions import ACTIVATIONS, Factors, Gradients, LayerNorm, Linears, Needed, attend, attend_backward
from fedtune.models.lean.layer import Call, Kept, Layer

__all__ = ["ENCODERS", "EncoderLayer"]

_BERT = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"),
    ("attention.output.LayerNorm", "output.LayerNorm"),
    "attention.self.num_attention_heads",
)
_DISTILBERT = (
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    ("sa_layer_norm", "output_layer_norm"),
    "attention.n_heads",
)
# transformers' class of an encoder layer → names of its linear layers q, k, v, o, up and down, of its norms, and of the number of heads
ENCODERS = {
    "BertLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "TransformerBlock": _DISTILBERT,
}


class EncoderLayer(Layer):
    """An encoder layer.

    Args:
        module: The layer, in which PEFT may have adapted linear layers.
        activation: Name of the feed-forward block's activation, in `ACTIVATIONS`.
    """

    def __init__(self, module: Any, activation: str) -> None:
        linears, norms, heads = ENCODERS[type(module).__name__]
        q, k, v, o, up, down = (module.get_submodule(n) for n in linears)
        self._qkv, self._o, self._up, self._down = Linears(q, k, v), Linears(o), Linears(up), Linears(down)
        self._first, self._second = (LayerNorm(module.get_submodule(n)) for n in norms)
        parent, _, name = heads.rpartition(".")
        self._heads_count = int(getattr(module.get_submodule(parent), name))
        self._act, self._act_backward = ACTIVATIONS[activation]
        super().__init__(module, [n for group in (self._qkv, self._o, self._up, self._down) for n in group.layers])

    def forward(self, x: Tensor, factors: Factors, call: Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        given = self._qkv.forward(x, factors[:3], call.states)
        q, k, v = (self._heads(t, call) for t in given)
        a = self._flat(attend(q, k, v, self._mask(x, call), self._scale(q), None), call)
        del q, k, v
        s1 = self._o.forward(a, factors[3:4], call.states)[0].add_(x)
        x2 = self._first.forward(s1)
        (u,) = self._up.forward(x2, factors[4:5], call.states)
        s2 = self._down.forward(self._act(u), factors[5:], call.states)[0].add_(x2)
        return self._second.forward(s2) if last else x2, [s1, *given, a, u, s2]

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, factors: Factors, needed: Needed, call: Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        s1, *given, a, u, s2 = cast(list[Tensor], kept)
        ds2 = self._second.backward(dy, s2)
        dh, down_grads = self._down.backward([ds2], self._act(u), factors[5:], needed[5:], call.states)
        du = self._act_backward(cast(Tensor, dh), u)
        del dh
        dx2, up_grads = self._up.backward([du], self._first.forward(s1), factors[4:5], needed[4:5], call.states)
        ds1 = self._first.backward(cast(Tensor, dx2).add_(ds2), s1)
        if not dx and not any(map(any, needed[:4])):
            return None, [None] * 12 + up_grads + down_grads
        da, o_grads = self._o.backward([ds1], a, factors[3:4], needed[3:4], call.states)
        da, q, k, v = (self._heads(t, call) for t in (cast(Tensor, da), *given))
        dheads = attend_backward(da, q, k, v, self._mask(x, call), self._scale(q), None)
        dgiven = [self._flat(t, call) for t in dheads]
        out, grads = self._qkv.backward(dgiven, x, factors[:3], needed[:3], call.states, dx=dx)
        return None if out is None else out.add_(ds1), grads + o_grads + up_grads + down_grads

    def _heads(self, x: Tensor, call: Call) -> Tensor:
        """(N, H·D) → (B, H, T, D)."""
        return call.places.unpack(x).view(*call.places.size, self._heads_count, -1).transpose(1, 2).contiguous()

    @staticmethod
    def _flat(x: Tensor, call: Call) -> Tensor:
        """(B, H, T, D) → (N, H·D)."""
        return call.places.pack(x.transpose(1, 2).flatten(2).flatten(0, 1))

    @staticmethod
    def _scale(q: Tensor) -> float:
        return q.shape[-1] ** -0.5

    @staticmethod
    def _mask(x: Tensor, call: Call) -> Tensor:
        """All positions see each other where transformers gives no mask."""
        return torch.zeros(1, 1, 1, call.places.size[1], dtype=x.dtype, device=x.device) if call.mask is None else call.mask
