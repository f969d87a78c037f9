"""The parts of decoder and encoder layers, each with a hand-written backward pass.

A part's `backward` takes the gradient of its output and what `forward` read or kept, and recomputes everything else. Frozen weights get no
gradient. Tensors are flat: x (N, width), with the N positions that `Places` chooses.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.models.lean.places import Places
from fedtune.models.methods import SLOT

Factors = Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]]  # A, B and m of each linear layer; None if it has none
Needed = Sequence[tuple[bool, bool, bool]]  # whether A, B and m of each layer need a gradient
Gradients = list[Tensor | None]

SCORES = 1 << 22  # attention scores to compute at once
_aten = torch.ops.aten
_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def rows_of(x: Tensor, like: Tensor) -> Tensor:
    """x (N, width) as (C, N / C, width) if `like` holds a matrix for each of C clients or groups, (C, …); otherwise x."""
    return x if like.ndim == 2 else x.reshape(len(like), -1, x.shape[-1])


def times(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias with w (out, in), or (C, out, in) and no bias.

    oneDNN multiplies float32 on a CPU, because MKL, which torch would use, reaches half of its speed on AMD's processors.
    """
    if w.ndim == 3:
        return torch.bmm(rows_of(x, w), w.mT).flatten(0, 1)
    if _ONEDNN and x.dtype is torch.float32 and x.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def add_(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """y (N, out) + x w in place, with w (in, out) or (C, in, out)."""
    return y.addmm_(x, w) if w.ndim == 2 else y.view(len(w), -1, y.shape[1]).baddbmm_(rows_of(x, w), w)


def outer(y: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """yᵀ x, (out, in); or (C, out, in), if `like` is stacked."""
    y, x = rows_of(y, like), rows_of(x, like)
    return (x.mT @ y).mT if x.shape[-1] < y.shape[-1] else y.mT @ x  # a product with few columns is several times slower


class States(dict["Linears | Linear", Tensor]):
    """Linears → the generator's state before they drew dropout; Linear → the norms of the rows of DoRA's weight.

    Args:
        places: The positions of x that are computed; None: all.
    """

    def __init__(self, places: Places | None = None) -> None:
        super().__init__()
        self._places = places

    def noise(self, x: Tensor, rate: float) -> Tensor:
        """Dropout's factors for x (N, width), drawn for all positions, as PEFT's modules draw them."""
        size = len(x) if self._places is None else self._places.size.numel()
        drawn = x.new_empty(size, x.shape[1]).bernoulli_(1 - rate).div_(1 - rate)  # as torch draws it
        return drawn if self._places is None else self._places.pack(drawn)


class Linear:
    """A frozen linear layer, quantized or not, with its LoRA factors: y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ.

    With DoRA's magnitudes m, y = m / n · (x Wᵀ + s·(x Aᵀ) Bᵀ) + b, where n has the norms of the rows of W + s·B·A and no gradient.

    Args:
        module: The layer, or PEFT's layer around it.

    Attributes:
        stacked: A (C, r, in) and s·B (C, out, r) of C clients or groups, with N / C rows of x each; None: PEFT's layer has A, B and s.
    """

    def __init__(self, module: nn.Module) -> None:
        self.adapted = hasattr(module, "lora_A")
        self.module: Any = module
        self.base: Any = module.base_layer if self.adapted else module
        self.stacked: tuple[Tensor, Tensor] | None = None

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.adapted:
            return None, None, None
        if self.stacked is not None:
            return *self.stacked, None
        magnitudes = self.module.lora_magnitude_vector
        m = magnitudes[SLOT].weight if SLOT in magnitudes else None
        return self.module.lora_A[SLOT].weight, self.module.lora_B[SLOT].weight, m

    def scale_(self, x: Tensor, b: Tensor) -> Tensor:
        """x times s, in place; x if B is stacked, which has s already."""
        return x.mul_(self.module.scaling[SLOT]) if b.ndim == 2 else x

    @property
    def dropout(self) -> float:
        """The adapter's dropout rate in the current mode."""
        return self.dropout_rate if self.adapted and self.module.lora_dropout[SLOT].training else 0.0

    @property
    def dropout_rate(self) -> float:
        """The adapter's dropout rate in training."""
        drop = self.module.lora_dropout[SLOT] if self.adapted else None
        return drop.p if isinstance(drop, nn.Dropout) else 0.0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in); a quantized one is dequantized, so do not keep it."""
        weight = self.base.weight
        if weight.is_floating_point():
            return weight
        from fedtune.models.quantize import dequantized  # imported late: it loads bitsandbytes

        return dequantized(self.base, dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.base.bias is None else self.base.bias.to(dtype)


@contextmanager
def _random_from(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """A context whose random numbers start from this state; afterward, the generator continues as if it were not used."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        (torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state))
        yield


def _generator_state(device: torch.device) -> Tensor:
    """The generator's state."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class Linears:
    """Linear layers with the same input. They share the products with A: x [A₁; A₂; …]ᵀ, and their gradients."""

    def __init__(self, *modules: nn.Module) -> None:
        self.layers = [Linear(m) for m in modules]

    def forward(self, x: Tensor, factors: Factors, states: States) -> list[Tensor]:
        """Each layer's y, (N, out). Dropout draws from the global generator, layer by layer, or from the state of an earlier call."""
        again = states.get(self)
        if again is None and self._rate(factors):
            states[self] = _generator_state(x.device)
        with _random_from(again, x.device):
            inner = [t for group, a, noise in self._groups(x, factors, states) for t in self._inner(x, factors, group, a, noise)]
        out = []
        for layer, (a, b, m) in zip(self.layers, factors, strict=True):
            w, bias = layer.weight(x.dtype), layer.bias(x.dtype)
            y = times(x, w, bias if m is None else None)
            if b is not None:
                add_(y, layer.scale_(inner.pop(0), b), b.to(x.dtype).mT)
            if m is not None:
                change = layer.scale_(cast(Tensor, b) @ cast(Tensor, a), cast(Tensor, b))
                states[layer] = torch.linalg.vector_norm(change.to(w.dtype).add_(w), dim=1)
                y.mul_(m / states[layer])
                y = y if bias is None else y.add_(bias)
            out.append(y)
        return out

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, factors: Factors, needed: Needed, states: States, *, dx: bool = True
    ) -> tuple[Tensor | None, Gradients]:
        """dx (N, in), or None if not wanted, and dA₁, dB₁, dm₁, dA₂, … where needed."""
        total: Tensor | None = None
        grads: list[Gradients] = [[None, None, None] for _ in self.layers]
        given, magnitudes = dys, [m for _, _, m in factors]
        dys = [dy if m is None else (dy * (m / states[n])).to(dy.dtype) for dy, m, n in zip(dys, magnitudes, self.layers, strict=True)]
        if dx:
            for layer, dy in zip(self.layers, dys, strict=True):
                part = times(dy, layer.weight(dy.dtype).T)
                total = part if total is None else total.add_(part)
        with _random_from(states.get(self), x.device):
            for group, a, noise in self._groups(x, factors, states):
                dts = []
                for i, t in zip(group, self._inner(x, factors, group, a, noise), strict=True):
                    b, layer = cast(Tensor, factors[i][1]), self.layers[i]
                    dts.append(layer.scale_(times(dys[i], b.to(x.dtype).mT), b))
                    t = layer.scale_(t, b)
                    if needed[i][1]:
                        grads[i][1] = outer(dys[i], t, b).to(b.dtype)
                    if needed[i][2]:
                        z = add_(times(x, layer.weight(x.dtype)), t, b.to(x.dtype).mT)
                        grads[i][2] = z.mul_(given[i]).sum(0, dtype=torch.float32).div_(states[layer])
                dt = dts[0] if len(dts) == 1 else torch.cat(dts, dim=1)
                if any(needed[i][0] for i in group):
                    da = outer(dt, x if noise is None else x * noise, a)
                    for i, part in zip(group, da.split([d.shape[1] for d in dts], dim=-2), strict=True):
                        grads[i][0] = part.to(cast(Tensor, factors[i][0]).dtype) if needed[i][0] else None
                if total is not None and noise is None:
                    add_(total, dt, a)
                elif total is not None:
                    total.addcmul_(times(dt, a.mT), cast(Tensor, noise))
        return total, [g for triple in grads for g in triple]

    def _rate(self, factors: Factors) -> float:
        """The adapters' dropout rate."""
        return max((layer.dropout for layer, (a, *_) in zip(self.layers, factors, strict=True) if a is not None), default=0.0)

    def _groups(self, x: Tensor, factors: Factors, states: States) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """(layers whose adapters have the same input, their A's concatenated by rows, the dropout's factors or None)."""
        adapted, rate = [i for i, (a, *_) in enumerate(factors) if a is not None], self._rate(factors)
        for group in [[i] for i in adapted] if rate else [adapted] if adapted else []:
            parts = [cast(Tensor, factors[i][0]).to(x.dtype) for i in group]
            noise = states.noise(x, rate) if rate else None
            yield group, parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2), noise

    def _inner(self, x: Tensor, factors: Factors, group: list[int], a: Tensor, noise: Tensor | None) -> Sequence[Tensor]:
        """drop(x) Aᵀ of each layer of the group, (N, r)."""
        return times(x if noise is None else x * noise, a).split([cast(Tensor, factors[i][0]).shape[-2] for i in group], dim=1)


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last dimension: y = w · x / √(mean(x²) + ε), computed in float32.

    Args:
        weight: w.
        eps: ε.
        offset: Number added to the weight (Gemma: 1).
        early: Whether the normalized x is rounded to x's dtype before the product with w (Llama), or after it.
    """

    weight: Tensor
    eps: float
    offset: float
    early: bool

    def forward(self, x: Tensor) -> Tensor:
        y = x * self._scale(x)
        if self.early:
            return y.to(x.dtype).mul_(self.weight)
        return y.mul_(self.weight.float() + self.offset).to(x.dtype)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """r·w·dy − x·r³·mean(w·dy·x), with r = 1 / √(mean(x²) + ε)."""
        r, wide = self._scale(x), x.float()
        g = dy * (self.weight.float() + self.offset)
        inner = (g * wide).mean(-1, keepdim=True)
        return g.mul_(r).addcmul_(wide, r.pow(3).mul_(inner), value=-1).to(x.dtype)

    def _scale(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return size.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class LayerNorm:
    """torch's layer norm over the last dimension.

    Args:
        module: The norm.
    """

    module: nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x)[0]

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        m, (_, mean, scale) = self.module, self._normed(x)
        return _aten.native_layer_norm_backward(dy, x, m.normalized_shape, mean, scale, m.weight, m.bias, [True, False, False])[0]

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.module
        return _aten.native_layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Rotary embedding of x (B, T, H, D), as (B, H, T, D); or, with `back`, its transpose on (B, H, T, D), as (B, T, H, D).

    cos and sin are (B or 1, T, R), R ≤ D; channels from R on are not rotated.
    """
    half, width = cos.shape[-1] // 2, cos.shape[-1]
    cos, sin = (t.unsqueeze(1 if back else 2) for t in (cos, sin))
    b, i, j, d = x.shape
    out = x.new_empty(b, j, i, d)
    view, flip = out.transpose(1, 2), -1 if back else 1
    first, second = (x[..., :half], x[..., half:width])
    s1, s2 = (sin[..., :half], sin[..., half:]) if not back else (sin[..., half:], sin[..., :half])
    torch.mul(first, cos[..., :half], out=view[..., :half]).addcmul_(second, s1, value=-flip)
    torch.mul(second, cos[..., half:], out=view[..., half:width]).addcmul_(first, s2, value=flip)
    view[..., width:] = x[..., width:]
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, of the shape of q. With `cap` c, scores become c · tanh(score / c) before the mask.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D); each serves H / K heads.
        mask: (B or 1, 1, T, T), added to scores; None is causal.
        scale, cap: As in the formula.
    """
    if _fused(q, k, cap):
        return _kernel(q, k, v, mask, scale)
    out = torch.empty_like(q)
    for (y, a, b, c), m in _pieces((out, q, k, v), mask):
        y.copy_(_probabilities(a, b, m, scale, cap)[0] @ c)
    return out


def attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None
) -> tuple[Tensor, ...]:
    """dq, dk and dv of `attend`, which recomputes the probabilities."""
    if _fused(q, k, cap):
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            return torch.autograd.grad(_kernel(q, k, v, mask, scale), (q, k, v), dy)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    for (d, a, b, c, da, db, dc), m in _pieces((dy, q, k, v, dq, dk, dv), mask):
        p, slope = _probabilities(a, b, m, scale, cap)
        dc.copy_(p.transpose(-1, -2) @ d)
        ds = _aten._softmax_backward_data(d @ c.transpose(-1, -2), p, -1, p.dtype)
        if slope is not None:
            ds.mul_(slope)
        da.copy_(ds @ b)
        db.copy_(ds.transpose(-1, -2) @ a)
    return dq.mul_(scale), dk.mul_(scale), dv


def _fused(q: Tensor, k: Tensor, cap: float | None) -> bool:
    """Whether torch's attention kernel is used.

    On a CPU, two products and a softmax are as fast as the kernel in float32, and far faster in bf16, but they need all scores of a head at
    once, and a long row has too many.
    """
    length = q.shape[-2]
    return cap is None and (q.device.type == "cuda" or q.shape[1] // k.shape[1] * length * length > SCORES)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (mask is not None or q.device.type != "cuda"):  # with a mask, grouped queries leave torch's fast kernels
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """softmax of the scores, (b, k, g·T, T), and the cap's derivative; q (b, k, g·T, D)."""
    s, slope = q @ k.transpose(-1, -2), None
    if cap is not None:
        s.mul_(scale / cap).tanh_()
        slope, scale = 1 - s.square(), cap
    size = mask.shape[-1]
    grid = s.view(*s.shape[:2], -1, size, size)
    torch.add(mask[:, :, None], grid, alpha=scale, out=grid)
    return torch.softmax(s, -1), slope


def _pieces(tensors: Sequence[Tensor], mask: Tensor | None) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Pieces of rows and key heads with at most `SCORES` scores, or of one key head: views (b, k, g·T, D), and the mask's rows."""
    rows, heads, length, _ = tensors[1].shape
    kv = tensors[2].shape[1]
    if mask is None:
        mask = tensors[1].new_full((1, 1, length, length), torch.finfo(tensors[1].dtype).min).triu_(1)
    grouped = [t.view(rows, kv, -1, t.shape[-1]) for t in tensors]
    step = max(1, SCORES // (heads * length * length))
    part = kv if heads * length * length <= SCORES else max(1, SCORES // (heads // kv * length * length))
    for i in range(0, rows, step):
        for j in range(0, kv, part):
            yield [t[i : i + step, j : j + part] for t in grouped], mask if len(mask) == 1 else mask[i : i + step]


Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # the function; (dy, x) → dx

ACTIVATIONS: dict[str, Activation] = {
    "silu": (F.silu, lambda dy, x: _aten.silu_backward(dy, x)),
    "swish": (F.silu, lambda dy, x: _aten.silu_backward(dy, x)),
    "gelu": (F.gelu, lambda dy, x: _aten.gelu_backward(dy, x)),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    ),
}
