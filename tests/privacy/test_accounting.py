"""ε against independent computations; the noise for a given ε; both random sources."""

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedtune.errors import ConfigError
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Spend, at_least, epsilon, solve_noise
from fedtune.privacy.noise import Seeded, Source, System
from tests.quick import quick

ROUND = Spend(noise=1.1, rate=0.05, steps=7)


def poisson(noise: float, rate: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))


def test_fifty_rounds_cost_the_same_as_in_dp_accounting() -> None:
    rdp, pld = RdpAccountant(), PLDAccountant()
    rdp.compose(poisson(1.1, 0.05), 350)
    pld.compose(poisson(1.1, 0.05), 350)
    spent = [ROUND] * 50
    # RDP is one formula on one grid of orders: the same number; PRV lies above the PLD value by its error of at most .01 ε
    assert epsilon(spent, 1e-5, "rdp") == pytest.approx(rdp.get_epsilon(1e-5), rel=0.02)
    assert pld.get_epsilon(1e-5) <= epsilon(spent, 1e-5, "prv") <= pld.get_epsilon(1e-5) + 0.03
    assert epsilon(spent, 1e-5, "prv") < epsilon(spent, 1e-5, "rdp")


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Exact δ of one Gaussian (Balle & Wang 2018, theorem 5), for the tests alone."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize("noise", [9.0, 20.0])
def test_fifty_rounds_at_user_level_cost_the_closed_form(noise: float) -> None:
    # without sampling, 50 Gaussians of z are one of z / √50, whose δ is known exactly: the ε where it is 1e-5, by bisection
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, noise / math.sqrt(50)) > 1e-5 else (low, middle)
    rounds = [Spend(noise=noise, rate=1.0, steps=1)] * 50
    assert low <= epsilon(rounds, 1e-5, "prv") <= low + 0.03 and low <= epsilon(rounds, 1e-5, "rdp") <= 1.15 * low


@pytest.mark.parametrize(("rate", "steps"), quick([(0.1, 40), (1.0, 10)], (1.0, 10)))
def test_epsilon_eight_is_met_closely(rate: float, steps: int) -> None:
    # privacy.epsilon=8 privacy.delta=1e-5, judged by another library: it holds, and with one percent less noise it would not
    noise = solve_noise(8.0, 1e-5, rate, steps)
    costs = []
    for z in (noise, 0.99 * noise):
        pld = PLDAccountant()
        pld.compose(poisson(z, rate) if rate < 1 else dp_accounting.GaussianDpEvent(z), steps)
        costs.append(pld.get_epsilon(1e-5))
    assert 7.92 <= costs[0] <= 8.0 < costs[1]


@pytest.mark.parametrize(("noise", "rate"), quick([(1.3, 0.2), (0.8, 0.05), (4.0, 1.0)], (1.3, 0.2), (4.0, 1.0)))
def test_the_bound_of_a_single_sum_is_exact(noise: float, rate: float) -> None:
    pld, cost = PLDAccountant(), Spend(noise=noise, rate=rate, steps=1)
    pld.compose(poisson(noise, rate) if rate < 1 else dp_accounting.GaussianDpEvent(noise), 1)
    exact = pld.get_epsilon(1e-5)
    assert at_least(cost, exact + 0.01, 1e-5) and not at_least(cost, exact - 0.01, 1e-5)
    assert at_least(cost, 1e6, 1e-5) and not at_least(Spend(noise=1e-9, rate=rate, steps=1), 100.0, 1e-5)


@pytest.mark.slow
def test_turns_of_different_kinds_add_up() -> None:
    spent = [ROUND, Spend(noise=0.9, rate=0.1, steps=4), ROUND, Spend(noise=2.0, rate=1.0, steps=2)]
    pld = PLDAccountant()
    for event, steps in ((poisson(1.1, 0.05), 14), (poisson(0.9, 0.1), 4), (dp_accounting.GaussianDpEvent(2.0), 2)):
        pld.compose(event, steps)
    assert pld.get_epsilon(1e-5) - 0.02 <= epsilon(spent, 1e-5) <= pld.get_epsilon(1e-5) + 0.04
    assert epsilon(spent[::-1], 1e-5) == epsilon(spent, 1e-5)


@pytest.mark.parametrize("accountant", quick(["rdp", "prv"], "rdp"))
def test_epsilon_only_grows(accountant: str) -> None:
    costs = [epsilon([ROUND] * n, 1e-5, accountant) for n in range(6)]
    assert costs[0] == 0.0 and costs == sorted(set(costs))
    assert epsilon([ROUND], 1e-7, accountant) > epsilon([ROUND], 1e-5, accountant)


def test_epsilon_is_infinite_without_noise() -> None:
    assert epsilon([ROUND, Spend(noise=0.0, rate=0.1, steps=1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    quick([(8.0, 0.1, 40, "rdp"), (1.0, 0.02, 100, "prv"), *(few := [(1.0, 0.02, 100, "rdp"), (0.3, 1.0, 5, "prv")])], *few),
)
def test_the_solved_noise_keeps_epsilon(target: float, rate: float, steps: int, accountant: str) -> None:
    noise = solve_noise(target, 1e-5, rate, steps, accountant)
    cost = epsilon([Spend(noise=noise, rate=rate, steps=steps)], 1e-5, accountant)
    assert target - min(0.01, target / 20) <= cost <= target


def test_a_very_large_epsilon_is_a_number() -> None:
    much = [Spend(noise=1e-6, rate=1.0, steps=3)]
    assert epsilon(much, 1e-5, "prv") == epsilon(much, 1e-5, "rdp") > 1e9


@pytest.mark.parametrize("accountant", quick(["rdp", "prv"], "rdp"))
def test_an_epsilon_without_sufficient_noise_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch, accountant: str) -> None:
    monkeypatch.setattr("opacus.accountants.utils.get_noise_multiplier", lambda **_: pytest.fail("the search takes minutes"))
    with pytest.raises(ConfigError, match=r"no noise keeps .* over 100000 steps \(655360 times the sensitivity, .* ε = 0\.\d+\): raise"):
        solve_noise(1e-9, 1e-5, 1.0, 100_000, accountant)


@pytest.mark.parametrize("source", [Seeded(1, "x"), System()], ids=["seeded", "system"])
def test_the_noise_has_the_stated_deviation(source: Source) -> None:
    drawn = source.normal((500, 400), 3.0).numpy()
    assert drawn.std() == pytest.approx(3.0, rel=0.01) and abs(drawn.mean()) < 0.03
    # and normal: shares within one, two and three standard deviations
    shares = [float((np.abs(drawn) < k * 3.0).mean()) for k in (1, 2, 3)]
    assert shares == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)


@pytest.mark.parametrize("source", [Seeded(1, "x"), System()], ids=["seeded", "system"])
def test_rows_are_sampled_independently(source: Source) -> None:
    drawn = [source.chosen(40, 0.1) for _ in range(3000)]
    sizes = np.array([len(d) for d in drawn])
    # binomial(40, .1): mean 4, variance 3.6; the empty sample comes with chance .9^40 = .0148
    assert sizes.mean() == pytest.approx(4.0, abs=0.15) and sizes.var() == pytest.approx(3.6, abs=0.45)
    assert (sizes == 0).mean() == pytest.approx(0.0148, abs=0.009)
    assert source.chosen(5, 1.0) == [0, 1, 2, 3, 4]


def test_a_seed_repeats_and_the_system_does_not() -> None:
    assert Seeded(1, "a").normal((3,), 1.0).tolist() == Seeded(1, "a").normal((3,), 1.0).tolist()
    assert Seeded(1, "a").normal((3,), 1.0).tolist() != Seeded(1, "b").normal((3,), 1.0).tolist()
    assert System().normal((3,), 1.0).tolist() != System().normal((3,), 1.0).tolist()


def test_the_tests_detect_a_lost_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_epsilon", lambda history, *rest: float(len(history)))
    # equal kinds are added, not overwritten: seven steps a round
    seen: list[tuple[tuple[float, float, int], ...]] = []
    monkeypatch.setattr(accounting, "_epsilon", lambda history, *rest: seen.append(history) or 1.0)
    epsilon([ROUND] * 3, 1e-5)
    assert seen == [((1.1, 0.05, 21),)]
