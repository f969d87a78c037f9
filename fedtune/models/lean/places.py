"""The positions of a padded batch that the layers compute."""

import torch
from torch import Tensor

LEAST = 0.05  # share of the positions to leave out, at least: moving tensors between the two forms costs as much as a smaller share saves
OF_CLIENTS = 0.4  # the same for several clients, where groups have their own copies of the factors


class Places:
    """The positions of a batch (B, T) that layers compute outside of attention: all tokens, and little padding.

    No token's result depends on padding, whose gradient is zero. So one position of padding stands for all that are left out. A batch whose
    loss reads padding, such as [CLS] with padding on the left, must not be packed: `collate` pads on the right.

    The positions of several clients, with B / C rows each, lie in G groups of equal size. Each group has one client, as stacked factors
    need, and its free positions have padding.

    Args:
        size: (B, T).
        real: (B, T) bool, whether a position has a token; None: compute all positions.
        clients: C.
        group: Positions of a group, at least; a power of two; one client has one group.

    Attributes:
        size: (B, T).
    """

    def __init__(self, size: torch.Size, real: Tensor | None, clients: int = 1, group: int = 1) -> None:
        self.size = size
        self._chosen: Tensor | None = None  # (N,) indices into B·T
        self._back: Tensor | None = None  # (B·T,) indices into N
        self._owners: Tensor | None = None  # (G,) clients
        if real is None:
            return
        counts = real.reshape(clients, -1).sum(1).tolist()
        # larger groups for more tokens: fewer small products; the last client of a stack is one group
        group = 1 if clients == 1 else max(group, 1 << max(0, (sum(counts) // (8 * clients)).bit_length() - 1))
        groups = [-(-(n + (i == 0)) // group) for i, n in enumerate(counts)]  # with one position of padding
        positions = rounded(sum(groups) * group, group)
        if positions > (1 - (LEAST if clients == 1 else OF_CLIENTS)) * real.numel():
            return
        groups[-1] += positions // group - sum(groups)
        device, flat = real.device, real.flatten()
        tokens, clients_of = flat.nonzero()[:, 0], torch.repeat_interleave(torch.tensor(counts))
        starts = torch.tensor([sum(groups[:i]) * group - sum(counts[:i]) for i in range(clients)])
        slots = (torch.arange(len(tokens)) + starts[clients_of]).to(device)
        self._chosen = torch.full((positions,), int(flat.int().argmin()), device=device).index_copy_(0, slots, tokens)
        self._back = torch.full((len(flat),), counts[0], device=device).index_copy_(0, tokens, slots)
        self._owners = None if clients == 1 else torch.repeat_interleave(torch.tensor(groups)).to(device)

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

    def by_group(self, factors: Tensor) -> Tensor:
        """The clients' factors (C, …) as (G, …)."""
        return factors if self._owners is None else factors.index_select(0, self._owners)


def rounded(n: int, least: int = 1) -> int:
    """n rounded up to a multiple of 16 and `least`, or by at most 1 / 32.

    oneDNN compiles a product for each number of rows, which takes as long as multiplying by a small matrix. So there must be few numbers.
    """
    unit = max(16, least, 1 << max(0, n.bit_length() - 6))
    return -(-n // unit) * unit
