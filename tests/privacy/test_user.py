"""User-level privacy: clipping, noise, division by the planned cohort size, and the adaptive clip norm."""

import math
from typing import Any

import pytest
import torch

from fedtune.errors import ConfigError
from fedtune.privacy import user
from fedtune.privacy.noise import Seeded
from fedtune.privacy.user import PrivateMean, Tracker, clipped, moved, noised, norm

SHAPES = {"q.lora_A": (2, 5), "q.lora_B": (3, 2), "head.weight": (4, 7)}


def tensors(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(s, generator=gen) for n, s in SHAPES.items()}


BEFORE = tensors(0)


def plus(delta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: BEFORE[n] + d for n, d in delta.items()}


def mean(sent: list[dict[str, torch.Tensor]], **changes: Any) -> PrivateMean:
    private_mean = PrivateMean(BEFORE, **{"clip": math.inf, "noise": 0.0, "cohort": len(sent), "source": Seeded(0), **changes})
    for after in sent:
        private_mean.add(after)
    return private_mean


def test_all_tensors_are_clipped_together() -> None:
    # by hand: ‖(3, 4)‖ = 5 over both tensors, clipped to 1: (.6, .8)
    out = clipped({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    assert out["a"].item() == pytest.approx(0.6) and out["b"].item() == pytest.approx(0.8)
    assert clipped({"a": torch.tensor([0.5])}, 1.0)["a"].item() == 0.5


def test_without_noise_and_clip_the_result_is_the_uniform_mean() -> None:
    sent = [plus(tensors(k)) for k in (1, 2, 3)]
    out, _ = mean(sent).close()
    for n in SHAPES:
        torch.testing.assert_close(out[n].float(), torch.stack([s[n] for s in sent]).mean(0), rtol=1e-6, atol=1e-6)
        assert out[n].dtype == torch.float64 and torch.equal(out[n], out[n].to(BEFORE[n].dtype).double())  # rounded to the stored dtype


@pytest.mark.parametrize("removed", range(4))
@pytest.mark.parametrize("clip", [0.01, 3.0, 100.0])
def test_one_client_moves_the_sum_by_at_most_c(removed: int, clip: float) -> None:
    sent = [plus(tensors(k, size)) for k, size in ((1, 0.1), (2, 1.0), (3, 50.0), (4, 2.0))]
    with_, _ = mean(sent, clip=clip, cohort=4).close()
    without, _ = mean(sent[:removed] + sent[removed + 1 :], clip=clip, cohort=4).close()
    # the mean is the sum divided by m = 4, for any number of clients; float32 tensors round
    assert 4 * norm(moved(with_, without)) <= clip * (1 + 1e-3) + 1e-5


def test_an_absent_client_counts_as_zero_change() -> None:
    out, _ = mean([plus({n: torch.full(s, 4.0) for n, s in SHAPES.items()})], cohort=4).close()
    for n in SHAPES:
        torch.testing.assert_close(out[n].float(), BEFORE[n] + 1.0)  # 4 / m, not 4 / 1


def test_the_servers_noise_has_the_stated_deviation() -> None:
    zeros = {"w": torch.zeros(400, 300)}
    private_mean = PrivateMean(zeros, clip=0.5, noise=2.0, cohort=4, source=Seeded(3))
    for _ in range(4):
        private_mean.add(zeros)
    out, _ = private_mean.close()
    assert float(out["w"].std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.01)


def test_the_clients_noise_has_the_stated_deviation_after_clipping() -> None:
    zeros = {"w": torch.zeros(400, 300)}
    out = noised({"w": torch.full((400, 300), 9.0)}, zeros, clip=0.5, noise=2.0, source=Seeded(3))
    assert float(out["w"].std()) == pytest.approx(1.0, rel=0.01)
    quiet = noised({"w": torch.full((400, 300), 9.0)}, zeros, clip=0.5, noise=0.0, source=Seeded(3))
    assert norm(quiet) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_tracker_reaches_the_median(start: float, noise: float) -> None:
    sizes = [0.5, 0.7, 0.9, 1.0, 1.04, 1.08, 1.2, 1.5, 2.0, 3.0]  # median 1.06
    tracker, source, clip = Tracker(noise=noise), Seeded(1), 1.06 * start
    seen = []
    for _ in range(200):
        clip = tracker.next(clip, sum(s <= clip for s in sizes), len(sizes), len(sizes), source)
        seen.append(clip)
    assert sum(seen[-50:]) / 50 == pytest.approx(1.06, rel=0.1)


def test_counting_clipped_instead_of_unclipped_updates_diverges() -> None:
    # Flower's sign: C falls where it should rise
    sizes, clip, tracker = [1.0] * 10, 0.1, Tracker(noise=0.0)
    for _ in range(60):
        clip = tracker.next(clip, sum(s > clip for s in sizes), 10, 10, Seeded(0))
    assert clip < 1e-3


def test_a_round_of_adaptive_clipping_by_hand() -> None:
    sent = [plus({"q.lora_A": torch.zeros(2, 5), "q.lora_B": torch.zeros(3, 2), "head.weight": torch.zeros(4, 7)})] * 3
    far = plus({n: torch.full(s, 9.0) for n, s in SHAPES.items()})
    private_mean = mean([*sent, far], clip=2.0, cohort=4, tracker=Tracker(noise=0.0))
    # three of four are under C: b̃ = ½ + (3 − 2) / 4 = .75, C ← 2 · exp(−.2 · (.75 − .5))
    assert (private_mean.came, private_mean.under) == (4, 3) and private_mean.close()[1] == pytest.approx(2 * math.exp(-0.05))


def test_the_round_s_noise_uses_the_old_clip_norm() -> None:
    zeros, cohort, z = {"w": torch.zeros(400, 300)}, 40, 1.0
    tracker = Tracker(noise=0.05)  # σ_b = 2
    private_mean = PrivateMean(zeros, clip=0.5, noise=z, cohort=cohort, source=Seeded(3), tracker=tracker)
    for _ in range(cohort):
        private_mean.add(zeros)
    out, after = private_mean.close()
    left = (1.0 - 1 / 16) ** -0.5  # (z⁻² − (2 · 2)⁻²)^−½
    assert tracker.tensor_noise(z, cohort) == pytest.approx(left)
    assert after < 0.5 and float(out["w"].std()) * cohort == pytest.approx(left * 0.5, rel=0.01)


def test_tensors_and_bits_together_cost_as_much_as_z() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    # the bits' noise σ_b = .05 · 40 on a sum that one client moves by ½: a multiplier of 4
    both, alone = RdpAccountant(), RdpAccountant()
    both.compose(dp_accounting.GaussianDpEvent(Tracker(noise=0.05).tensor_noise(1.0, 40)), 50)
    both.compose(dp_accounting.GaussianDpEvent(0.05 * 40 / 0.5), 50)
    alone.compose(dp_accounting.GaussianDpEvent(1.0), 50)
    assert both.get_epsilon(1e-5) == pytest.approx(alone.get_epsilon(1e-5), rel=1e-6)


def test_too_little_noise_on_the_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise privacy.bit_noise or clients_per_round"):
        Tracker(noise=0.05).tensor_noise(2.0, 10)


def test_the_tests_detect_weights_by_rows_or_a_wrong_divisor(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [plus(tensors(k, 9.0)) for k in (1, 2, 3, 4)]

    def difference(cohort_of: Any) -> float:
        with_, _ = mean(sent, clip=1.0, cohort=cohort_of(4)).close()
        without, _ = mean(sent[:3], clip=1.0, cohort=cohort_of(3)).close()
        return 4 * norm(moved(with_, without))

    assert difference(lambda came: 4) <= 1.001
    monkeypatch.setattr(user, "clipped", lambda delta, clip: {n: 3 * t for n, t in clipped(delta, clip).items()})  # n_k / mean n = 3
    assert difference(lambda came: 4) > 2.9
