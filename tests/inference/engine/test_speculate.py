"""The mathematics of speculation, without a model."""

import itertools
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.inference.engine.guess import Guesses
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Least, chosen
from fedtune.inference.engine.speculate.adapt import Adapt, Costs, Verified
from fedtune.inference.engine.speculate.lookup import Lookup
from fedtune.inference.engine.speculate.lookup_or_recycle import LookupOrRecycle
from fedtune.inference.engine.speculate.recycle import Recycle

# -- prompt lookup ------------------------------------------------------------------------------------------------------------------------


def guess(text: str, count: int = 10) -> str:
    return "".join(map(chr, Lookup().draft([ord(c) for c in text], count).tokens))


def test_lookup_copies_from_the_last_matching_position() -> None:
    assert guess("abcdeabxyzab", 3) == "xyz"  # after the later "ab", not "cde"
    assert guess("abcdxb", 2) == "cd"  # no earlier "xb": after the "b"
    assert guess("1abcd2bcx3abc", 1) == "d"  # after the "abc", though a "bc" came later
    assert [Lookup().grade([ord(c) for c in text]) for text in ("abcd", "abxb", "xabyab", "abcyabc", "")] == [None, 1, 2, 3, None]
    assert guess("abcd") == "" and guess("") == "" and guess("a") == ""
    assert guess("xaxbxcx", 1) == "c"
    text = [ord(c) for c in "wabc1xabc2wabc"]  # the longest ending decides, though an "abc" came later
    assert [Lookup(*sizes).draft(text, 1).tokens for sizes in ((), ((3, 2, 1),))] == [[ord("1")], [ord("2")]]


def test_a_repetition_continues_beyond_the_end_of_the_text() -> None:
    assert guess("abcabc", 10) == "abcabcabca"
    assert guess("aa", 4) == "aaaa"


SIZES = (8, 4, 3, 1)


def by_search(texts: list[list[int]], count: int) -> tuple[int | None, list[int]]:
    """What a lookup finds for the last text."""
    *before, text = texts
    for size in (size for size in SIZES if size <= len(text)):
        for at in range(len(text) - 1, size - 1, -1):
            if text[at - size : at] == text[len(text) - size :]:
                period = len(text) - at
                return size, [text[at + i % period] for i in range(count)]
        for other in reversed(before):
            for at in range(len(other) - 1, size - 1, -1):
                if other[at - size : at] == text[len(text) - size :]:
                    return size, other[at : at + count]
    return None, []


few = st.lists(st.integers(0, 2), max_size=30)


@given(st.lists(few, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_lookups_in_growing_texts_equal_a_search(texts: list[list[int]], data: st.DataObject) -> None:
    lookup, before = Lookup(SIZES), list[list[int]]()
    for text in texts:
        lookup.begin(Sampling(), cast(Any, None))
        for end in sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=1, max_size=4))):
            now = text[:end]
            if before and now[: len(before[-1])] == before[-1]:  # it continues the text before
                before.pop()
            assert (lookup.grade(now), lookup.draft(now, 7).tokens) == by_search([*before, now], 7)
        before.append(now)


def test_earlier_texts_are_forgotten_when_they_have_too_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.inference.engine.speculate.lookup._MOST", 10)
    lookup, found = Lookup(), list[int | None]()
    for text in ([1, 2, 3, 4, 5, 6], [7, 2, 3], [8, 2, 3], [9, 2]):
        lookup.begin(Sampling(), cast(Any, None))
        found.append(lookup.grade(text))
    assert found == [None, 2, 2, None]  # the fourth begins after more than ten tokens


# -- token recycling -----------------------------------------------------------------------------------------------------------------------


def best(*rows: tuple[int, int, float, float]) -> Guesses:
    return Guesses(np.array([r[:2] for r in rows]), np.array([r[2:] for r in rows], np.float32))


def test_a_table_of_choices_drafts_by_two_tokens_else_by_one() -> None:
    recycle = Recycle()
    assert recycle.grade([1, 2]) is None and recycle.draft([1, 2], 3).tokens == []
    recycle.learn([(1, 2), (5, 2), (2, 7)], best((7, 8, 0.6, 0.3), (9, 4, 0.5, 0.2), (3, 6, 0.8, 0.1)))
    assert recycle.draft([0, 1, 2], 1).tokens == [7] and recycle.draft([5, 2], 1).tokens == [9]
    assert recycle.draft([6, 2], 1).tokens == [9] and recycle.draft([2], 1).tokens == [9]  # the latest successor of this token
    assert recycle.draft([1, 2], 4).tokens == [7, 3]  # nothing is known after a 3
    assert recycle.draft([1, 2], 4).others == [] and recycle.draft([1, 2], 4, None, Least()).others == [(0, 8), (1, 6)]
    assert recycle.grade([1, 2]) == 0 and recycle.grade([3]) is None
    recycle.learn([(1, 2)], best((4, 8, float("nan"), 0.3)))
    assert recycle.draft([1, 2], 1).tokens == [7]


def test_chances_are_calibrated_by_the_probabilities_that_followed() -> None:
    recycle, same, other = Recycle(), best((7, 8, 0.5, 0.25)), best((9, 8, 0.5, 0.25))
    recycle.learn([(1, 2)], same)
    assert recycle.draft([1, 2], 1).chances == [0.5]
    for _ in range(400):
        recycle.learn([(1, 2)], same)
    assert recycle.draft([1, 2], 1).chances == [pytest.approx(0.5, rel=0.01)]  # the same probability each time
    for _ in range(200):
        recycle.learn([(1, 2)], other)
        recycle.learn([(1, 2)], same)
    assert recycle.draft([1, 2], 1).chances[0] < 0.1  # a different token each time
    trusted = Least(0.0, recycle.draft([1, 2], 1).chances[0] / 2 * 0.99)
    assert recycle.draft([1, 2], 1, None, trusted).others == [(0, 8)]
    assert recycle.draft([1, 2], 1, None, Least(0.0, 0.9)).tokens == []


def test_a_long_ending_takes_precedence_over_the_table() -> None:
    drafter = LookupOrRecycle()
    drafter.begin(Sampling(), cast(Any, None))
    drafter.learn([(4, 5)], best((9, 8, 0.5, 0.25)))
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5]
    assert (drafter.grade(text[:5]), drafter.draft(text[:5], 2).tokens, drafter.gives_chances(0)) == (0, [9], True)
    assert (drafter.grade(text), drafter.draft(text, 2).tokens, drafter.gives_chances(5)) == (5, [6, 7], False)


def test_only_tokens_worth_verifying_are_drafted() -> None:
    made = best((1, 2, 0.8, 0.1), (3, 4, 0.5, 0.4), (5, 6, 0.5, 0.3))
    assert chosen(made, None) == Draft([1, 3, 5], [], [0.800000011920929, 0.5, 0.5])
    draft = chosen(made, Least(0.0, 0.3))
    assert draft.tokens == [1, 3] and draft.others == [(1, 4)]  # .8, .4, not .2; .32 for the 4, not .1 for the 2
    assert chosen(made, Least(0.0, 0.09)).others == [(0, 2), (1, 4), (2, 6)]
    assert chosen(best((1, 2, float("nan"), 0.1)), Least(0.0, 0.0)).tokens == []
    assert chosen(made, Least(0.0, 0.99, trust=2.0)).tokens == [1, 3, 5]  # with this trust all are certain


def critical(freedom: int) -> float:
    """Quantile .9999 of chi-square, by Wilson and Hilferty."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


# -- number of draft tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acceptance", "guesses", "tokens"), [(0.75, 2, 1 + 0.75 + 0.75**2), (1.0, 3, 4.0), (0.8, 5, (1 - 0.8**6) / (1 - 0.8))]
)
def test_expected_tokens_by_hand(acceptance: float, guesses: int, tokens: float) -> None:
    adapt = Adapt(guesses)
    for n in range(1, guesses + 2):  # all passes cost the same, so the gain is the expected number of tokens
        adapt.costs.add(n, 1.0)
        adapt._drafts.add(n, 0.0)
    assert adapt.best(hoped=acceptance) == (pytest.approx(tokens), guesses)


def test_costs_are_the_minimum_measurement_and_interpolated() -> None:
    costs = Costs()
    costs.add(1, 5.0)
    assert costs.table(3) == [0, 5.0, 5.0, 5.0]  # costs of larger passes are assumed equal until they are measured
    costs.add(1, 2.0)
    costs.add(3, 4.0)
    assert costs.table(5) == [0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for _ in range(4):
        costs.add(1, 3.0)
    assert costs.table(3) == [0, 3.0, 3.5, 4.0]  # old measurements are forgotten
    costs.add(5, 1.0)
    assert costs.table(7) == [
        0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
    ]  # fewer tokens never take longer, more tokens never less


def run_steps(adapt: Adapt, steps: int, cost: dict[int, float], acceptance: float, draft: float = 0.0) -> list[int]:
    """Feed artificial measurements; every 1/(1 - acceptance)-th draft token is rejected."""
    out, owed = [], 0.0
    for _ in range(steps):
        n = adapt.count()
        out.append(n)
        if n == 0:
            adapt.plain(cost[1])
            continue
        kept = 0
        for _ in range(n):
            owed += 1 - acceptance
            if owed >= 1 - 1e-9:
                owed -= 1
                break
            kept += 1
        adapt.verified(Verified(n, kept, n + 1, kept + 1), n * draft, cost[n + 1])
    return out


FLAT = {n: 1.0 for n in range(1, 12)}
STEEP = {n: float(n) for n in range(1, 12)}


def test_cheap_passes_and_high_acceptance_give_long_drafts() -> None:
    counts = run_steps(Adapt(), 40, FLAT, 0.9)
    assert counts[0] == 0 and set(counts[5:31]) == {10}  # the first step measures c(1)
    counts = run_steps(Adapt(), 70, FLAT, 0.9)
    assert [i for i, n in enumerate(counts) if n == 0] == [0, 33, 66]  # and so does one after 32 verifications


def test_a_size_that_was_slow_once_is_used_again() -> None:
    adapt = Adapt()
    for n, seconds in ((1, 1.0), (2, 1.1), (3, 9.0), (6, 1.5)):  # the first pass of three tokens was slow by chance
        adapt.costs.add(n, seconds)
    assert adapt.costs.table(6) == pytest.approx([0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    counts = run_steps(adapt, 60, {n: 1 + 0.1 * (n - 1) for n in range(1, 12)}, 0.5)
    assert counts.count(2) > 20  # the best, see below
    costs = Costs()
    for n, seconds in ((1, 1.0), (2, 1.9), (2, 2.0), (6, 2.0)):  # a size measured twice keeps its minimum
        costs.add(n, seconds)
    assert costs.table(2) == [0, 1.0, 1.9]
    costs = Costs()
    for n, seconds in ((1, 1.0), (2, 1.9), (6, 2.0)):
        costs.add(n, seconds)
    assert costs.table(2) == [0, 1.0, 1.2]  # on the line from 1 to 6
    costs.add(2, 2.0)
    assert costs.table(2) == [0, 1.0, 1.9]  # used at once


def test_an_attempt_increases_the_draft_length_gradually() -> None:
    counts = run_steps(Adapt(), 12, STEEP, 0.9)
    assert max(counts[:3]) == 2  # with only c(1) measured, a pass has at most three tokens
    counts = run_steps(Adapt(), 12, FLAT, 0.9)
    assert [n for n in counts if n][:3] == [2, 8, 10]


def test_an_attempt_ends_at_once_if_even_good_drafts_would_not_pay() -> None:
    counts = run_steps(Adapt(), 400, STEEP, 0.3)
    runs = [len(list(same)) for tried, same in itertools.groupby(map(bool, counts)) if tried]
    assert len(runs) >= 4 and set(runs) == {1}  # 1.7 tokens for a pass of two


def test_a_slow_first_verification_does_not_end_all_attempts() -> None:
    adapt = Adapt()
    run_steps(adapt, 1, FLAT, 0.9)
    run_steps(adapt, 1, {n: 30.0 for n in FLAT}, 0.9)
    assert run_steps(adapt, 80, FLAT, 0.9)[-20:] == [10] * 20


def test_low_acceptance_or_expensive_drafts_give_short_drafts() -> None:
    counts = run_steps(Adapt(), 60, {n: 1 + 0.1 * (n - 1) for n in range(1, 12)}, 0.5)
    # by hand: (1 - .5^(g+1)) / .5 / (1 + .1 g) is 1.36, 1.46, 1.44, 1.38 for g = 1 ... 4
    late = [n for n in counts[20:] if n]
    assert late and max(late) <= 3


def test_speculation_is_disabled_if_it_costs_time_and_retried_at_growing_intervals() -> None:
    counts = run_steps(Adapt(), 3000, STEEP, 0.3)
    tries = [i for i in range(1, len(counts)) if counts[i] and not counts[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(tries) >= 4 and all(b > 1.5 * a for a, b in itertools.pairwise(gaps[:5]))
    assert sum(map(bool, counts)) < 40  # of 3000 steps


def test_speculation_resumes_if_the_text_becomes_predictable() -> None:
    adapt = Adapt()
    cost = {n: 1 + 0.2 * (n - 1) for n in range(1, 12)}
    run_steps(adapt, 100, cost, 0.0)
    assert not adapt.count()  # speculation pauses
    counts = run_steps(adapt, 600, cost, 0.95)
    assert sum(map(bool, counts[-100:])) > 90


def test_each_grade_has_its_own_acceptance_and_pauses() -> None:
    adapt = Adapt()
    cost = {n: 1 + 0.1 * (n - 1) for n in range(1, 12)}
    tried = {1: 0, 3: 0}
    for _ in range(100):
        for grade in tried:
            if n := adapt.count(grade):
                kept = n if grade == 3 else 0
                adapt.verified(Verified(n, kept, n + 1, kept + 1), 0.0, cost[n + 1], grade)
                tried[grade] += 1
            else:
                adapt.plain(cost[1])
    # with pauses of 16, 32 and 64 steps at most four attempts fit into 100 steps; each ends after at most six draft tokens
    assert tried[1] <= 24 and tried[3] >= 90 and adapt.acceptance(3) > 0.95 and adapt.count(3)


def test_an_expensive_draft_is_not_worth_it() -> None:
    counts = run_steps(Adapt(), 400, FLAT, 0.5, draft=1.2)
    assert sum(map(bool, counts[-200:])) < 10


def test_the_same_measurements_give_the_same_choices() -> None:
    assert run_steps(Adapt(), 500, STEEP, 0.8, 0.1) == run_steps(Adapt(), 500, STEEP, 0.8, 0.1)


def test_a_fixed_draft_length_stays_fixed() -> None:
    assert run_steps(Adapt(fixed=3), 50, STEEP, 0.0) == [3] * 50


def test_the_unit_of_time_changes_no_choice() -> None:
    slow, fast = ({n: unit * (1 + 0.1 * (n - 1)) for n in range(1, 12)} for unit in (8.0, 2.0**-10))
    assert run_steps(Adapt(), 200, slow, 0.5) == run_steps(Adapt(), 200, fast, 0.5)


def test_an_attempt_has_three_verifications() -> None:
    cost = {n: 1 + 0.1 * (n - 1) for n in range(1, 12)}  # good drafts would pay off
    counts = run_steps(Adapt(), 40, cost, 0.0)
    # the first step measures c(1); no draft token was accepted in the three verifications, and the pause is 16 steps
    assert [bool(n) for n in counts[:24]] == [False, *[True] * 3, *[False] * 17, *[True] * 3]


def test_with_chances_a_token_is_drafted_while_it_is_worth_its_seconds() -> None:
    adapt = Adapt(4)
    for rows in range(1, 6):
        adapt.costs.add(rows, 0.9 + 0.1 * rows)
    for _ in range(50):  # 2 tokens in 1.6 seconds
        adapt.verified(Verified(3, 1, 4, 2, [0.5, 0.5, 0.5]), 0.3, 1.3)
    least = adapt.least()
    assert least is not None
    rate = 2 / 1.6
    assert least.verify == pytest.approx(0.1 * rate, rel=0.05)
    assert least.draft == pytest.approx((0.1 + 0.1) * rate / adapt.acceptance(), rel=0.05)
    for _ in range(200):
        adapt.verified(Verified(3, 3, 4, 4, [0.5, 0.8, 0.8]), 0.3, 1.3)
    least = adapt.least()
    assert least is not None and least.trust == pytest.approx(3 / 2.1, rel=0.05)  # tokens after a wrong one do not count
    assert Adapt(fixed=3).least() is None


def test_drafts_that_are_never_worth_it_end_an_attempt() -> None:
    adapt, counts = Adapt(), list[int]()
    adapt.plain(1.0)
    for _ in range(60):
        counts.append(adapt.count(0, True))
        if counts[-1]:
            adapt.refused(0.5)
        adapt.plain(1.0)
    assert counts[0] > 0 and sum(map(bool, counts)) == 9  # three attempts, with pauses of 16 and 32 steps


def test_a_table_grows_on_demand() -> None:
    costs = Costs()
    costs.add(1, 2.0)
    costs.add(2, 3.0)
    assert [costs.table(most)[-1] for most in (0, 1, 2, 3)] == [0.0, 2.0, 3.0, 4.0] and costs.largest == 2
