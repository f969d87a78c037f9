"""The perplexity of a merged model before it is quantised, layer after layer in float32: the model is never whole in memory.

What is scored is what `fedtune.inference.quantise.perplexity` scores.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.merged import Merged
from fedtune.inference.quantise.layers import pass_layer
from fedtune.inference.quantise.perplexity import Piece, Score

__all__ = ["streamed_score"]

_STRETCH = 1 << 22  # logits that are made at once


@torch.inference_mode()
def streamed_score(merged: Merged, pieces: Sequence[Piece]) -> Score:
    """How well the merged weights foretell the last tokens of each piece; virtual tokens of a prompt stand before each."""
    embeds = _embeddings(merged, torch.cat([ids for ids, _ in pieces])).split([len(ids) for ids, _ in pieces])
    prompt = merged.virtual.get("prompt.embeds", torch.empty(0, merged.shape.hidden))
    hidden = [torch.cat([prompt, one]) for one in embeds]
    sizes = dict(tensor_shapes(merged.shape))
    for index in range(merged.shape.layers):
        at = f"model.layers.{index}."
        tensors = {n[len(at) :]: merged.tensors[n].read(torch.float32) for n in sizes if n.startswith(at)}
        hidden = pass_layer(merged.shape, index, tensors, hidden)
    norm = merged.tensors["model.norm.weight"].read(torch.float32)
    last = torch.cat([h[-new - 1 : -1] for h, (_, new) in zip(hidden, pieces, strict=True)])
    wanted = torch.cat([ids[-new:] for ids, new in pieces])
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
