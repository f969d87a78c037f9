"""The perplexity of a merged model before it is quantised, layer after layer in float32: the model is never whole in memory.

Windows, strides and what is scored are those of `fedtune.inference.quantise.perplexity`.
"""

import torch
from torch import Tensor

from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.merged import Merged
from fedtune.inference.quantise.layers import pass_layer
from fedtune.inference.quantise.perplexity import Score

__all__ = ["streamed_perplexity"]

_STRETCH = 1 << 22  # logits that are made at once


@torch.inference_mode()
def streamed_perplexity(merged: Merged, ids: Tensor, *, window: int) -> Score:
    """How well the merged weights foretell a text, in windows every half window; virtual tokens of a prompt stand before each.

    Args:
        ids: [n] of the whole text, at least 2.
        window: Most tokens that the model sees, virtual ones not counted.
    """
    pieces, news, scored = [], [], 1  # `perplexity` has the same loop
    for begin in range(0, ids.numel(), max(window // 2, 1)):
        pieces.append(ids[begin : begin + window])
        news.append(begin + len(pieces[-1]) - scored)
        scored += news[-1]
        if scored == ids.numel():
            break
    embeds = _embeddings(merged, ids)
    prompt = merged.virtual.get("prompt.embeds", torch.empty(0, merged.shape.hidden))
    starts = range(0, ids.numel(), max(window // 2, 1))
    hidden = [torch.cat([prompt, embeds[s : s + len(p)]]) for s, p in zip(starts, pieces, strict=False)]
    sizes = dict(tensor_shapes(merged.shape))
    for index in range(merged.shape.layers):
        at = f"model.layers.{index}."
        tensors = {n[len(at) :]: merged.tensors[n].read(torch.float32) for n in sizes if n.startswith(at)}
        hidden = pass_layer(merged.shape, index, tensors, hidden)
    norm = merged.tensors["model.norm.weight"].read(torch.float32)
    last = torch.cat([h[-new - 1 : -1] for h, new in zip(hidden, news, strict=True)])
    wanted = torch.cat([p[-new:] for p, new in zip(pieces, news, strict=True)])
    return Score(_nats(merged, torch.rms_norm(last, (merged.shape.hidden,), norm, merged.shape.eps), wanted), len(wanted))


def _embeddings(merged: Merged, ids: Tensor) -> Tensor:
    table, out = merged.tensors["model.embed_tokens.weight"], torch.empty(len(ids), merged.shape.hidden)
    step = max(_STRETCH // merged.shape.hidden, 1)
    for first in range(0, merged.shape.vocab, step):
        chosen = (ids >= first) & (ids < first + step)
        out[chosen] = table.rows(first, min(first + step, merged.shape.vocab), torch.float32)[ids[chosen] - first]
    return out


def _nats(merged: Merged, hidden: Tensor, wanted: Tensor) -> float:
    """Mean of log Σ exp z − z[wanted] of hidden states [n, d], over a part of the vocabulary at a time."""
    head = merged.tensors["model.embed_tokens.weight" if merged.shape.tied else "lm_head.weight"]
    total, own = torch.full((len(hidden),), -torch.inf, dtype=torch.float64), torch.empty(len(hidden), dtype=torch.float64)
    step = max(_STRETCH // max(len(hidden), merged.shape.hidden), 1)
    for first in range(0, merged.shape.vocab, step):
        z = (hidden @ head.rows(first, min(first + step, merged.shape.vocab), torch.float32).T).double()
        total = torch.logaddexp(total, z.logsumexp(1))
        here = ((wanted >= first) & (wanted < first + step)).nonzero()[:, 0]
        own[here] = z[here, wanted[here] - first]
    return float((total - own).mean())
