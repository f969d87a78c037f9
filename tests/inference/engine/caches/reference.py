"""Reference attention, computed key by key, for the expected outputs of caches."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedtune.inference.engine.caches.base import Cache
from fedtune.inference.engine.reference.attention import attend, rotate
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import RopeShape, Shape


def shape(
    *, layers: int = 2, heads: int = 6, kv_heads: int = 2, head_dim: int = 10, windows: tuple[int | None, ...] | None = None
) -> Shape:
    return Shape(
        family="llama",
        hidden=heads * head_dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=32,
        vocab=17,
        eps=1e-5,
        context=4096,
        tied=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=windows or (None,) * layers,
        rope=RopeShape(),
        bos=0,
        eos=(1,),
    )


def tokens(of: Shape, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [layers, n, H, D], k and v [layers, n, Hkv, D] of n random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(of.layers, n, heads, of.head_dim, generator=generator)

    return draw(of.heads), draw(of.kv_heads), draw(of.kv_heads)


def passes(cache: Cache, rope: Rope, qkv: tuple[Tensor, Tensor, Tensor], cuts: Iterable[int], begin: int = 0) -> Tensor:
    """Attention outputs [layers, sum(cuts), H, D] of the tokens from `begin` on.

    They enter the cache in texts of the sizes in `cuts`, each in as few passes as the cache allows.
    """
    q, k, v = qkv
    out = []
    for n in cuts:
        cache.require_capacity(n)
        end = begin + n
        while begin < end:
            rows = cache.most(end - begin)
            cache.prepare(rows)
            part = slice(begin, begin + rows)
            out.append(torch.stack([attend(cache, i, q[i, part], k[i, part], v[i, part], rope) for i in range(q.shape[0])]))
            cache.advance(rows)
            begin += rows
    return torch.cat(out, 1)


def reference_attention(
    rope: Rope,
    qkv: tuple[Tensor, Tensor, Tensor],
    seen: Callable[[int], list[int]] = lambda p: list(range(p + 1)),
    place: Callable[[int, int], tuple[int, int]] = lambda p, j: (p, j),
) -> Tensor:
    """[layers, n, H, D]: query p attends to the keys `seen(p)`; both are rotated by the positions `place(p, j)`."""
    q, k, v = qkv
    layers, n, heads, width = q.shape
    out = torch.empty_like(q)
    for i in range(layers):
        for p in range(n):
            keys = seen(p)
            for h in range(heads):
                at = h // (heads // k.shape[2])
                scores = []
                for j in keys:
                    a, b = place(p, j)
                    scores.append((rotate(rope, q[i, p : p + 1, h : h + 1], a) * rotate(rope, k[i, j : j + 1, at : at + 1], b)).sum())
                weights = (torch.stack(scores) / width**0.5).softmax(0)
                out[i, p, h] = weights @ v[i, keys, at]
    return out
