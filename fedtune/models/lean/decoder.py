"""A decoder layer as one step of the backward pass.

    x2 = x + norm?(o(attention(q, k, v)))         q, k, v = linear(norm(x))
    y = x2 + norm?(down(act(gate) · up))          gate, up = linear(norm(x2))

A layer keeps x, the outputs of q, k, v, gate and up, what o reads, and x2; with activation checkpointing only x.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedtune.models.lean.functions import (
    ACTIVATIONS,
    Gradients,
    Linear,
    Linears,
    Needed,
    Norm,
    Pairs,
    States,
    attend,
    attend_backward,
    rotate,
)  # fmt: skip

__all__ = ["LAYERS", "Layer", "Pass"]

Kept = list[Tensor | None]

_ALIGNMENT = 64  # bytes
# transformers' class of a decoder layer → (number added to the norms' weights, whether they round before the product with it)
LAYERS = {
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


class Pass:
    """One forward pass over all layers, with what the layers share.

    Args:
        keeps: Whether layers keep intermediate tensors; otherwise the backward pass computes them again.
        layers: Number of layers.
    """

    def __init__(self, *, keeps: bool, layers: int) -> None:
        self.keeps, self._layers = keeps, layers
        self._shared: dict[int, tuple[Any, Any]] = {}
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def mask(self, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask to add to scores, (B or 1, 1, T, T), from transformers' mask: bool, float, or None for a causal one."""
        if given is None:
            return None
        lowest = torch.finfo(dtype).min
        if given.dtype is torch.bool:
            return self._once(given, lambda: torch.zeros_like(given, dtype=dtype).masked_fill_(~given, lowest))
        return self._once(given, lambda: given.to(dtype).clamp(min=lowest))

    def rotation(self, given: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, T, R)."""
        return self._once(given[0], lambda: (given[0].to(dtype), given[1].to(dtype)))

    def store(self, y: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """A layer's output and what it keeps, copied to one block of memory for all layers; on a GPU, the tensors themselves.

        In the heap, a layer's temporary tensors would leave holes between the tensors that stay, too small for those of the next layer. A
        large block also returns to the system as soon as it is free.
        """
        sizes = [0 if t is None else -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in (y, *kept)]
        if not self._used and y.device.type == "cpu":
            self._block = torch.empty(sum(sizes) * self._layers, dtype=torch.uint8)
        if self._used + sum(sizes) > len(self._block):  # no block, or a layer of another size
            return y, kept
        out, memory = Kept(), self._block.untyped_storage()
        for tensor, size in zip((y, *kept), sizes, strict=True):
            if tensor is not None:  # not as views of the block: a change of one would count as a change of all
                own = cast(Any, tensor.new_empty(0))
                tensor = own.set_(memory, self._used // tensor.itemsize, tensor.shape).copy_(tensor)
            out.append(tensor)
            self._used += size
        return cast(Tensor, out[0]), out[1:]

    def _once(self, source: Any, make: Callable[[], Any]) -> Any:
        if id(source) not in self._shared:
            self._shared[id(source)] = source, make()  # the source too, so that its id is not given to another tensor
        return self._shared[id(source)][1]


class _Call:
    """One layer's call: its mask, its rotary embedding, and the states of the generator."""

    def __init__(self, run: Pass, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor]) -> None:
        self.run, self.size = run, x.shape[:2]
        self.mask, self.rotation = run.mask(mask, x.dtype), run.rotation(rotation, x.dtype)
        self.states: States = {}


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

    def forward(self, x: Tensor, pairs: Pairs, call: _Call) -> tuple[Tensor, Kept]:
        given = self.qkv.forward(_forward(self.norm, x), pairs[:-1], call.states)
        if len(given) == 1:
            given = list(given[0].split(self.widths, dim=1))
        q, k, v = self._heads(given, call)
        a = attend(q, k, v, call.mask, self.scale, self.cap).transpose(1, 2).reshape(len(x), -1)
        del q, k, v
        (y,) = self.o.forward(a, pairs[-1:], call.states)
        return _forward(self.post, y).add_(x), [*given, a, y if self.post else None]

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, pairs: Pairs, needed: Needed, call: _Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        *given, a, y = cast(list[Tensor], kept)
        da, o_grads = self.o.backward([_backward(self.post, dy, y)], a, pairs[-1:], needed[-1:], call.states)
        da = cast(Tensor, da).view(*call.size, -1, self.width).transpose(1, 2).contiguous()
        q, k, v = self._heads(given, call)
        dheads = list(attend_backward(da, q, k, v, call.mask, self.scale, self.cap))
        del da, q, k, v
        for i in range(3):
            turned = i < 2 and self.rotates
            dheads[i] = (rotate(dheads[i], *call.rotation, back=True) if turned else dheads[i].transpose(1, 2)).reshape(len(x), -1)
        for i, norm in enumerate(self.norms):
            if norm is not None:
                dheads[i] = norm.backward(*(self._by_head(t) for t in (dheads[i], given[i]))).flatten(1)
        if len(self.qkv.layers) == 1:
            dheads = [torch.cat(dheads, dim=1)]
        dn, grads = self.qkv.backward(dheads, _forward(self.norm, x), pairs[:-1], needed[:-1], call.states, dx=dx)
        return None if dn is None else _backward(self.norm, dn, x).add_(dy), grads + o_grads

    def _heads(self, given: Sequence[Tensor], call: _Call) -> list[Tensor]:
        """q (B, H, T, D), k and v (B, K, T, D) as attention reads them, from the linear layers' outputs."""
        normed = [t if n is None else n.forward(self._by_head(t)) for t, n in zip(given, (*self.norms, None), strict=True)]
        q, k, v = (t.reshape(*call.size, -1, self.width) for t in normed)
        return [
            *(rotate(t, *call.rotation) if self.rotates else t.transpose(1, 2).contiguous() for t in (q, k)),
            v.transpose(1, 2).contiguous(),
        ]

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, H·D) as a head's norm reads it."""
        return x if self.whole else x.reshape(len(x), -1, self.width)


class _Mlp:
    """y = x + norm?(down(act(gate) · up))."""

    def __init__(self, module: Any, norm: Norm | None, post: Norm | None, activation: str) -> None:
        self.norm, self.post = norm, post
        self.inputs = Linears(*([module.gate_up_proj] if hasattr(module, "gate_up_proj") else [module.gate_proj, module.up_proj]))
        self.down = Linears(module.down_proj)
        self.linears = [*self.inputs.layers, *self.down.layers]
        self.act, self.act_backward = ACTIVATIONS[activation]

    def forward(self, x: Tensor, pairs: Pairs, call: _Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        """y and what `backward` needs; without `last`, y is x."""
        given = self.inputs.forward(_forward(self.norm, x), pairs[:-1], call.states)
        gate, up = given if len(given) == 2 else given[0].chunk(2, dim=1)
        if not last and self.post is None:
            return x, [gate, up, None]
        (y,) = self.down.forward(self.act(gate).mul_(up), pairs[-1:], call.states)
        return _forward(self.post, y).add_(x) if last else x, [gate, up, y if self.post else None]

    def backward(self, dy: Tensor, x: Tensor, kept: Kept, pairs: Pairs, needed: Needed, call: _Call) -> tuple[Tensor, Gradients]:
        gate, up, y = cast(list[Tensor], kept)
        a = self.act(gate)
        dh, down_grads = self.down.backward([_backward(self.post, dy, y)], a * up, pairs[-1:], needed[-1:], call.states)
        dup = a.mul_(cast(Tensor, dh))
        dgate = self.act_backward(cast(Tensor, dh).mul_(up), gate)
        del a, dh
        dgiven = [dgate, dup] if len(self.inputs.layers) == 2 else [torch.cat([dgate, dup], dim=1)]
        del dgate, dup
        dn, grads = self.inputs.backward(dgiven, _forward(self.norm, x), pairs[:-1], needed[:-1], call.states)
        return _backward(self.norm, cast(Tensor, dn), x).add_(dy), grads + down_grads


class Layer:
    """A decoder layer of transformers.

    Args:
        module: The layer, in which PEFT may have adapted linear layers.
        activation: Name of the feed-forward block's activation, in `ACTIVATIONS`.

    Attributes:
        module: The layer.
        linears: Its linear layers.
        frozen: Its parameters that are not LoRA factors.
    """

    def __init__(self, module: Any, activation: str) -> None:
        kind = LAYERS[type(module).__name__]
        found = {n: _norm(m, kind) for n, m in module.named_children() if n.endswith("layernorm")}
        first, second = found.get("input_layernorm"), found.get("post_attention_layernorm")
        if "post_feedforward_layernorm" in found:  # Gemma 2 and 3, OLMo 2: norms of the blocks' outputs
            attention, mlp = (first, second), (found.get("pre_feedforward_layernorm"), found["post_feedforward_layernorm"])
        else:
            attention, mlp = (first, None), (second, None)
        self.module = module
        self._attention = _Attention(module.self_attn, *attention, kind)
        self._mlp = _Mlp(module.mlp, *mlp, activation)
        self.linears: list[Linear] = [*self._attention.linears, *self._mlp.linears]
        factors = {id(f) for linear in self.linears for f in linear.factors}
        self.frozen = [p for p in module.parameters() if id(p) not in factors]

    def __call__(self, run: Pass, x: Tensor, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output, (B, T, hidden)."""
        call = _Call(run, x, attention_mask, position_embeddings)
        flat = [f for linear in self.linears for f in linear.factors]
        return cast(Tensor, _Step.apply(self, call, x.flatten(0, 1), *flat)).view_as(x)

    def forward(self, x: Tensor, pairs: Pairs, call: _Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        """y (N, hidden) and what `backward` needs; without `last`, y is not computed."""
        at = len(self._attention.linears)
        x2, first = self._attention.forward(x, pairs[:at], call)
        y, second = self._mlp.forward(x2, pairs[at:], call, last=last)
        return y, [x2, *first, *second]

    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, pairs: Pairs, needed: Needed, call: _Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        at = len(self._attention.linears)
        dx2, mlp_grads = self._mlp.backward(dy, cast(Tensor, kept[0]), kept[-3:], pairs[at:], needed[at:], call)
        if not dx and not any(map(any, needed[:at])):
            return None, [None] * (2 * at) + mlp_grads
        out, grads = self._attention.backward(dx2, x, kept[1:-3], pairs[:at], needed[:at], call, dx=dx)
        return out, grads + mlp_grads


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, call: _Call, x: Tensor, *factors: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, kept = layer.forward(x, _pairs(factors), call)
        y, kept = call.run.store(y, kept) if call.run.keeps else (y, [])
        ctx.layer, ctx.call = layer, call
        ctx.save_for_backward(x, *factors, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer, call, at = ctx.layer, ctx.call, 1 + 2 * len(ctx.layer.linears)
        x, pairs, kept = ctx.saved_tensors[0], _pairs(ctx.saved_tensors[1:at]), list(ctx.saved_tensors[at:])
        if not call.run.keeps:
            kept = layer.forward(x, pairs, call, last=False)[1]
        dx, grads = layer.backward(dy, x, kept, pairs, _pairs(ctx.needs_input_grad[3:]), call, dx=ctx.needs_input_grad[2])
        return None, None, dx, *grads


def _pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _norm(module: Any, kind: tuple[float, bool]) -> Norm | None:
    if module is None:
        return None
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, float(eps), *kind)


def _forward(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.forward(x)


def _backward(norm: Norm | None, dy: Tensor, x: Tensor) -> Tensor:
    return dy if norm is None else norm.backward(dy, x)
