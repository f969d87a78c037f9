import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.inference.engine.caches.budget import Choice, choose, parse_size, show_least
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, shape, tokens

SHAPE = shape(layers=2, heads=4, kv_heads=2, head_dim=32)
TOKEN = 2 * 2 * 2 * 32 * 4  # keys and values, layers, key heads, channels, bytes: 1 kB
TEXT = 4096


@pytest.mark.parametrize(
    "text, size",
    [("64MB", 64_000_000), ("64 mb", 64_000_000), ("1.5GiB", 3 * 2**29), ("800k", 800_000), ("2Ki", 2048), ("65536", 65536), ("12B", 12)],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "0", "0.2", "5TB", "1e3", "4,5MB", "nan", "64 M B", "9" * 30, "٣MB"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a memory size: write for example 64MB"):
        parse_size(text)


def test_the_first_policy_that_fits_is_chosen() -> None:
    def policy(part: float) -> str:
        return choose(SHAPE, TEXT, int(part * TEXT * TOKEN)).policy

    # 124 of 128 groups with 2 float16 beside 32 codes: 0.96875 (bits + 1) / 32 of full, and (128 + 32 + 31) / 4096 for the newest:
    # 8 bits 0.3191, 4 bits 0.1980, 2 bits 0.1375
    assert [policy(p) for p in (1, 0.999, 0.32, 0.318, 0.199, 0.197, 0.138, 0.137, 0.05)] == [
        "full",
        "kivi8",
        "kivi8",
        "kivi4",
        "kivi4",
        "kivi2",
        "kivi2",
        "window",
        "window",
    ]


def test_a_model_with_its_own_window_gets_a_window_cache_without_loss() -> None:
    own = shape(layers=2, heads=4, kv_heads=2, head_dim=32, windows=(100, 100))
    choice = choose(own, 1000, 999 * TOKEN)
    assert (choice.policy, choice.window, choice.sinks) == ("window", 100, 0)
    qkv, rope = tokens(own, 300), Rope(own)
    torch.testing.assert_close(
        passes(choice.build(), rope, qkv, [130, 1, 169]), passes(FullCache(own, 300), rope, qkv, [300]), atol=1e-5, rtol=1e-5
    )
    assert choose(shape(windows=(100, None)), 1000, 999 * 2 * 2 * 2 * 10 * 4).policy == "kivi8"  # one layer has no window


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["float32", "bfloat16"]))
def test_a_cache_stays_within_the_budget_or_is_refused(length: int, thousands: int, dtype: str) -> None:
    budget = 1000 * thousands
    try:
        choice = choose(SHAPE, length, budget, dtype)
    except ConfigError as error:
        assert "too small for this model: give at least" in str(error)
        return
    cache = choice.build()
    assert cache.limit == length
    passes(cache, Rope(SHAPE), tokens(SHAPE, length), [length])
    assert cache.nbytes == choice.nbytes <= budget


def test_the_description_of_each_policy() -> None:
    full = Choice(shape=SHAPE, tokens=100)
    assert full.sentence == "cache: all keys and values in full precision; 102.4 kB for a text of 100 tokens"
    codes = choose(SHAPE, TEXT, 700_000)
    # by hand: (4096 - 128) // 32 = 124 groups of (2 + 1) / 32 of 32 kB, and 191 tokens of 1 kB
    assert codes.nbytes == 124 * 3 * 1024 + 191 * 1024 == 576_512
    assert codes.sentence == "cache: keys and values in 2 bits, the newest 128 tokens in full precision; 576.5 kB for a text of 4096 tokens"
    window = choose(SHAPE, TEXT, 100_000)
    # by hand: 97 tokens of 1 kB fit: 4 sinks, 62 before the newest, the newest, and 32 less 2 that crop may need: 97 = 4 + 62 - 1 + 32
    assert (window.window, window.nbytes) == (62, 97 * 1024)
    assert window.sentence == "cache: only the first 4 and the newest 62 tokens; 99.3 kB for a text of 4096 tokens"


def test_a_refusal_names_the_smallest_budget() -> None:
    with pytest.raises(ConfigError, match="a cache of 60.0 kB is too small for this model: give at least 68.7kB for a text of 4096 tokens"):
        choose(SHAPE, TEXT, 60_000)  # 4 + 32 - 1 + 32 = 67 tokens of 1 kB
    assert choose(SHAPE, TEXT, 68_608).window == 32
    with pytest.raises(ConfigError, match="give at least 10.3kB for a text of 10 tokens"):
        choose(SHAPE, 10, 10_239)
    with pytest.raises(ConfigError, match="there is no cache policy 'h2o'"):
        Choice(shape=SHAPE, tokens=10, policy="h2o")


def test_every_policy_builds_its_cache() -> None:
    kinds = {"full": FullCache, "window": WindowCache, "kivi8": KiviCache, "kivi4": KiviCache, "kivi2": KiviCache}
    for policy, kind in kinds.items():
        cache = Choice(shape=SHAPE, tokens=77, policy=policy).build()
        assert type(cache) is kind and cache.limit == 77


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 9_216, 9_299, 64_100_000, 64_000_001, 999_999, 999_950_001, 3 * 2**30 + 1])
def test_the_smallest_size_as_printed_is_enough(size: int) -> None:
    assert size <= parse_size(show_least(size)) <= size * 1.1 and " " not in show_least(size)
