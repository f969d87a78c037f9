"""Every partition is disjoint and complete, follows its seed, and has the documented shape."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from fedtune.config import PartitionConfig
from fedtune.data.partition import apportion, by_prior, partition, rows_of_large_clients
from fedtune.errors import DataError

KINDS = ("natural", "iid", "dirichlet", "pathological", "size", "prior")


def deal(kind: str, labels: np.ndarray, seed: int = 0, **settings: float) -> dict[str, np.ndarray]:
    config = PartitionConfig(kind=kind, **settings)  # type: ignore[arg-type]
    return partition(config, len(labels), seed, labels, [f"home-{label}" for label in labels])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_every_row_belongs_to_exactly_one_client(kind: str, data: st.DataObject) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, 4), min_size=12, max_size=60)))
    clients, alpha, seed = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([0.01, 0.5, 5.0])), data.draw(st.integers(0, 2**40))
    try:
        parts = deal(kind, labels, seed, clients=clients, alpha=alpha, classes_per_client=2)
    except DataError as refused:
        assert kind in ("pathological", "size"), refused
        return
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    assert all(len(part) for part in parts.values())
    assert list(parts) == sorted(parts)
    again = deal(kind, labels, seed, clients=clients, alpha=alpha, classes_per_client=2)
    assert {name: part.tolist() for name, part in parts.items()} == {name: part.tolist() for name, part in again.items()}


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "size", "prior"])
def test_another_seed_gives_another_partition(kind: str) -> None:
    labels = np.arange(100) % 5
    one, two = (deal(kind, labels, seed, clients=5) for seed in (0, 1))
    assert {n: p.tolist() for n, p in one.items()} != {n: p.tolist() for n, p in two.items()}


def test_natural_clients_are_the_ids_of_the_data() -> None:
    parts = partition(PartitionConfig(kind="natural"), 5, 0, None, ["zoe", "ada", "zoe", "7", "ada"])
    assert {name: part.tolist() for name, part in parts.items()} == {"7": [3], "ada": [1, 4], "zoe": [0, 2]}


def test_small_natural_clients_are_excluded_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedtune.data"):
        rows = rows_of_large_clients(PartitionConfig(min_examples=2), ["a", "b", "a", "c", "c"])
    assert rows.tolist() == [0, 2, 3, 4]
    assert "1 of 3 clients have fewer than 2 rows and are left out (1 rows)" in caplog.text


def test_iid_is_even_and_mixed() -> None:
    parts = deal("iid", np.arange(103) % 2, clients=10)
    assert sorted(map(len, parts.values())) == [10] * 7 + [11] * 3
    assert list(parts)[:2] == ["client-000", "client-001"]
    assert parts["client-000"].tolist() != list(range(11))  # not the first rows of the file


def test_ids_grow_with_the_number_of_clients() -> None:
    assert list(deal("prior", np.zeros(1001, int), clients=1001))[-1] == "client-1000"


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "size", "prior"])
@pytest.mark.parametrize("classes", [1, 5])
def test_the_order_of_the_source_has_no_effect(kind: str, classes: int) -> None:
    labels = np.arange(2000) % classes  # sorted by topic: a class's first rows are one topic, its last another
    parts = deal(kind, labels, clients=8, alpha=0.01 if kind == "size" else float("inf"), classes_per_client=1)
    assert len(parts) == 8
    for part in parts.values():
        # the mean of n uniform places is 1000 +- 2000 / sqrt(12 n) (ids in order would be up to 875 away); four deviations
        assert abs(part.mean() - 1000) < 4 * 2000 / np.sqrt(12 * len(part))


@pytest.mark.parametrize(("kind", "rows", "per_class", "clients", "alpha"), [
    ("dirichlet", 1001, 13, 10, 10.0),  # an earlier version gave the last client the rest of 77 floored shares: 14 % more than the others
    ("dirichlet", 1001, 13, 10, float("inf")),
    ("dirichlet", 4, 2, 4, float("inf")),
    ("pathological", 130, 13, 10, 1.0),  # 13 rows to two clients: in an earlier version the first always got 7
])  # fmt: skip
def test_a_client_s_index_does_not_affect_its_size(kind: str, rows: int, per_class: int, clients: int, alpha: float) -> None:
    labels = np.repeat(np.arange(rows // per_class), per_class)
    sizes = np.zeros((60, clients))
    for seed in range(60):
        for name, part in deal(kind, labels, seed, clients=clients, alpha=alpha, classes_per_client=2).items():
            sizes[seed, int(name.removeprefix("client-"))] = len(part)
    assert_allclose(sizes.sum(axis=1), rows)
    deviation = max(sizes.std() / np.sqrt(60), 1 / 60)
    assert np.abs(sizes.mean(axis=0) - rows / clients).max() < 4 * deviation, sizes.mean(axis=0)


def test_apportion_gives_the_rest_to_the_largest_remainders() -> None:
    rng = np.random.default_rng(0)
    # 7 * (.5, .3, .2) = 3.5, 2.1, 1.4: floors 3, 2, 1, and the one left over goes to the first
    assert apportion(7, np.array([5.0, 3.0, 2.0]), rng).tolist() == [4, 2, 1]
    assert apportion(0, np.array([5.0, 3.0]), rng).tolist() == [0, 0]
    drawn = {tuple(apportion(1, np.ones(3), rng).tolist()) for _ in range(40)}
    assert drawn == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}  # a tie is drawn


def test_infinite_alpha_deals_every_class_evenly() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    for kind in ("dirichlet", "prior"):
        counts = np.array([np.bincount(labels[p], minlength=3) for p in deal(kind, labels, clients=10, alpha=float("inf")).values()])
        assert_allclose(counts, np.tile([60, 30, 10], (10, 1)), atol=0 if kind == "dirichlet" else 20)


def test_dirichlet_is_uneven_when_alpha_is_small_and_even_when_it_is_large() -> None:
    labels = np.arange(1000) % 4
    shares = {}
    for alpha in (0.1, 1000.0):
        parts = deal("dirichlet", labels, clients=5, alpha=alpha)
        counts = np.array([np.bincount(labels[part], minlength=4) for part in parts.values()])
        shares[alpha] = (counts / counts.sum(axis=1, keepdims=True)).max(axis=1).mean()
    assert shares[0.1] > 0.6
    assert shares[1000.0] < 0.3  # a quarter is perfectly even


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_dirichlet_deals_each_class_by_a_draw_of_its_own_alpha(alpha: float) -> None:
    classes, clients = 2000, 5  # the mean over 2000 classes is within 3 % of its expectation
    labels = np.repeat(np.arange(classes), 100)
    parts = deal("dirichlet", labels, clients=clients, alpha=alpha)
    shares = np.array([np.bincount(labels[part], minlength=classes) for part in parts.values()]) / 100
    # by hand: of p ~ Dir(α, …, α) over K clients the mean of Σ p² is (α + 1) / (Kα + 1): .429 and .273; twice the α gives .333 and .238
    assert float((shares**2).sum(0).mean()) == pytest.approx((alpha + 1) / (clients * alpha + 1), rel=0.03)


def test_dirichlet_excludes_empty_clients_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedtune.data"):
        parts = deal("dirichlet", np.zeros(20, int), clients=20, alpha=0.01)
    assert len(parts) < 20
    assert f"{20 - len(parts)} of 20 clients have no rows and are left out" in caplog.text


@pytest.mark.parametrize(("clients", "per"), [(5, 2), (10, 2), (7, 3), (2, 10), (3, 4)])
def test_pathological_clients_hold_their_number_of_classes_and_no_class_is_lost(clients: int, per: int) -> None:
    labels = np.arange(400) % 10  # the library's own dealing would lose classes at 5 clients of 2
    for seed in range(8):
        parts = deal("pathological", labels, seed, clients=clients, classes_per_client=per)
        held = [np.unique(labels[part]) for part in parts.values()]
        assert [len(classes) for classes in held] == [per] * clients
        assert len(np.unique(np.concatenate(held))) == 10


def test_size_grows_with_the_power_of_the_client() -> None:
    parts = deal("size", np.zeros(60, int), clients=3, alpha=1.0)
    assert list(map(len, parts.values())) == [10, 20, 30]  # 60 * (1, 2, 3) / 6
    parts = deal("size", np.zeros(140, int), clients=3, alpha=2.0)
    assert list(map(len, parts.values())) == [10, 40, 90]  # 140 * (1, 4, 9) / 14
    parts = deal("size", np.zeros(63, int), clients=3, alpha=0.0001)
    assert list(map(len, parts.values())) == [21, 21, 21]  # 20.998, 21.001, 21.001: floors would give the last client one more


def test_prior_gives_equal_sizes_and_with_large_alpha_the_class_prior() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    parts = by_prior(labels, 10, 1e6, np.random.default_rng(0))
    counts = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert set(map(len, parts)) == {100}
    # prior (.6, .3, .1) on 100 rows a client; four standard deviations of a binomial are at most 4 * sqrt(100 * .25) = 20
    assert_allclose(counts, np.tile([60, 30, 10], (10, 1)), atol=20)
    assert_allclose(counts.sum(axis=0), [600, 300, 100])


def test_prior_with_small_alpha_gives_nearly_one_class_each() -> None:
    labels = np.arange(1000) % 4
    parts = by_prior(labels, 4, 0.01, np.random.default_rng(3))
    largest = [np.bincount(labels[part]).max() / len(part) for part in parts]
    assert np.mean(largest) > 0.6
    assert sorted(map(len, parts)) == [250] * 4


def test_prior_draws_around_the_classes_shares() -> None:
    labels, starved = np.repeat([0, 1], [1800, 200]), 0
    for seed in range(6):
        starved += sum(labels[part].sum() < 3 for part in by_prior(labels, 20, 1.0, np.random.default_rng(seed)))
    # q_k ~ Dir(.9, .1) leaves many of the 120 clients almost without the rare class; Dir(1, 1) would leave few (measured: 52 and 15)
    assert starved > 35


def test_prior_sizes_differ_by_one_row_at_most() -> None:
    assert sorted(map(len, by_prior(np.arange(23) % 3, 4, 0.1, np.random.default_rng(0)))) == [5, 6, 6, 6]
