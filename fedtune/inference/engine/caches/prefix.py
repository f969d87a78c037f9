"""Prefix sharing: texts with a common prefix share its keys and values.

`PrefixTree` keeps blocks of a paged pool, which any number of sequences can share. It compares token ids, never hashes, and separates
adapters: the same ids have other keys and values under another adapter.

Source: Zheng et al. 2024, SGLang's RadixAttention, arXiv:2312.07104, section 3; here over blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.inference.engine.caches.base import Cache, CacheError
from fedtune.inference.engine.caches.paged import OutOfBlocks, PagedCache, PagedPool


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix. Compares slices, because consecutive turns share most tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True, eq=False)
class _Node:
    """The tokens of a full block, which follow those of its parents."""

    ids: tuple[int, ...]
    block: int
    parent: "_Node | None"
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)


class PrefixTree:
    """Full blocks of ended sequences, kept until the pool needs them; the least recently used is evicted first."""

    def __init__(self, pool: PagedPool) -> None:
        self.pool = pool
        self._roots: dict[str | None, _Node] = {}
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # in order of last use; parents after their children
        pool.reclaim = self.evict

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, ids: Sequence[int], adapter: str | None = None) -> tuple[list[int], int]:
        """Return the blocks that hold a prefix of `ids`, and its length; the last block may match only partly."""
        size, node = self.pool.block, self._roots.get(adapter)
        blocks: list[int] = []
        last, held = node, 0
        while node is not None:
            rest = tuple(ids[held : held + size])
            node = node.children.get(rest)
            if node is not None:
                last, held = node, held + size
                blocks.append(node.block)
        if last is not None:
            rest = tuple(ids[held : held + size])
            near = max(last.children.values(), key=lambda child: common(child.ids, rest), default=None)
            if near is not None and (some := common(near.ids, rest)):
                last, held = near, held + some
                blocks.append(near.block)
            self._touch(last)
        return blocks, held

    def insert(self, ids: Sequence[int], table: Sequence[int], adapter: str | None = None) -> None:
        """Add the full blocks of a sequence's table, except those whose tokens are already in the tree."""
        size = self.pool.block
        node = self._roots.setdefault(adapter, _Node((), 0, None))
        for i in range(len(ids) // size):
            part = tuple(ids[i * size : (i + 1) * size])
            if part not in node.children:
                self.pool.share([table[i]])
                node.children[part] = _Node(part, table[i], node)
            node = node.children[part]
        self._touch(node)

    def evict(self, wanted: int) -> None:
        """Release `wanted` blocks, or all that no sequence holds."""
        for node in list(self._nodes):
            if wanted < 1:
                return
            if not node.children and self.pool.holders(node.block) == 1:
                self._remove(node)
                wanted -= 1

    def clear(self) -> None:
        """Release all blocks."""
        for node in list(self._nodes):
            self._remove(node)

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.ids], self._nodes[node]
        self.pool.release([node.block])

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._nodes[node] = None
            self._nodes.move_to_end(node)
            node = node.parent


class PagedCaches:
    """Provides a scheduler's caches from one pool, with prefixes shared between requests.

    Args:
        pool: The pool of blocks.
        limit: Maximum tokens of one sequence; None allows the whole pool.
        virtual: Number of virtual tokens before every text (a tuned prompt); such caches share no prefix.

    Raises:
        CacheError: The pool cannot hold one sequence of `limit` tokens.
    """

    def __init__(self, pool: PagedPool, limit: int | None = None, *, virtual: int = 0) -> None:
        most = pool.blocks * pool.block
        if limit is not None and limit > most:
            raise CacheError(f"sequences of {limit} tokens do not fit in {pool.blocks} blocks of {pool.block}: use at most {most}")
        self.pool, self.limit, self.tree = pool, most if limit is None else limit, PrefixTree(pool)
        self._virtual = virtual

    def open(self, ids: Sequence[int], adapter: str | None = None) -> Cache | None:
        """Open a cache with room for ids. It may already hold a prefix of them, but never all. None if there is no room now."""
        cache = self.pool.cache(self.limit)
        if not self._virtual:
            cache.hold(*self.tree.match(ids[:-1], adapter))
        if self.reserve(cache, self._virtual + len(ids) - cache.length):
            return cache
        cache.free()
        return None

    def reserve(self, cache: Cache, n: int) -> bool:
        """Reserve room for n more tokens. Returns False if there is none now."""
        assert isinstance(cache, PagedCache)
        try:
            cache.reserve(n)
        except OutOfBlocks:
            return False
        return True

    def close(self, cache: Cache, ids: Sequence[int], adapter: str | None = None) -> None:
        """Close the cache of an ended sequence; ids are its tokens, which other sequences may reuse as a prefix."""
        assert isinstance(cache, PagedCache)
        if cache.length == len(ids):  # else it has virtual tokens
            self.tree.insert(ids, cache.table, adapter)
        cache.free()
