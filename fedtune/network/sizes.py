"""How large a reply is, before anybody fetches it.

Flower stores a reply as a tree of objects, each of them once. A parent names its children in its body, as often as it likes: one chunk of
5 MB, named a thousand times, is an array of 5 GB for whoever puts it together. So each child counts as often as it is named.
"""

from collections import Counter
from typing import Any

from sqlalchemy import func, literal, select

from fedtune.network import _flwr
from fedtune.storage.parsing import parse_json

_LARGEST = 10**18  # bytes: a tree of names can claim more than a float holds


def opened_size(session: Any, root: str, most: int) -> int:
    """Bytes of a stored object with everything below it, put together; where that is more than `most`, some number above it.

    An object that cannot be read counts what it takes in the store: whoever fetches it finds out.
    """
    tree = select(literal(root).label("id")).cte("tree", recursive=True)
    tree = tree.union(select(_flwr.ObjectChild.child_id).where(_flwr.ObjectChild.parent_id == tree.c.id))
    stored = select(_flwr.StoredObject.object_id, func.length(_flwr.StoredObject.content)).where(
        _flwr.StoredObject.object_id.in_(select(tree))
    )
    sizes = {str(name): int(size or 0) for name, size in session.execute(stored)}
    if (plain := sum(sizes.values())) > most:
        return plain
    parents = select(_flwr.ObjectChild.parent_id).where(_flwr.ObjectChild.parent_id.in_(select(tree))).distinct()
    contents = select(_flwr.StoredObject.object_id, _flwr.StoredObject.content).where(_flwr.StoredObject.object_id.in_(parents))
    named = {str(name): _named(content) for name, content in session.execute(contents)}
    opened: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in opened:
            opened[name] = sizes.get(name, 0)  # of a tree that bites its tail, too
            opened[name] += sum(times * size(child) for child, times in named.get(name, {}).items())
            opened[name] = min(opened[name], _LARGEST)
        return opened[name]

    return size(root)


def _named(content: bytes) -> Counter[str]:
    """How often an object's content names each of its children."""
    try:
        kind, children, length = _flwr.get_object_head_values_from_object_content(content)
        if kind == "Array":
            return Counter(children[i] for i in parse_json(content[len(content) - length :])["arraychunk_ids"])
        if kind in ("ArrayRecord", "RecordDict"):
            return Counter(parse_json(content[len(content) - length :]).values())
        return Counter(children)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return Counter()
