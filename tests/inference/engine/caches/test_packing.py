import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.inference.engine.caches.base import CacheError
from fedtune.inference.engine.caches.packing import Floats, decode, encode, grid, group_size, spread


def draw(*size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def test_codes_by_hand() -> None:
    x = np.array([[0.0], [1.0], [2.0], [3.0], [0.4], [0.6], [2.4], [2.6]], np.float32)
    low, scale = grid(x, 0, 2)
    assert (low.item(), scale.item()) == (0.0, 1.0)  # (3 - 0) / (2^2 - 1)
    packed = encode(x, low, scale, 2)
    # codes 0 1 2 3 0 1 2 3: byte i holds tokens i, 2 + i, 4 + i, 6 + i, the first in the low bits
    assert packed.flatten().tolist() == [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert decode(packed, low, scale, 2).flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@given(st.sampled_from([8, 4, 2]), st.floats(-300, 300), st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 50.0]), st.integers(0, 1000))
def test_the_error_is_at_most_half_a_step(bits: int, offset: float, spread: float, seed: int) -> None:
    x = np.float32(offset) + np.float32(spread) * draw(3, 8, 5, seed=seed)
    for axis in (1, 2):  # over tokens, over channels
        low, scale = grid(x, axis, bits)
        off = np.abs(decode(encode(x, low, scale, bits), low, scale, bits) - x)
        rounding = 4 * np.finfo(np.float32).eps * np.abs(x).max()  # of float32 itself
        assert (off <= scale.astype(np.float32) / 2 + rounding).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_steps_are_no_wider_than_needed(bits: int) -> None:
    x = draw(2, 16, 7)
    low, scale = grid(x, 1, bits)
    needed = (x.max(1) - x.min(1)) / (2**bits - 1)
    # outward rounding of the lowest number to float16 (11 bits) widens the range by at most 2^-10 of it, of the step by 2^-10
    assert (scale[:, 0].astype(np.float32) <= needed * 1.002 + np.abs(x).max(1) * 2**-10 / (2**bits - 1)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_numbers_round_trip(value: float) -> None:
    x = np.full((1, 4, 3), value, np.float32)
    low, scale = grid(x, 1, 4)
    assert (scale == 1).all()
    assert np.array_equal(decode(encode(x, low, scale, 4), low, scale, 4), x)


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_numbers_out_of_range_for_float16_are_refused(value: float) -> None:
    with pytest.raises(CacheError, match="too large for float16"):
        grid(np.array([[0.0, value]], np.float32), 1, 4)


@pytest.mark.parametrize("width, most, sizes", [(10, 32, [10]), (74, 32, [25, 25, 24]), (128, 32, [32] * 4), (10, 4, [4, 4, 2])])
def test_channels_are_split_into_groups_of_nearly_equal_size(width: int, most: int, sizes: list[int]) -> None:
    size = group_size(width, most)
    assert [len(range(width)[c : c + size]) for c in range(0, width, size)] == sizes
    numbers = np.arange(3 * len(sizes), dtype=np.float16).reshape(3, -1)
    want = np.repeat(numbers, sizes, 1)
    assert np.array_equal(np.broadcast_to(spread(numbers, size, width), (3, width)), want)
