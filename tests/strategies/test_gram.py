"""Distances between the effects of adapters, against dense matrices, and Krum's selection against Flower's."""

import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy.multikrum import compute_distances, select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState
from fedtune.strategies import _flower
from fedtune.strategies._gram import distances, krum, products
from tests.strategies.updates import SHAPES, plain, random_adapter, with_other_factors


def dense(adapter: AdapterState) -> Tensor:
    """The complete effect of the adapter, as one vector."""
    s = adapter.spec.scaling
    parts = [(s[m] * adapter[f"{m}.lora_B"].double() @ adapter[f"{m}.lora_A"].double()).flatten() for m in adapter.spec.ranks]
    return torch.cat([*parts, adapter["head.weight"].double().flatten()])


def test_distances_by_hand() -> None:
    # ΔW_1 = 1·2 = 2, ΔW_2 = 3·1 = 3
    a, b = [torch.tensor([[2.0]]), torch.tensor([[1.0]])], [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    assert products(a, b).tolist() == [[4.0, 6.0], [6.0, 9.0]]


def test_products_of_mixed_ranks_are_those_of_dense_matrices() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = [torch.randn(r, 5, generator=gen) for r in (1, 4, 2)], [torch.randn(3, r, generator=gen) for r in (1, 4, 2)]
    full = torch.stack([(y.double() @ x.double()).flatten() for x, y in zip(a, b, strict=True)])
    assert torch.allclose(products(a, b), full @ full.T, atol=1e-12)


def test_distances_are_those_of_dense_matrices() -> None:
    origin, clients = random_adapter(0), [random_adapter(i) for i in range(1, 6)]
    # a client's own scaling counts: the same factors with s = 4 instead of 2 give twice the matrix
    clients[3] = clients[3].replace(scaling={"q": 4.0, "up": 0.5})
    vectors = torch.stack([dense(c) for c in clients])
    assert torch.allclose(distances(clients, origin), torch.cdist(vectors, vectors) ** 2, atol=1e-9)


def test_one_huge_update_costs_the_others_no_precision() -> None:
    origin, clients = random_adapter(0), [random_adapter(1), random_adapter(2), random_adapter(3, scale=1e12)]
    vectors = torch.stack([dense(c) for c in clients[:2]])
    assert torch.allclose(distances(clients, origin)[0, 1], ((vectors[0] - vectors[1]) ** 2).sum(), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), malicious=st.integers(0, 2), select=st.integers(1, 4))
def test_plain_tensors_are_selected_as_flower_does(seed: int, malicious: int, select: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    clients = [plain(*torch.randn(9, generator=gen).double().tolist()) for _ in range(7)]
    contents = [RecordDict({"arrays": _flower.arrays({"w": c["w"].double()})}) for c in clients]
    theirs = [contents.index(c) for c in select_multikrum(contents, malicious, select)]
    assert krum(distances(clients, plain(*[0.0] * 9)), malicious=malicious, select=select) == theirs


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_other_factors_of_the_same_products_select_the_same_clients(seed: int) -> None:
    clients = [random_adapter(1000 * seed + i) for i in range(8)]
    others = [with_other_factors(c, seed=i + seed) for i, c in enumerate(clients)]
    picks = [krum(distances(c, random_adapter(0)), malicious=1, select=3) for c in (clients, others)]
    assert picks[0] == picks[1]


def test_distances_between_factors_are_detected() -> None:
    """Flower's class compares factors: the same updates with other factors have other distances, so other clients are selected."""

    def flowers(clients: list[AdapterState]) -> list[int]:
        apart = compute_distances([_flower.arrays({n: t.double() for n, t in c.tensors.items()}) for c in clients])
        return krum(torch.from_numpy(apart), malicious=1, select=3)

    seen = [
        (flowers(c), flowers([with_other_factors(x, seed=i) for i, x in enumerate(c)]))
        for c in ([random_adapter(9 * s + i) for i in range(8)] for s in range(5))
    ]
    assert any(a != b for a, b in seen)


def test_ties_are_broken_by_order() -> None:
    # 0 and 1 are each other's closest, as are 2 and 3: all four scores are 1
    apart = torch.tensor([[0.0, 1.0, 9.0, 9.0], [1.0 + 1e-13, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 1.0 - 1e-13], [9.0, 9.0, 1.0, 0.0]])
    assert krum(apart.double(), malicious=1, select=2) == [0, 1]


def test_scores_by_hand() -> None:
    # points 0, 1, 3, 7 and f = 0: each counts its 2 closest. 0: 1 + 9; 1: 1 + 4; 3: 4 + 9; 7: 16 + 36
    points = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)
    apart = (points[:, None] - points[None, :]) ** 2
    assert krum(apart, malicious=0, select=4) == [1, 0, 2, 3]
    # f = 1: only the closest. 0: 1; 1: 1; 3: 4; 7: 16
    assert krum(apart, malicious=1, select=1) == [0]


def test_one_client_is_selected() -> None:
    assert krum(torch.zeros(1, 1), malicious=1, select=1) == [0] and len(SHAPES) == 5
