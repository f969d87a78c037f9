"""Partition rows over clients: IID, Dirichlet, pathological, size-skewed, natural ids, and FedPETuning's per-client prior.

Every partition is disjoint and complete: each row belongs to exactly one client. Except for natural ids, the order of the rows in the
source has no effect: the rows, or the rows of each class, are permuted first.
Sources: Dirichlet over clients per class, Yurochkin et al. 2019, arXiv:1905.12022 (Hsu et al. 2019, arXiv:1909.06335, draw each client's
class mix instead); pathological, McMahan et al. 2017, arXiv:1602.05629, with shards of sorted rows; per-client prior, Zhang et al. 2023,
FedPETuning, arXiv:2212.10025.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedtune.config import PartitionConfig
from fedtune.contracts.seeds import derive_seed
from fedtune.data.columns import no_clients, no_labels
from fedtune.errors import DataError
from fedtune.storage.ids import flaw, shown

log = logging.getLogger("fedtune.data")


def partition(
    config: PartitionConfig, rows: int, seed: int, labels: Sequence[int] | np.ndarray | None = None, clients: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Logical id → indices of the client's rows (int64, ascending), sorted by id; no client is empty.

    Args:
        config: Kind of partition and its parameters.
        rows: Number of rows.
        seed: Seed of the run.
        labels: Class id of each row; needed by dirichlet, pathological and prior.
        clients: Client of each row; needed by natural.

    Raises:
        DataError: The rows lack a column for this partition, or are too few.
    """
    if config.kind == "natural":
        return _natural(clients)
    if config.kind in ("dirichlet", "pathological", "prior") and labels is None:
        raise no_labels(config.kind)
    if config.clients > rows:
        raise DataError(f"partition.clients={config.clients} is more than the {rows} training rows: take fewer clients or more rows")
    key = np.zeros(rows, np.int64) if labels is None else np.asarray(labels, np.int64)
    rng = np.random.default_rng(derive_seed(seed, "partition", config.kind))
    if config.kind == "prior":
        parts = by_prior(key, config.clients, config.alpha, rng)
    elif config.kind == "dirichlet":
        parts = by_class(key, config.clients, config.alpha, rng)
    elif config.kind == "pathological":
        parts = by_assigned_classes(key, config.clients, config.classes_per_client, rng)
    elif config.kind == "size":
        parts = by_size(rows, config.clients, config.alpha, rng)
    else:
        parts = np.array_split(rng.permutation(rows), config.clients)
    width = max(3, len(str(config.clients - 1)))
    named = {f"client-{i:0{width}d}": np.sort(part) for i, part in enumerate(parts)}
    if empty := [name for name, part in named.items() if not len(part)]:
        some = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
        log.warning("%d of %d clients have no rows and are left out: %s", len(empty), len(named), some)
    return {name: part for name, part in named.items() if len(part)}


def rows_of_large_clients(config: PartitionConfig, clients: Sequence[str] | None) -> np.ndarray:
    """Indices of the rows whose client has at least `partition.min_examples` rows; logs how many are left out.

    Raises:
        DataError: No client has that many rows, or the rows have no clients.
    """
    sizes = Counter(_named(clients))
    kept = {name for name, size in sizes.items() if size >= config.min_examples}
    if not kept:
        raise DataError(
            f"partition.min_examples={config.min_examples} leaves no client, since the largest has {max(sizes.values())} rows: lower it"
        )
    rows = np.array([i for i, name in enumerate(_named(clients)) if name in kept], np.int64)
    if few := len(sizes) - len(kept):
        lost = sum(sizes.values()) - len(rows)
        log.warning("%d of %d clients have fewer than %d rows and are left out (%d rows)", few, len(sizes), config.min_examples, lost)
    return rows


def _named(clients: Sequence[str] | None) -> Sequence[str]:
    if clients is None:
        raise no_clients()
    if bad := {name: wrong for name in dict.fromkeys(clients) if (wrong := flaw(name))}:
        name = next(iter(bad))
        row = f"training row {list(clients).index(name) + 1}"
        if not name.strip():
            raise DataError(f"{row} has an empty client: give every row a client, or take partition.kind=iid")
        raise DataError(f"the client id '{shown(name)}' of {row} {bad[name]}: give it another, or take partition.kind=iid")
    return clients


def _natural(clients: Sequence[str] | None) -> dict[str, np.ndarray]:
    parts: dict[str, list[int]] = {}
    for row, name in enumerate(_named(clients)):
        parts.setdefault(name, []).append(row)
    return {name: np.array(parts[name], np.int64) for name in sorted(parts)}


def apportion(total: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Split `total` in proportion to `shares` by largest remainder; equal remainders are ordered by `rng`, not by position.

    Args:
        total: Number of items.
        shares: (n,) weights, at least one above 0.
        rng: The generator that orders equal remainders.

    Returns:
        (n,) int64 counts that sum to `total`; each differs from its exact share by less than 1.
    """
    wanted = shares / shares.sum() * total
    counts = np.floor(wanted).astype(np.int64)
    order = rng.permutation(len(shares))
    largest = order[np.argsort((counts - wanted)[order], kind="stable")]
    counts[largest[: total - counts.sum()]] += 1
    return counts


def by_size(rows: int, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Random rows; the number of rows of client i of 1..n is proportional to i^alpha.

    Raises:
        DataError: The smallest client would get less than one row.
    """
    with np.errstate(over="ignore"):  # an infinite share leaves the smallest client without rows
        shares = np.arange(1, clients + 1) ** float(alpha)
    if rows / shares.sum() < 1:
        raise DataError(f"partition.alpha={alpha:g} leaves the smallest of {clients} clients none of {rows} rows: lower it")
    return _cut(rng.permutation(rows), apportion(rows, shares, rng))


def by_class(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Each class is permuted and split over the clients by its own p_c ~ Dir(alpha, ..., alpha), by largest remainder.

    There is no minimum size: redrawing until every client has one would distort the distribution.

    Args:
        labels: (rows,) class ids.
        clients: Number of clients; some may get no rows.
        alpha: Concentration; infinity gives every client the same share of every class.
        rng: The generator of all draws.
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        pile = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha)) if np.isfinite(alpha) else np.ones(clients)
        for part, dealt in zip(parts, _cut(pile, apportion(len(pile), shares, rng)), strict=True):
            part.append(dealt)
    return [np.concatenate(part) for part in parts]


def by_assigned_classes(labels: np.ndarray, clients: int, per: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Each client has `per` classes; a class is permuted and split evenly over its clients.

    Classes are dealt from shuffled decks, so that every class has a client and the numbers of clients are as equal as possible.

    Args:
        labels: (rows,) class ids.
        clients: Number of clients.
        per: Classes a client.
        rng: The generator of all draws.

    Raises:
        DataError: There are fewer classes than `per`, more than the clients can have, or a class has fewer rows than clients.
    """
    classes = np.unique(labels).tolist()
    if per > len(classes):
        raise DataError(f"partition.classes_per_client={per} is more than the {len(classes)} classes of the training rows: lower it")
    if clients * per < len(classes):
        raise DataError(
            f"partition.kind=pathological: {clients} clients of {per} classes have {clients * per} of {len(classes)} classes:"
            " raise partition.clients or partition.classes_per_client"
        )
    deck: list[int] = []
    hands: list[list[int]] = []
    for _ in range(clients):
        hand: list[int] = []
        while len(hand) < per:
            fresh = [i for i, label in enumerate(deck) if label not in hand]
            if fresh:
                hand.append(deck.pop(fresh[0]))
            else:
                deck += rng.permutation(classes).tolist()
        hands.append(hand)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in classes:
        pile = rng.permutation(np.flatnonzero(labels == label))
        holders = np.array([client for client, hand in enumerate(hands) if label in hand])
        if len(pile) < len(holders):
            raise DataError(
                f"partition.kind=pathological gives class {label} to {len(holders)} clients, but it has {len(pile)} rows:"
                " take fewer clients or another partition.kind"
            )
        for client, dealt in zip(holders, _cut(pile, apportion(len(pile), np.ones(len(holders)), rng)), strict=True):
            parts[client].append(dealt)
    return [np.concatenate(part) for part in parts]


def _cut(rows: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(counts)[:-1])


def by_prior(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Equal sizes; client k draws its classes from q_k ~ Dir(alpha · class prior), without replacement.

    Clients draw row by row, in random order. A class without remaining rows is dropped from every q_k, which is renormalized; a client
    without remaining classes draws from all remaining rows.

    Args:
        labels: (rows,) class ids.
        clients: Number of clients; sizes differ by at most one row.
        alpha: Concentration; infinity gives every client the prior.
        rng: The generator of all draws.
    """
    classes, key = np.unique(labels, return_inverse=True)
    piles = [rng.permutation(np.flatnonzero(key == c)).tolist() for c in range(len(classes))]
    left = np.array([len(pile) for pile in piles], np.float64)
    prior = left / left.sum()
    mixes = rng.dirichlet(alpha * prior, size=clients) if np.isfinite(alpha) else np.tile(prior, (clients, 1))
    turns = rng.permutation(np.arange(len(labels)) % clients)
    draws = rng.random(len(labels))
    parts: list[list[int]] = [[] for _ in range(clients)]
    for client, draw in zip(turns.tolist(), draws.tolist(), strict=True):
        weights = mixes[client] * (left > 0)
        if not weights.sum() > 0:
            weights = left
        edges = np.cumsum(weights)
        drawn = int(np.searchsorted(edges, draw * edges[-1], side="right"))
        drawn = min(drawn, int(np.flatnonzero(weights)[-1]))  # rounding may select past the last class
        parts[client].append(piles[drawn].pop())
        left[drawn] -= 1
    return [np.array(part, np.int64) for part in parts]
