"""Computes the inflated size of a stored reply without fetching it.

Flower stores a reply as a tree of objects, each of them once. A parent may reference a child many times: one chunk of 5 MB with a thousand
references inflates to an array of 5 GB. So each child counts once per reference.
"""

from collections import Counter
from typing import Any

from sqlalchemy import func, literal, select

from fedtune.network import _flwr
from fedtune.storage.parsing import parse_json

_LARGEST = 10**18  # bytes: a tree of references can claim more than a float holds


def inflated_size(session: Any, root: str, most: int) -> int:
    """Bytes of a stored object and its descendants after inflation; above `most`, the number is only a lower bound that exceeds `most`.

    An object that cannot be parsed counts its stored size; fetching it raises the error.
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
    references = {str(name): _references(content) for name, content in session.execute(contents)}
    inflated: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in inflated:
            inflated[name] = sizes.get(name, 0)  # set before the recursion, which a cycle would not end otherwise
            inflated[name] += sum(times * size(child) for child, times in references.get(name, {}).items())
            inflated[name] = min(inflated[name], _LARGEST)
        return inflated[name]

    return size(root)


def _references(content: bytes) -> Counter[str]:
    """Number of references to each child in an object's content."""
    try:
        kind, children, length = _flwr.get_object_head_values_from_object_content(content)
        if kind == "Array":
            return Counter(children[i] for i in parse_json(content[len(content) - length :])["arraychunk_ids"])
        if kind in ("ArrayRecord", "RecordDict"):
            return Counter(parse_json(content[len(content) - length :]).values())
        return Counter(children)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return Counter()
