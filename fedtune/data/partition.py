"""Which rows each client holds: IID, Dirichlet, pathological, size-skewed, natural ids (flwr-datasets), and FedPETuning's per-client prior.

Every partition is disjoint and complete: each row belongs to exactly one client.
Sources: Dirichlet over clients per class, Hsu et al. 2019, arXiv:1909.06335, as flwr-datasets does it; pathological, McMahan et al. 2017,
arXiv:1602.05629; per-client prior, Zhang et al. 2023, FedPETuning, arXiv:2212.10025.
"""

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IdToSizeFncPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)

from fedtune.config import PartitionConfig
from fedtune.errors import DataError
from fedtune.seeds import derive_seed

log = logging.getLogger("fedtune.data")


def partition(
    config: PartitionConfig, rows: int, seed: int, labels: Sequence[int] | np.ndarray | None = None, clients: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Logical id → indices of the client's rows (int64, ascending), sorted by id; no client is empty.

    Args:
        config: Kind of partition and its parameters.
        rows: Number of rows to deal.
        seed: Seed of the run.
        labels: Class id of each row; needed by dirichlet, pathological and prior.
        clients: Client of each row; needed by natural.

    Raises:
        DataError: The rows lack what this partition needs, or are too few for it.
    """
    if config.kind == "natural":
        return _natural(clients)
    if config.kind in ("dirichlet", "pathological", "prior") and labels is None:
        raise DataError(f"partition.kind={config.kind} deals rows by label, and these have none: set data.columns.label or take iid")
    if config.clients > rows:
        raise DataError(f"partition.clients={config.clients} is more than the {rows} training rows: take fewer clients or more rows")
    key = np.zeros(rows, np.int64) if labels is None else np.asarray(labels, np.int64)
    generator_seed = derive_seed(seed, "partition", config.kind)
    if config.kind == "prior":
        parts = by_prior(key, config.clients, config.alpha, np.random.default_rng(generator_seed))
    elif config.kind == "dirichlet":
        # no minimum size: a minimum makes flwr-datasets redraw until it is met, which bends the distribution and gives up after ten tries.
        # Not self-balancing: with small alpha its renormalisation divides by zero.
        free = {"min_partition_size": 0, "self_balancing": False, "shuffle": False}
        dealer = DirichletPartitioner(config.clients, "key", config.alpha, **free, seed=generator_seed)
        parts = _dealt(dealer, key, config.clients)
    elif config.kind == "pathological":
        parts = _dealt(_pathological(config, key, generator_seed), key, config.clients)
    else:
        parts = _shuffled(config, rows, generator_seed)
    width = max(3, len(str(config.clients - 1)))
    named = {f"client-{i:0{width}d}": np.sort(part) for i, part in enumerate(parts)}
    if empty := [name for name, part in named.items() if not len(part)]:
        some = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
        log.warning("%d of %d clients got no rows and are left out: %s", len(empty), len(named), some)
    return {name: part for name, part in named.items() if len(part)}


def _dealt(dealer: Partitioner, key: Sequence[str] | np.ndarray, clients: int) -> list[np.ndarray]:
    """The parts as row indices: the partitioner only sees the row numbers and what it partitions by."""
    dealer.dataset = datasets.Dataset.from_dict({"row": np.arange(len(key)), "key": key})
    try:
        return [np.asarray(dealer.load_partition(i)["row"][:], np.int64) for i in range(clients)]
    except ValueError as bad:
        reason = str(bad).splitlines()[0].split(". ")[0]  # its first sentence; the rest speaks of the library's own options
        raise DataError(f"this partition is not possible with these rows: {reason}; take fewer clients or another partition.kind") from None


def rows_of_large_clients(config: PartitionConfig, clients: Sequence[str] | None) -> np.ndarray:
    """Indices of the rows whose client has at least `partition.min_examples` of them, with a note on what that leaves out.

    Raises:
        DataError: No client has that many, or the rows name no clients.
    """
    sizes = Counter(_named(clients))
    kept = {name for name, size in sizes.items() if size >= config.min_examples}
    if not kept:
        raise DataError(f"partition.min_examples={config.min_examples} leaves no client: the largest has {max(sizes.values())} rows")
    rows = np.array([i for i, name in enumerate(_named(clients)) if name in kept], np.int64)
    if few := len(sizes) - len(kept):
        lost = sum(sizes.values()) - len(rows)
        log.warning("%d of %d clients have fewer than %d rows: left out, %d rows in all", few, len(sizes), config.min_examples, lost)
    return rows


def _named(clients: Sequence[str] | None) -> Sequence[str]:
    if clients is None:
        raise DataError(
            "partition.kind=natural takes the clients from the data, and these rows name none:"
            " set data.columns.client or data.client_from_file=true, or take partition.kind=iid"
        )
    for number, name in enumerate(clients, 1):
        if not name.strip():
            raise DataError(f"training row {number} has an empty client: give every row a client, or take partition.kind=iid")
    return clients


def _natural(clients: Sequence[str] | None) -> dict[str, np.ndarray]:
    named, dealer = _named(clients), NaturalIdPartitioner("key")
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a progress bar
        parts = _dealt(dealer, named, len(set(named)))
    return {name: np.sort(parts[i]) for i, name in sorted(dealer.partition_id_to_natural_id.items(), key=lambda item: item[1])}


def _shuffled(config: PartitionConfig, rows: int, seed: int) -> list[np.ndarray]:
    """iid and size: flwr-datasets deals consecutive rows here, so they are shuffled first."""
    order = np.random.default_rng(seed).permutation(rows)
    if config.kind == "iid":
        dealer: Partitioner = IidPartitioner(config.clients)
    else:  # client i of 1..n holds rows in proportion to i^alpha: 1 is linear, 2 is square
        dealer = IdToSizeFncPartitioner(config.clients, lambda ids: ids**config.alpha)
        smallest = int(rows / (np.arange(1, config.clients + 1) ** config.alpha).sum())
        if smallest < 1:
            raise DataError(
                f"partition.alpha={config.alpha:g} leaves the smallest of {config.clients} clients none of {rows} rows: take a smaller one"
            )
    return [order[part] for part in _dealt(dealer, np.zeros(rows, np.int64), config.clients)]


class _Deck(PathologicalPartitioner):
    """Classes are dealt from shuffled decks, so that every class is held by someone, and as evenly as can be.

    The library's own ways either leave out classes when there are fewer clients than classes, or draw with replacement over the clients and
    leave out some by chance: their rows would be lost.
    """

    def _determine_partition_id_to_unique_labels(self) -> None:
        self._unique_labels = sorted(self.dataset.unique(self._partition_by))
        deck: list[int] = []
        for client in range(self._num_partitions):
            hand: list[int] = []
            while len(hand) < self._num_classes_per_partition:
                fresh = [i for i, label in enumerate(deck) if label not in hand]
                if fresh:
                    hand.append(deck.pop(fresh[0]))
                else:
                    deck += self._rng.permutation(self._unique_labels).tolist()
            self._partition_id_to_unique_labels[client] = hand


def _pathological(config: PartitionConfig, key: np.ndarray, seed: int) -> PathologicalPartitioner:
    classes, per = len(np.unique(key)), config.classes_per_client
    if per > classes:
        raise DataError(f"partition.classes_per_client={per} is more than the {classes} classes of the training rows")
    if config.clients * per < classes:
        raise DataError(
            f"partition.kind=pathological: {config.clients} clients of {per} classes can hold {config.clients * per} of {classes}:"
            " raise partition.clients or partition.classes_per_client"
        )
    return _Deck(config.clients, "key", per, shuffle=False, seed=seed)


def by_prior(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Equal sizes; client k draws its classes from q_k ~ Dir(alpha · class prior), without replacement.

    Clients take turns in random order, row by row. A class with no rows left drops out of every q_k, which is renormalised; a client
    none of whose classes is left draws from what there is, in proportion.

    Args:
        labels: (rows,) class ids.
        clients: Number of clients; sizes differ by at most one row.
        alpha: Concentration; infinity gives every client the prior.
        rng: The generator that all draws come from.
    """
    classes, key = np.unique(labels, return_inverse=True)
    piles = [rng.permutation(np.flatnonzero(key == c)).tolist() for c in range(len(classes))]
    left = np.array([len(pile) for pile in piles], np.float64)
    mixes = rng.dirichlet(alpha * left / left.sum(), size=clients)
    turns = rng.permutation(np.arange(len(labels)) % clients)
    draws = rng.random(len(labels))
    parts: list[list[int]] = [[] for _ in range(clients)]
    for client, draw in zip(turns.tolist(), draws.tolist(), strict=True):
        weights = mixes[client] * (left > 0)
        if not weights.sum() > 0:
            weights = left
        edges = np.cumsum(weights)
        drawn = int(np.searchsorted(edges, draw * edges[-1], side="right"))
        drawn = min(drawn, int(np.flatnonzero(weights)[-1]))  # rounding may put the draw on the last edge
        parts[client].append(piles[drawn].pop())
        left[drawn] -= 1
    return [np.array(part, np.int64) for part in parts]
