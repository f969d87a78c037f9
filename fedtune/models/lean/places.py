"""The positions of a padded batch that the layers compute."""

import torch
from torch import Tensor

LEAST = 0.05  # share of the positions to leave out, at least: moving tensors between the two forms costs as much as a smaller share saves


class Places:
    """The positions of a batch (B, T) that layers compute outside of attention: all tokens, and little padding.

    No token's result depends on padding, whose gradient is zero. So one position of padding stands for all that are left out.

    Args:
        size: (B, T).
        real: (B, T) bool, whether a position has a token; None: compute all positions.
        clients: Number of clients C, with B / C rows each. Stacked factors need equally many positions of each client, N / C.

    Attributes:
        size: (B, T).
    """

    def __init__(self, size: torch.Size, real: Tensor | None, clients: int = 1) -> None:
        self.size = size
        self._chosen: Tensor | None = None  # (N,) indices into B·T
        self._back: Tensor | None = None  # (B·T,) indices into N
        if real is None:
            return
        flat = real.reshape(clients, -1)
        each = -(-rounded(clients * (int(flat.sum(1).max()) + 1)) // clients)
        if each > (1 - LEAST) * flat.shape[1]:
            return
        order = flat.int().argsort(dim=1, descending=True, stable=True)[:, :each]  # tokens first
        first = torch.arange(0, flat.numel(), flat.shape[1], device=real.device)
        self._chosen = (order + first[:, None]).flatten()
        numbers = torch.arange(len(self._chosen), device=real.device)
        # the first client's last position is padding
        self._back = numbers.new_full((flat.numel(),), each - 1).index_copy_(0, self._chosen, numbers)

    @property
    def packs(self) -> bool:
        """Whether padding is left out."""
        return self._chosen is not None

    def pack(self, x: Tensor) -> Tensor:
        """x (B·T, …) as (N, …)."""
        return x if self._chosen is None else x.index_select(0, self._chosen)

    def unpack(self, x: Tensor) -> Tensor:
        """x (N, …) as (B·T, …)."""
        return x if self._back is None else x.index_select(0, self._back)


def rounded(n: int) -> int:
    """n rounded up to a multiple of 16, or by at most 1 / 32.

    oneDNN compiles a product for each number of rows, which takes as long as multiplying by a small matrix. So there must be few numbers.
    """
    unit = 1 << max(4, n.bit_length() - 6)
    return -(-n // unit) * unit
