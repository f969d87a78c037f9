"""One step of DP-SGD: clipping bounds a row's influence, the noise has the stated deviation, an empty sample is pure noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data import Example, collate
from fedtune.errors import Decline
from fedtune.privacy import samples
from fedtune.privacy.dpsgd import PrivateGradient, clipped_sum, sampling_rate
from fedtune.privacy.noise import Seeded
from tests.models.build import VOCABULARY
from tests.privacy.test_samples import LM, perturbed_adapter
from tests.quick import quick


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.flatten().double() for t in tensors.values()]).norm())


def test_rows_are_clipped_jointly_and_summed() -> None:
    # by hand: row 0 is (3, 0 | 4), norm 5, clipped to 1: (.6, 0 | .8); row 1 is (0, .3 | 0), norm .3, as it is
    grads = {"a": torch.tensor([[3.0, 0.0], [0.0, 0.3]]), "b": torch.tensor([[4.0], [0.0]])}
    out = clipped_sum(grads, 1.0)
    torch.testing.assert_close(out["a"], torch.tensor([0.6, 0.3]).double())
    torch.testing.assert_close(out["b"], torch.tensor([0.8]).double())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 5))
def test_one_row_moves_the_sum_by_at_most_c(seed: int, count: int, clip: float, gone: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(count).uniform_(-4, 4, generator=gen)
    grads = {n: torch.randn(count, *s, generator=gen) * sizes.view(-1, *[1] * len(s)) for n, s in (("a", (2, 5)), ("b", (3,)))}
    gone %= count
    without = {n: torch.cat([g[:gone], g[gone + 1 :]]) for n, g in grads.items()}
    with_, out = clipped_sum(grads, clip), clipped_sum(without, clip)
    assert norm({n: with_[n] - out[n] for n in grads}) <= clip * (1 + 1e-6)


def test_a_row_without_a_finite_gradient_counts_as_zero() -> None:
    grads = {"a": torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [3.0, 4.0]])}
    torch.testing.assert_close(clipped_sum(grads, 1.0)["a"], torch.tensor([0.6, 0.8]).double())


def test_the_tests_detect_clipping_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}
    apart: dict[str, torch.Tensor] = {}
    for n, g in grads.items():
        apart |= clipped_sum({n: g}, 1.0)
    assert norm(apart) > 1.4 and norm(clipped_sum(grads, 1.0)) == pytest.approx(1.0)


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(3, VOCABULARY, rng.integers(3, 9)).astype(np.int32) for _ in range(count)]
    return [Example(ids, ids) for ids in token_ids]


def gradient(tmp_path: Path, rows: list[Example], way: Any = samples.looped, **changes: Any) -> dict[str, torch.Tensor]:
    with private_gradient(tmp_path, rows, way, **changes) as private:
        return private.step()


def private_gradient(tmp_path: Path, rows: list[Example], way: Any = samples.looped, **changes: Any) -> PrivateGradient:
    live = perturbed_adapter(tmp_path / "m", "llama", "lora", LM)
    given = {"clip": 0.7, "noise": 0.0, "batch": 4, "at_once": 3, "source": Seeded(0), "way": way, **changes}
    return PrivateGradient(
        live, list(live.parameters), LM, rows=len(rows), batch_of=lambda some: collate([rows[i] for i in some], 1), **given
    )


class Chosen(Seeded):
    """A source with given rows."""

    def __init__(self, *rows: int) -> None:
        super().__init__(0)
        self.rows = list(rows)

    def chosen(self, count: int, rate: float) -> list[int]:
        return self.rows


def test_without_noise_and_clip_it_is_the_mean_gradient(tmp_path: Path) -> None:
    rows = examples(4)
    with private_gradient(tmp_path, rows, clip=1e9, batch=4) as private:
        step, live = private.step(), private._live
    with samples.looped(live, list(live.parameters), LM) as grads:
        single = [grads(collate([r], 1)) for r in rows]
    for n, g in step.items():
        torch.testing.assert_close(g, torch.cat([s[n] for s in single]).mean(0), rtol=1e-5, atol=1e-7)
        assert g.dtype == live.parameters[n].dtype


@pytest.mark.parametrize("removed", quick(range(5), 0, 4))
def test_removing_one_row_of_a_real_model_moves_the_sum_by_at_most_c(tmp_path: Path, removed: int) -> None:
    left = [i for i in range(5) if i != removed]
    with_ = gradient(tmp_path / "a", examples(5), clip=0.05, source=Chosen(0, 1, 2, 3, 4))
    without = gradient(tmp_path / "b", examples(5), clip=0.05, source=Chosen(*left))
    # the step is the sum divided by B = 4, for any number of rows
    apart = 4 * norm({n: with_[n] - without[n] for n in with_})
    assert 0.04 < apart <= 0.05 * (1 + 1e-5)


def test_an_empty_sample_is_pure_noise(tmp_path: Path) -> None:
    with private_gradient(tmp_path, examples(6), noise=2.0, clip=0.5, source=Chosen()) as private:
        drawn = torch.cat([g.flatten() for _ in range(12) for g in private.step().values()])
    # std σ·C / B = 2 · .5 / 4
    assert len(drawn) > 16_000 and float(drawn.std()) == pytest.approx(0.25, rel=0.01) and abs(float(drawn.mean())) < 0.01


def test_a_sample_larger_than_a_pass_and_all_methods_agree(tmp_path: Path) -> None:
    rows = examples(9)
    expected = gradient(tmp_path / "a", rows, at_once=9, source=Chosen(*range(9)))
    for way in (samples.looped, samples.hooked, samples.mapped):
        actual = gradient(tmp_path / way.__name__, rows, way=way, at_once=2, source=Chosen(*range(9)))
        for n, g in expected.items():
            torch.testing.assert_close(actual[n], g, rtol=1e-4, atol=1e-7)


class Small:
    """Memory that runs out after the forward pass if a pass has more than `rows` rows, from pass `since` on."""

    def __init__(self, rows: int, since: int = 0) -> None:
        self.rows, self.since, self.real, self.sizes = rows, since, samples._losses, list[int]()

    def __call__(self, live: Any, batch: Any, task: Any) -> torch.Tensor:
        out = self.real(live, batch, task)
        self.sizes.append(len(batch["labels"]))
        if len(self.sizes) > self.since and self.sizes[-1] > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out


@pytest.mark.parametrize("since", [0, 1])
def test_out_of_memory_halves_the_pass_and_keeps_sample_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: int) -> None:
    rows, settings = examples(20), {"noise": 1.3, "batch": 12, "way": samples.hooked}
    with private_gradient(tmp_path / "a", rows, at_once=6, **settings) as whole:
        expected = [whole.step(), whole.step()]
    small = Small(3, since)
    monkeypatch.setattr(samples, "_losses", small)
    with private_gradient(tmp_path / "b", rows, at_once=6, **settings) as private:
        actual = [private.step(), private.step()]
    # finished passes are kept, and no row is counted twice
    tried, again = small.sizes[since : since + 2]
    assert private.out_of_memory == 1 and tried > 3 and again == private.at_once == tried // 2
    for before, after in zip(expected, actual, strict=True):
        for n, g in before.items():
            torch.testing.assert_close(after[n], g, rtol=1e-4, atol=1e-6)


def test_a_private_row_that_exceeds_memory_declines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_losses", Small(0))
    with private_gradient(tmp_path, examples(6), way=samples.hooked, source=Chosen(0, 1, 2, 3, 4)) as private:
        with pytest.raises(Decline, match=r"^out of memory with a single row in a private turn") as bad:
            private.step()
        assert bad.value.kind == "memory" and private.out_of_memory == 2  # 3 → 1 → none


def test_other_errors_are_not_treated_as_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> torch.Tensor:
        raise ValueError("broken")

    monkeypatch.setattr(samples, "_losses", broken)
    with private_gradient(tmp_path, examples(6), source=Chosen(0, 1)) as private, pytest.raises(ValueError, match="broken"):
        private.step()


def test_a_client_with_few_rows_samples_all(tmp_path: Path) -> None:
    assert sampling_rate(3, 8) == 1.0 and sampling_rate(80, 8) == 0.1
    assert private_gradient(tmp_path, examples(3), batch=8, clip=1e9)._expected == 3.0
