"""Low-rank arithmetic against dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.strategies import _lowrank
from fedtune.strategies._lowrank import Term
from tests.strategies.lowrank import adapter, delta

SIZES = st.integers(1, 9)


def terms_of(rows: int, columns: int, ranks: list[int], seed: int) -> list[Term]:
    gen = torch.Generator().manual_seed(seed)
    return [
        (
            float(torch.rand((), generator=gen)) + 0.1,
            torch.randn(r, columns, generator=gen, dtype=torch.float64),
            torch.randn(rows, r, generator=gen, dtype=torch.float64),
        )
        for r in ranks
    ]


def dense(terms: list[Term]) -> Tensor:
    return torch.stack([w * b @ a for w, a, b in terms]).sum(0)


def test_a_stack_by_hand() -> None:
    a, b = _lowrank.stack(
        [(2.0, torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]])), (0.5, torch.tensor([[0.0, 4.0]]), torch.tensor([[5.0]]))]
    )
    # 2 · 3 · [1, 0] + 0.5 · 5 · [0, 4] = [6, 10]
    assert a.tolist() == [[2.0, 0.0], [0.0, 2.0]] and b.tolist() == [[3.0, 5.0]] and (b @ a).tolist() == [[6.0, 10.0]]


@settings(deadline=None, max_examples=60)
@given(rows=SIZES, columns=SIZES, ranks=st.lists(SIZES, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_factored_svd_is_the_dense_one(rows: int, columns: int, ranks: list[int], seed: int) -> None:
    terms = terms_of(rows, columns, ranks, seed)
    u, sigma, vt = _lowrank.svd(_lowrank.stack(terms))
    matrix = dense(terms)
    scale, m = float(matrix.norm()), min(rows, columns, sum(ranks))
    assert (u * sigma @ vt - matrix).norm() <= 1e-12 * scale
    assert torch.allclose(sigma, torch.linalg.svdvals(matrix)[:m], rtol=0, atol=1e-12 * scale)
    eye = torch.eye(m, dtype=torch.float64)
    assert torch.allclose(u.T @ u, eye, atol=1e-12) and torch.allclose(vt @ vt.T, eye, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(rows=SIZES, columns=SIZES, ranks=st.lists(SIZES, min_size=1, max_size=4), keep=SIZES, seed=st.integers(0, 99))
def test_truncation_is_off_by_the_tail(rows: int, columns: int, ranks: list[int], keep: int, seed: int) -> None:
    terms = terms_of(rows, columns, ranks, seed)
    a, b = _lowrank.truncate(_lowrank.stack(terms), keep)
    matrix = dense(terms)
    tail = math.sqrt(float((torch.linalg.svdvals(matrix)[keep:] ** 2).sum()))
    assert a.shape == (keep, columns) and b.shape == (rows, keep)
    assert abs(float((b @ a - matrix).norm()) - tail) <= 1e-12 * float(matrix.norm())


@settings(deadline=None, max_examples=60)
@given(rows=SIZES, columns=SIZES, ranks=st.lists(SIZES, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_compacting_keeps_the_matrix_at_its_true_rank(rows: int, columns: int, ranks: list[int], seed: int) -> None:
    terms = terms_of(rows, columns, ranks, seed)
    a, b = _lowrank.compact(terms)
    matrix = dense(terms)
    assert len(a) == b.shape[1] <= min(rows, columns, sum(ranks))
    assert (b @ a - matrix).norm() <= 1e-6 * matrix.norm()
    w, a_0, b_0 = terms[0]
    assert len(_lowrank.compact([terms[0], (-w, a_0, b_0)])[0]) == 0  # D − D has rank 0 and not that of its rounding


def test_the_norm_of_a_term_needs_no_product() -> None:
    (term,) = terms_of(7, 5, [3], 0)
    assert _lowrank.norm(term) == pytest.approx(float(dense([term]).norm()), rel=1e-12)


def test_signs_depend_only_on_the_product() -> None:
    ((w, a, b),) = terms_of(7, 5, [3], 0)
    for flipped in ((w, -a, -b), (w, a.flip(0), b.flip(1))):  # the same matrix, other factors
        for x, y in zip(_lowrank.svd(_lowrank.stack([(w, a, b)])), _lowrank.svd(_lowrank.stack([flipped])), strict=True):
            assert torch.allclose(x, y, atol=1e-12)
    u = _lowrank.svd(_lowrank.stack([(w, a, b)]))[0]
    assert all(column[column.abs().argmax()] > 0 for column in u.T)


@pytest.mark.parametrize(("method", "scaling"), [("lora", 6.0), ("rslora", 4.0)])
def test_a_smaller_rank_keeps_alpha_and_the_leading_part(method: str, scaling: float) -> None:
    whole = adapter(rank=4, alpha=12.0 if method == "lora" else 8.0 * 2**-0.5, method=method)
    small = _lowrank.at_rank(whole, 2)
    # lora: alpha = 12, so s = 12/4 = 3 and 12/2 = 6; rslora: alpha = 8/√2, so s = 8/√2/√4 = 2.83 and 8/√2/√2 = 4
    assert all(small.spec.scaling[m] == pytest.approx(scaling) and small.spec.ranks[m] == 2 for m in small.spec.ranks)
    for module, s in whole.spec.scaling.items():
        leading = s * whole[f"{module}.lora_B"][:, :2] @ whole[f"{module}.lora_A"][:2]
        assert torch.allclose(delta(small)[module].float(), leading, atol=1e-5)
    assert _lowrank.at_rank(whole, None) is whole and _lowrank.at_rank(whole, 4) is whole and _lowrank.at_rank(whole, 9) is whole
