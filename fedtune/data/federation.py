"""A federation: the rows, each client's part of them, and the global test.

Source → fedtune's columns → global test → partition → each client's train and held-out rows → device class. All draws depend on the run's
seed, and a client's own draws also on its logical id: its split does not change when clients join or leave.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.config import Config, DeviceClass
from fedtune.contracts.rows import RowSet
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.task import task_of
from fedtune.data.check import no_classes, unpartitioned
from fedtune.data.columns import Table, canonical, class_names, read_columns
from fedtune.data.local import has_files, read_test
from fedtune.data.partition import partition, rows_of_large_clients
from fedtune.data.sources import read_source
from fedtune.errors import DataError

log = logging.getLogger("fedtune.data")


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """The rows of one client.

    Args:
        train: (n,) int64 indices into `Federation.rows`.
        held_out: (m,) int64 indices of the rows for this client's evaluation, disjoint from `train`.
        device_class: Name in `devices.classes`; "" if there are none.
    """

    train: np.ndarray
    held_out: np.ndarray
    device_class: str


@dataclass(frozen=True, kw_only=True)
class Federation:
    """All rows and the clients' parts of them.

    Args:
        rows: Training rows in fedtune's columns.
        test: The global test in fedtune's columns; may be empty.
        clients: Logical id → its rows, sorted by id; every client has training rows.
        labels: Name of each class id of the column `label`, which is the task's target or only for histograms, or of the task's column of
            kind `classes`; () without labels.
    """

    rows: RowSet
    test: RowSet
    clients: Mapping[str, ClientRows]
    labels: tuple[str, ...]

    def row_labels(self) -> np.ndarray:
        """(rows,) int64 class id of every row, for histograms; empty if there are no labels."""
        return np.asarray(self.rows["label"][:] if "label" in self.rows.column_names else [], np.int64)

    def summary(self) -> dict[str, Any]:
        """Plain JSON: labels, test size, and for each client its device class, sizes and label histogram (train and held-out together)."""
        of_row, clients = self.row_labels(), []
        sets = next((column for column in self.rows.columns.values() if len(column) and isinstance(column[0], bytes)), None)
        for name, client in self.clients.items():
            held = np.concatenate([client.train, client.held_out])
            if sets is not None:  # a row counts once for each of its labels
                histogram = [sum(bits) for bits in zip(*(sets[i] for i in held), strict=True)]
            else:
                histogram = np.bincount(of_row[held], minlength=len(self.labels)).tolist() if self.labels else []
            sizes = {"train": len(client.train), "held_out": len(client.held_out)}
            clients.append({"id": name, "device_class": client.device_class, **sizes, "histogram": histogram})
        return {"labels": list(self.labels), "clients": clients, "test": len(self.test)}


def load_federation(config: Config) -> Federation:
    """Read, split and partition the config's data.

    Raises:
        ConfigError: Settings contradict each other.
        DataError: The data cannot be used.
    """
    config, table, tests = _read(config)
    data, seed = config.data, config.seed
    if config.partition.kind == "one":
        parts = {str(data.client): np.arange(len(table))}
    else:
        parts = partition(config.partition, len(table), seed, table.columns.get("label"), table.columns.get("client"))
    _check_classes(config, table.labels)
    devices = device_classes(config, parts, table)
    if data.client is not None:
        parts = _only(data.client, parts)
    clients = {name: _client(name, rows, devices[name], config) for name, rows in parts.items()}
    return Federation(rows=RowSet(table.columns), test=RowSet(tests.columns), clients=clients, labels=table.labels)


def _read(config: Config) -> tuple[Config, Table, Table]:
    """The config for the source, the training rows and the global test. Small natural clients are removed before the test is drawn."""
    config, source, test_source = read_source(config)
    data, seed = config.data, config.seed
    table = canonical(source, config, "training", class_names(data) or None)
    natural = config.partition.kind == "natural"
    if natural:
        table = _select(table, rows_of_large_clients(config.partition, table.columns.get("client")))
    if test_source is not None:
        tests, order = canonical(test_source, config, "test", table.labels), np.arange(len(table))
        test_rows = np.arange(len(tests))
    else:
        tests = table
        test_rows, order = split(len(table), data.test_fraction, derive_seed(seed, "test"))
        if data.test_fraction and not len(test_rows):
            raise DataError(f"{len(table)} training row is too few for data.test_fraction={data.test_fraction:g}: set it to 0")
    test_rows = sample(test_rows, data.test_limit, derive_seed(seed, "test_limit"))
    order = sample(order, data.limit, derive_seed(seed, "limit"))
    named = set(table.columns.get("client", ()))
    table, tests = _select(table, order), _select(tests, test_rows)
    if natural and (gone := len(named.difference(table.columns["client"]))):
        log.warning("%d clients are left out, because all their rows are in the global test or beyond data.limit", gone)
    return config, table, tests


def _check_classes(config: Config, labels: tuple[str, ...]) -> None:
    if task_of(config.task).classes and len(labels) < 2:
        raise DataError(f"every training row has the label '{''.join(labels)}', but {config.task.kind} needs at least two classes")


def load_test(config: Config) -> Federation:
    """A server's data: the global test and the class names, without clients.

    If the training rows are not on this machine, the test is `data.test_path` or empty, and the class names are `data.labels` or the
    test's.

    Raises:
        ConfigError: Settings contradict each other, or nothing names the classes.
        DataError: The data cannot be used.
    """
    data = config.data
    if data.source != "local" or has_files(data.path):
        tests = _read(unpartitioned(config))[2]
        _check_classes(config, tests.labels)
        return _coordinator(tests)
    if data.path:
        log.warning("data.path=%s is not on this machine: the server has no training rows, each client needs its own", data.path)
    labels = class_names(data)
    if data.test_path:
        tests = canonical(read_test(data, read_columns(config)), config, "test", labels or None)
        chosen = sample(np.arange(len(tests)), data.test_limit, derive_seed(config.seed, "test_limit"))
        tests = _select(tests, chosen)
    else:
        tests = Table(columns={ours: [] for ours in task_of(config.task).columns}, labels=labels)
    if task_of(config.task).classes and len(tests.labels) < 2:
        raise no_classes()
    return _coordinator(tests)


def _coordinator(tests: Table) -> Federation:
    none = _select(tests, np.arange(0))
    return Federation(rows=RowSet(none.columns), test=RowSet(tests.columns), clients={}, labels=tests.labels)


def split(rows: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(taken, kept) indices, ascending: takes a random `share` of the rows, at least one if share > 0, and always keeps one."""
    taken = 0 if share == 0 else max(1, int(rows * share + 0.5))
    taken = min(taken, rows - 1)
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[:taken]), np.sort(order[taken:])


def sample(rows: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """A random sample of at most `most` indices, in ascending order."""
    if most is None or len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).permutation(rows)[:most])


def _only(client: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if client not in parts:
        some = ", ".join(list(parts)[:5]) + (" …" if len(parts) > 5 else "")
        raise DataError(f"client '{client}' has no rows in this scenario, whose clients are {some}: take one of these ids, or own rows")
    return {client: parts[client]}


def _client(name: str, rows: np.ndarray, device_class: str, config: Config) -> ClientRows:
    held_out, train = split(len(rows), config.data.held_out, derive_seed(config.seed, "held_out", name))
    most = config.devices.classes[device_class].max_examples if device_class else None
    return ClientRows(
        train=sample(rows[train], most, derive_seed(config.seed, "max_examples", name)), held_out=rows[held_out], device_class=device_class
    )


def device_classes(config: Config, parts: Mapping[str, np.ndarray], table: Table) -> dict[str, str]:
    """Client → device class: from the rows of natural clients if they have the column, else drawn by the classes' shares.

    Raises:
        DataError: A client's rows disagree, or name a class missing from `devices.classes`.
    """
    classes = config.devices.classes
    if not classes:
        return dict.fromkeys(parts, "")
    if config.data.client is not None and len(classes) == 1:  # a real device with its own profile
        return dict.fromkeys(parts, *classes)
    if config.partition.kind != "natural" or "device_class" not in table.columns:
        return dict(zip(parts, deal(classes, len(parts), derive_seed(config.seed, "device_class")), strict=True))
    out = {}
    for name, rows in parts.items():
        found = sorted({table.columns["device_class"][i] for i in rows})
        if len(found) > 1:
            raise DataError(f"client '{name}' has rows of device_class '{found[0]}' and '{found[1]}': give all its rows one class")
        if found[0] not in classes:
            raise DataError(f"client '{name}' has device_class '{found[0]}', but devices.classes has only {', '.join(classes)}: add it")
        out[name] = found[0]
    return out


def deal(classes: Mapping[str, DeviceClass], clients: int, seed: int) -> list[str]:
    """One class name for each client, in proportion to the shares (largest remainder), in random order."""
    names = list(classes)
    shares = np.array([classes[name].share for name in names], np.float64)
    wanted = shares / shares.sum() * clients
    counts = np.floor(wanted).astype(int)
    for i in np.argsort(counts - wanted, kind="stable")[: clients - counts.sum()]:
        counts[i] += 1
    dealt = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    return [dealt[i] for i in np.random.default_rng(seed).permutation(clients)]


def _select(table: Table, rows: np.ndarray) -> Table:
    chosen = rows.tolist()
    return Table(columns={name: [values[i] for i in chosen] for name, values in table.columns.items()}, labels=table.labels)
