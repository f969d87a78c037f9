"""A decoder layer as one autograd function.

    x2 = x + norm?(o(attention(q, k, v)))         q, k, v = linear(norm(x))
    y = x2 + norm?(down(act(gate) · up))          gate, up = linear(norm(x2))

norm? is a norm that some architectures have there; in OLMo 2 the other norms are missing. For the backward pass a layer keeps x, the
outputs of q, k, v, gate and up, the input of o, and x2 (with norm?, also its input); or only x, from which it computes the others again.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fedtune.models.lean.functions import (
    ACTIVATIONS,
    Factors,
    Gradients,
    Linears,
    Needed,
    Norm,
    attend,
    attend_backward,
    rotate,
)  # fmt: skip
from fedtune.models.lean.layer import Call, Kept, Layer

__all__ = ["DECODERS", "DecoderLayer"]

# transformers' class of a decoder layer → the norms' `offset` and `early` (see `Norm`)
DECODERS = {
    "LlamaDecoderLayer": (0.0, True),
    "MistralDecoderLayer": (0.0, True),
    "Qwen2DecoderLayer": (0.0, True),
    "Qwen3DecoderLayer": (0.0, True),
    "Phi3DecoderLayer": (0.0, True),
    "SmolLM3DecoderLayer": (0.0, True),
    "Olmo2DecoderLayer": (0.0, False),
    "GemmaDecoderLayer": (1.0, False),
    "Gemma2DecoderLayer": (1.0, False),
    "Gemma3DecoderLayer": (1.0, False),
}


class _Attention:
    """y = x + norm?(o(attention(q, k, v)))."""

    def __init__(self, module: Any, norm: Norm | None, post: Norm | None, kind: tuple[float, bool]) -> None:
        self.norm, self.post = norm, post
        self.qkv = Linears(*([module.qkv_proj] if hasattr(module, "qkv_proj") else [module.q_proj, module.k_proj, module.v_proj]))
        self.o = Linears(module.o_proj)
        self.linears = [*self.qkv.layers, *self.o.layers]
        self.norms = [_norm(getattr(module, n, None), kind) for n in ("q_norm", "k_norm")]
        config, self.width, self.scale = module.config, int(module.head_dim), float(module.scaling)
        self.whole = any(n is not None and len(n.weight) != self.width for n in self.norms)  # norms over all heads at once (OLMo 2)
        self.widths = [n * self.width for n in (config.num_attention_heads, *(config.num_key_value_heads,) * 2)]
        self.cap = getattr(module, "attn_logit_softcapping", None) if type(module).__name__ == "Gemma2Attention" else None
        self.rotates = bool(getattr(module, "use_rope", True))

    def forward(self, x: Tensor, factors: Factors, call: Call) -> tuple[Tensor, Kept]:
        given = self.qkv.forward(_forward(self.norm, x), factors[:-1], call.states)
        if len(given) == 1:
            given = list(given[0].split(self.widths, dim=1))
        q, k, v = self._heads(given, call)
        a = self._flat(attend(q, k, v, call.mask, self.scale, self.cap).transpose(1, 2), call)
        del q, k, v
        (y,) = self.o.forward(a, factors[-1:], call.states)
        return _forward(self.post, y).add_(x), [*given, a, y if self.post else None]

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, factors: Factors, needed: Needed, call: Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        *given, a, y = cast(list[Tensor], kept)
        da, o_grads = self.o.backward([_backward(self.post, dy, y)], a, factors[-1:], needed[-1:], call.states)
        da = self._by_row(cast(Tensor, da), call).transpose(1, 2).contiguous()
        q, k, v = self._heads(given, call)
        dheads = list(attend_backward(da, q, k, v, call.mask, self.scale, self.cap))
        del da, q, k, v
        for i in range(3):
            rotated = i < 2 and self.rotates
            dheads[i] = self._flat(rotate(dheads[i], *call.rotation, back=True) if rotated else dheads[i].transpose(1, 2), call)
        for i, norm in enumerate(self.norms):
            if norm is not None:
                dheads[i] = norm.backward(*(self._by_head(t) for t in (dheads[i], given[i]))).flatten(1)
        if len(self.qkv.layers) == 1:
            dheads = [torch.cat(dheads, dim=1)]
        dn, grads = self.qkv.backward(dheads, _forward(self.norm, x), factors[:-1], needed[:-1], call.states, dx=dx)
        return None if dn is None else _backward(self.norm, dn, x).add_(dy), grads + o_grads

    def _heads(self, given: Sequence[Tensor], call: Call) -> list[Tensor]:
        """q (B, H, T, D), k and v (B, K, T, D) as attention reads them, from the linear layers' outputs."""
        normed = [t if n is None else n.forward(self._by_head(t)) for t, n in zip(given, (*self.norms, None), strict=True)]
        q, k, v = (self._by_row(t.flatten(1), call) for t in normed)
        return [
            *(rotate(t, *call.rotation) if self.rotates else t.transpose(1, 2).contiguous() for t in (q, k)),
            v.transpose(1, 2).contiguous(),
        ]

    def _by_row(self, x: Tensor, call: Call) -> Tensor:
        """(N, H·D) → (B, T, H, D)."""
        return call.places.unpack(x).view(*call.places.size, -1, self.width)

    @staticmethod
    def _flat(x: Tensor, call: Call) -> Tensor:
        """(B, T, H, D) → (N, H·D)."""
        return call.places.pack(x.flatten(2).flatten(0, 1))

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, H·D) in the shape that the norms of queries and keys read: (N, H, D), or unchanged if they are over all heads."""
        return x if self.whole else x.reshape(len(x), -1, self.width)


class _Mlp:
    """y = x + norm?(down(act(gate) · up))."""

    def __init__(self, module: Any, norm: Norm | None, post: Norm | None, activation: str) -> None:
        self.norm, self.post = norm, post
        self.inputs = Linears(*([module.gate_up_proj] if hasattr(module, "gate_up_proj") else [module.gate_proj, module.up_proj]))
        self.down = Linears(module.down_proj)
        self.linears = [*self.inputs.layers, *self.down.layers]
        self.act, self.act_backward = ACTIVATIONS[activation]

    def forward(self, x: Tensor, factors: Factors, call: Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        """y and the tensors that `backward` needs. With last=False, the last product is skipped if possible, and y is x."""
        given = self.inputs.forward(_forward(self.norm, x), factors[:-1], call.states)
        gate, up = given if len(given) == 2 else given[0].chunk(2, dim=1)
        if not last and self.post is None:
            return x, [gate, up, None]
        (y,) = self.down.forward(self.act(gate).mul_(up), factors[-1:], call.states)
        return _forward(self.post, y).add_(x) if last else x, [gate, up, y if self.post else None]

    def backward(self, dy: Tensor, x: Tensor, kept: Kept, factors: Factors, needed: Needed, call: Call) -> tuple[Tensor, Gradients]:
        gate, up, y = cast(list[Tensor], kept)
        a = self.act(gate)
        dh, down_grads = self.down.backward([_backward(self.post, dy, y)], a * up, factors[-1:], needed[-1:], call.states)
        dup = a.mul_(cast(Tensor, dh))
        dgate = self.act_backward(cast(Tensor, dh).mul_(up), gate)
        del a, dh
        dgiven = [dgate, dup] if len(self.inputs.layers) == 2 else [torch.cat([dgate, dup], dim=1)]
        del dgate, dup
        dn, grads = self.inputs.backward(dgiven, _forward(self.norm, x), factors[:-1], needed[:-1], call.states)
        return _backward(self.norm, cast(Tensor, dn), x).add_(dy), grads + down_grads


class DecoderLayer(Layer):
    """A decoder layer.

    Args:
        module: The layer, in which PEFT may have adapted linear layers.
        activation: Name of the feed-forward block's activation, in `ACTIVATIONS`.
    """

    def __init__(self, module: Any, activation: str) -> None:
        kind = DECODERS[type(module).__name__]
        found = {n: _norm(m, kind) for n, m in module.named_children() if n.endswith("layernorm")}
        first, second = found.get("input_layernorm"), found.get("post_attention_layernorm")
        if "post_feedforward_layernorm" in found:  # Gemma 2 and 3, OLMo 2: norms of the blocks' outputs
            attention, mlp = (first, second), (found.get("pre_feedforward_layernorm"), found["post_feedforward_layernorm"])
        else:
            attention, mlp = (first, None), (second, None)
        self._attention = _Attention(module.self_attn, *attention, kind)
        self._mlp = _Mlp(module.mlp, *mlp, activation)
        super().__init__(module, [*self._attention.linears, *self._mlp.linears])

    def forward(self, x: Tensor, factors: Factors, call: Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        at = len(self._attention.linears)
        x2, first = self._attention.forward(x, factors[:at], call)
        y, second = self._mlp.forward(x2, factors[at:], call, last=last)
        return y, [x2, *first, *second]

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, factors: Factors, needed: Needed, call: Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        at = len(self._attention.linears)
        dx2, mlp_grads = self._mlp.backward(dy, cast(Tensor, kept[0]), kept[-3:], factors[at:], needed[at:], call)
        if not dx and not any(map(any, needed[:at])):
            return None, [None] * (3 * at) + mlp_grads
        out, grads = self._attention.backward(dx2, x, kept[1:-3], factors[:at], needed[:at], call, dx=dx)
        return out, grads + mlp_grads


def _norm(module: Any, kind: tuple[float, bool]) -> Norm | None:
    if module is None:
        return None
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, float(eps), *kind)


def _forward(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.forward(x)


def _backward(norm: Norm | None, dy: Tensor, x: Tensor) -> Tensor:
    return dy if norm is None else norm.backward(dy, x)
