"""The clients of one flat batch: tensors, rows and dropout of each, for the modules that replace the model's."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.models import LiveAdapter
from fedtune.models.backbone import dropout_rates


@dataclass
class ClientBatch:
    """C clients with a batch of B rows each, padded to T tokens.

    Args:
        views: Canonical name → the clients' tensors, (C, *shape).
        scaling: LoRA module → the clients' scaling factors, (C,).
        generators: Each client's random generator for dropout.
        rows: Number of real rows of each client, which come first; the others are padding.
        widths: Tokens of each client's longest row.
        length: T.
        training: Whether dropout is applied.
    """

    views: dict[str, Tensor] = field(default_factory=dict)
    scaling: dict[str, Tensor] = field(default_factory=dict)
    generators: list[torch.Generator] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    length: int = 0
    training: bool = True

    def __len__(self) -> int:
        return len(self.generators)

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Apply dropout to x (C, B, …) with the same random numbers as if each client trained alone, without the others' padding."""
        if not self.training or p == 0:
            return x
        keep = torch.zeros_like(x)
        for k, generator in enumerate(self.generators):
            shape = list(x.shape[2:])
            if x.ndim == 4 and shape[0] == self.length:
                shape[0] = self.widths[k]  # alone, the client's batch is padded only to its own longest row
            noise = torch.empty(self.rows[k], *shape).bernoulli_(1 - p, generator=generator).div_(1 - p)
            keep[(k, slice(0, self.rows[k]), *(slice(d) for d in shape))] = noise.to(x.device, x.dtype)
        return x * keep


def shared_dropout(live: LiveAdapter) -> str | None:
    """Why dropout cannot be drawn per client; None if it can, or if there is no dropout."""
    if drawn := dropout_rates(live.backbone.model.config):
        return f"the backbone draws dropout for the whole batch ({', '.join(drawn)}): set model.dropout=false"
    if live.backbone.seq2seq and any(isinstance(m, nn.Dropout) and m.p > 0 for m in live.model.modules()):
        return "an encoder-decoder draws the adapter's dropout for two lengths: set peft.dropout=0"
    return None


Forward = Callable[[Mapping[str, Tensor], TaskConfig], Tensor]
"""A flat batch (C·B, T) → float32 losses (N,) of all counted positions, row by row, in the order of `counted_logits`."""

Way = Callable[[LiveAdapter, ClientBatch], AbstractContextManager[Forward]]
"""A context in which the model applies each client's tensors to its rows."""
