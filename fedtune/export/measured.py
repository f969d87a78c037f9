"""Measures a merged model's perplexity before quantization, layer by layer in float32: the model is never complete in memory.

The score is that of `fedtune.inference.quantize.perplexity`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedtune.export.merged import Merged
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.reference.attention import soft_cap
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.layers import embedded, pass_layer, prefix_of
from fedtune.inference.quantize.perplexity import Piece, Score
from fedtune.inference.quantize.weights import Weights
from fedtune.storage.heap import give_back

__all__ = ["streamed_score"]

_TABLE, _LOGITS = 1 << 20, 1 << 19  # entries of the head that are read at once; logits that are computed at once


@torch.inference_mode()
def streamed_score(merged: Merged, pieces: Sequence[Piece], scratch: Path | None = None) -> Score:
    """Score the merged weights on the last tokens of each piece, after the model's virtual tokens.

    Args:
        scratch: As `quantize_model`'s.
    """

    def read(name: str, first: int, last: int) -> Tensor:
        return merged.tensors[name].rows(first, last, torch.float32)

    shape, sizes = merged.shape, dict(tensor_shapes(merged.shape))
    hidden = embedded(shape, read, [ids for ids, _ in pieces], merged.virtual_tokens.get("prompt.embeds"), scratch)
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        weights = Weights({n[len(at) :]: n for n in sizes if n.startswith(at)}, sizes, read)
        pass_layer(shape, index, weights, hidden, prefix_of(merged.virtual_tokens, index))
        give_back()
    norm = merged.tensors["model.norm.weight"].read(torch.float32) + shape.norm_offset
    last, first = Hidden([new for _, new in pieces], shape.hidden, scratch), 0
    for h, (_, new) in zip(hidden, pieces, strict=True):
        last.put(first, torch.rms_norm(h[-new - 1 : -1], (shape.hidden,), norm, shape.eps))
        first += new
    return Score(_nats(merged, last, torch.cat([ids[-new:] for ids, new in pieces])), first)


def _nats(merged: Merged, hidden: Hidden, wanted: Tensor) -> float:
    """Mean of log Σ exp z − z[wanted], where z are the logits of the hidden states; in blocks of the vocabulary and of the tokens."""
    shape, n = merged.shape, len(wanted)
    head = merged.tensors["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
    total, own = torch.full((n,), -torch.inf, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    step = max(_TABLE // shape.hidden, 1)
    rows = max(_LOGITS // min(step, shape.vocab), 1)
    for first in range(0, shape.vocab, step):
        table = head.rows(first, min(first + step, shape.vocab), torch.float32)
        for a in range(0, n, rows):
            b = min(a + rows, n)
            z = soft_cap(hidden.rows(a, b) @ table.T, shape.logit_cap).double()
            total[a:b] = torch.logaddexp(total[a:b], z.logsumexp(1))
            here = ((wanted[a:b] >= first) & (wanted[a:b] < first + len(table))).nonzero()[:, 0]
            own[a + here] = z[here, wanted[a + here] - first]
    return float((total - own).mean())
