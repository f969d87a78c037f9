"""What was computed for a beginning of a text serves the next text that begins alike.

`PrefixTree` keeps blocks of a paged pool, which any number of sequences share at once. It compares token ids, never hashes of them, and
keeps adapters apart: the same ids give other keys and values under another adapter.

Source: the tree is Zheng et al. 2024, SGLang's RadixAttention, arXiv:2312.07104, section 3, over blocks.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.inference.engine.caches.base import Cache, CacheError
from fedtune.inference.engine.caches.paged import OutOfBlocks, PagedCache, PagedPool


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning; slices are compared, as most of two turns' tokens are alike."""
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
    """A full block's tokens behind those of its parents."""

    ids: tuple[int, ...]
    block: int
    parent: "_Node | None"
    children: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)


class PrefixTree:
    """Full blocks of ended sequences, held until the pool wants them back; the one not used for longest goes first."""

    def __init__(self, pool: PagedPool) -> None:
        self.pool = pool
        self._roots: dict[str | None, _Node] = {}
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # by last use; a parent comes after its children
        pool.reclaim, pool.spare = self.evict, self.evictable

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, ids: Sequence[int], adapter: str | None = None) -> tuple[list[int], int]:
        """Blocks that hold the beginning of `ids`, and how many tokens of it; of the last block perhaps only some."""
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
        """Hold the full blocks of a sequence's table; those whose tokens are there already are not held twice."""
        size = self.pool.block
        node = self._roots.setdefault(adapter, _Node((), 0, None))
        for i in range(len(ids) // size):
            part = tuple(ids[i * size : (i + 1) * size])
            if part not in node.children:
                self.pool.share([table[i]])
                node.children[part] = _Node(part, table[i], node)
            node = node.children[part]
        self._touch(node)

    def evictable(self) -> int:
        """Blocks that nobody but the tree holds."""
        return sum(self.pool.holders(node.block) == 1 for node in self._nodes)

    def evict(self, wanted: int) -> None:
        """Give back so many blocks, or all that no sequence holds."""
        for node in list(self._nodes):
            if wanted < 1:
                return
            if not node.children and self.pool.holders(node.block) == 1:
                self._remove(node)
                wanted -= 1

    def clear(self) -> None:
        """Give all blocks back."""
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
    """Where a scheduler gets its sequences' caches: one pool, with beginnings shared between requests.

    Args:
        pool: Of the blocks.
        limit: Most tokens of one sequence; None takes the whole pool.
        virtual: Tokens that are put into every fresh cache before its text (a tuned prompt); such caches share nothing.

    Raises:
        CacheError: The pool cannot hold one sequence of `limit` tokens.
    """

    def __init__(self, pool: PagedPool, limit: int | None = None, *, virtual: int = 0) -> None:
        most = pool.blocks * pool.block
        if limit is not None and limit > most:
            raise CacheError(f"sequences of {limit} tokens do not fit in {pool.blocks} blocks of {pool.block}: ask for at most {most}")
        self.pool, self.limit, self.tree = pool, most if limit is None else limit, PrefixTree(pool)
        self._virtual = virtual

    def open(self, ids: Sequence[int], adapter: str | None = None) -> Cache | None:
        """A cache with room for ids, which may hold a beginning of them already, never all; None: no room now."""
        cache = self.pool.cache(self.limit)
        if not self._virtual:
            cache.hold(*self.tree.match(ids[:-1], adapter))
        if self.reserve(cache, self._virtual + len(ids) - cache.length):
            return cache
        cache.free()
        return None

    def reserve(self, cache: Cache, n: int) -> bool:
        """Room for n more tokens; False: there is none now."""
        assert isinstance(cache, PagedCache)
        try:
            cache.reserve(n)
        except OutOfBlocks:
            return False
        return True

    def close(self, cache: Cache, ids: Sequence[int], adapter: str | None = None) -> None:
        """The sequence has ended; ids are the tokens that its cache holds, for others to begin with."""
        assert isinstance(cache, PagedCache)
        if cache.length == len(ids):  # else virtual tokens lie before them
            self.tree.insert(ids, cache.table, adapter)
        cache.free()
