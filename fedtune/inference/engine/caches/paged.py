"""Keys and values of many sequences in blocks of one pool.

A sequence holds a table of blocks instead of one buffer: memory is not reserved in advance, sequences with a common prefix share blocks,
and a shared block is copied on write.

Source: Kwon et al. 2023, PagedAttention, arXiv:2309.06180, section 4.
"""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.aligned import zeros
from fedtune.inference.engine.bfloat16 import DTYPES, to_dtype
from fedtune.inference.engine.caches.base import Cache, CacheError, Span, addresses
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape


class OutOfBlocks(CacheError):
    """The pool has no room now: a sequence must end or release its blocks first."""


class PagedPool:
    """A fixed number of blocks with reference counts.

    Args:
        blocks: Number of blocks.
        block: Tokens per block.
        dtype: float32 or bfloat16.

    Attributes:
        reclaim: Called with the number of missing blocks; releases as many as it can (the prefix tree).
    """

    def __init__(self, shape: Shape, blocks: int, block: int = 16, dtype: str = "float32") -> None:
        if blocks < 1 or block < 1:
            raise CacheError(f"a pool of {blocks} blocks of {block} tokens is empty: both must be at least 1")
        self.shape, self.blocks, self.block, self.dtype = shape, blocks, block, dtype
        entries = DTYPES[dtype]
        size = shape.layers, blocks + 1, block, shape.kv_heads, shape.head_dim  # block 0 stays zero: it pads tables
        self.keys, self.values = zeros(size, entries), zeros(size, entries)  # memory is allocated on the first write
        self.reclaim: Callable[[int], None] = lambda wanted: None
        self._free = list(range(blocks, 0, -1))
        self._holders = [0] * (blocks + 1)
        self._addresses = [addresses(whole) for whole in (self.keys, self.values)]

    @staticmethod
    def bytes_for(shape: Shape, blocks: int, block: int = 16, dtype: str = "float32") -> int:
        """Bytes of a pool after every block has been used."""
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPES[dtype].itemsize * (blocks + 1) * block

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def cache(self, limit: int | None = None) -> "PagedCache":
        """Create an empty cache; the default limit is the whole pool."""
        return PagedCache(self, self.blocks * self.block if limit is None else limit)

    def take(self, count: int) -> list[int]:
        """Allocate zeroed blocks for one holder.

        Raises:
            OutOfBlocks: Too few blocks are available; none is allocated.
        """
        if count > self.free:
            self.reclaim(count - self.free)
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks are needed and {self.free} of the pool's {self.blocks} are free: wait, or end a sequence")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        for whole in (self.keys, self.values):  # a previous sequence may have left NaN, which a mask does not stop
            whole[:, taken] = 0
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each block; a block without holders becomes free."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def admit(self, spans: Sequence[Span]) -> None:
        """Allocate the blocks that the rows of a pass need.

        Raises:
            CacheError: A limit is exceeded; no table has changed.
            OutOfBlocks: The spans do not fit; no table has changed.
        """
        caches = [_paged(span) for span in spans]
        for cache, span in zip(caches, spans, strict=True):
            cache.require_capacity(span.n)
        wanted = sum(cache.needs(span.n) for cache, span in zip(caches, spans, strict=True))
        if wanted > self.free:
            self.reclaim(wanted - self.free)
        if wanted > self.free:
            raise OutOfBlocks(f"a pass needs {wanted} blocks and {self.free} of the pool's {self.blocks} are free: run fewer sequences")
        for cache, span in zip(caches, spans, strict=True):
            cache.reserve(span.n)

    def native_span(self, table: Sequence[int], rows: int, length: int) -> SpanStructure:
        """Describe a sequence of this pool to native code."""
        keys, values = map(ctypes.addressof, self._addresses)
        _, slots, block, heads, width = self.keys.shape
        blocks = (ctypes.c_int32 * len(table))(*table)
        out = SpanStructure(
            rows=rows, length=length, keys=keys, values=values, entries=slots * block * heads * width, token_stride=heads * width,
            head_stride=width, halves=self.keys.dtype == np.uint16, blocks=ctypes.addressof(blocks), block_count=len(table), block=block,
        )  # fmt: skip
        out.table = blocks  # keeps the memory
        return out


class PagedCache(Cache):
    """The block table of one sequence. Call `free` when the sequence ends.

    Attributes:
        table: Its blocks in order; block i holds tokens i * block .. i * block + block - 1.
    """

    def __init__(self, pool: PagedPool, limit: int) -> None:
        super().__init__(pool.shape, limit, pool.dtype)
        self.pool = pool
        self.table: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks, including shared ones."""
        return len(self.table) * self.pool.nbytes // (self.pool.blocks + 1)

    def prepare(self, n: int) -> None:
        self.reserve(n)

    @staticmethod
    def prepare_all(spans: Sequence[Span]) -> None:
        """See `Cache.prepare_all`.

        Raises:
            CacheError: A limit is exceeded; no table has changed.
            OutOfBlocks: A pool cannot hold all rows; no table has changed, if there is one pool.
        """
        pools = list(dict.fromkeys(_paged(span).pool for span in spans))
        for pool in pools:
            pool.admit([span for span in spans if _paged(span).pool is pool])

    def native_span(self, n: int) -> SpanStructure:
        return self.pool.native_span(self.table, n, self.length)

    def write(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32], rope: Rope) -> None:
        at, block = np.arange(self.length, self.length + len(k)), self.pool.block
        slots = np.array(self.table)[at // block], at % block
        self.pool.keys[layer][slots] = to_dtype(rope.rotate(k, self.length), self.dtype)
        self.pool.values[layer][slots] = to_dtype(v, self.dtype)

    def needs(self, n: int) -> int:
        """Number of blocks needed from the pool for n more tokens."""
        have = len(self.table)
        return max(0, -(-(self.length + n) // self.pool.block) - have) + int(n > 0 and self._shares_last())

    def reserve(self, n: int) -> None:
        """Allocate blocks for n more tokens; a shared last block is copied.

        Raises:
            CacheError: The limit is exceeded.
            OutOfBlocks: The pool has no room; the table has not changed.
        """
        self.require_capacity(n)
        wanted = self.needs(n)
        if not wanted:
            return
        pool, copies = self.pool, n > 0 and self._shares_last()
        new = pool.take(wanted)
        if copies:
            at = self.length // pool.block
            pool.keys[:, new[-1]] = pool.keys[:, self.table[at]]
            pool.values[:, new[-1]] = pool.values[:, self.table[at]]
            pool.release([self.table[at]])
            self.table[at] = new.pop()
        self.table += new

    def crop(self, length: int) -> None:
        super().crop(length)
        kept = -(-length // self.pool.block)
        self.pool.release(self.table[kept:])
        del self.table[kept:]

    def hold(self, blocks: Sequence[int], length: int) -> None:
        """Start an empty sequence with blocks of other holders."""
        assert not self.table and not self.length
        self.pool.share(blocks)
        self.table, self.length = list(blocks), length

    def free(self) -> None:
        """Release all blocks; the sequence becomes empty."""
        self.pool.release(self.table)
        self.table, self.length = [], 0

    def _shares_last(self) -> bool:
        """Whether the next token goes into a shared block."""
        at = self.length // self.pool.block
        return at < len(self.table) and self.pool.holders(self.table[at]) > 1


def _paged(span: Span) -> PagedCache:
    assert isinstance(span.cache, PagedCache)
    return span.cache
