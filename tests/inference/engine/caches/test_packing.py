import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.inference.engine.caches.base import CacheError
from fedtune.inference.engine.caches.packing import decode, encode, grid, group_size, spread


def test_codes_by_hand() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.4, 0.6, 2.4, 2.6]).view(8, 1)
    low, scale = grid(x, 0, 2)
    assert (low.item(), scale.item()) == (0.0, 1.0)  # (3 - 0) / (2^2 - 1)
    packed = encode(x, low, scale, 2)
    # codes 0 1 2 3 0 1 2 3: byte i holds tokens i, 2 + i, 4 + i, 6 + i, the first in the low bits
    assert packed.flatten().tolist() == [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert decode(packed, low, scale, 2).flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@given(st.sampled_from([8, 4, 2]), st.floats(-300, 300), st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 50.0]), st.integers(0, 1000))
def test_the_error_is_at_most_half_a_step(bits: int, offset: float, spread: float, seed: int) -> None:
    x = offset + spread * torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(seed))
    for dim in (1, 2):  # over tokens, over channels
        low, scale = grid(x, dim, bits)
        off = (decode(encode(x, low, scale, bits), low, scale, bits) - x).abs()
        rounding = 4 * torch.finfo(torch.float32).eps * x.abs().max()  # of float32 itself
        assert bool((off <= scale.float() / 2 + rounding).all())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_steps_are_no_wider_than_needed(bits: int) -> None:
    x = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(0))
    low, scale = grid(x, 1, bits)
    needed = (x.amax(1) - x.amin(1)) / (2**bits - 1)
    # outward rounding of the lowest number to float16 (11 bits) widens the range by at most 2^-10 of it, of the step by 2^-10
    assert bool((scale.squeeze(1).float() <= needed * 1.002 + x.abs().amax(1) * 2**-10 / (2**bits - 1)).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_numbers_round_trip(value: float) -> None:
    x = torch.full((1, 4, 3), value)
    low, scale = grid(x, 1, 4)
    assert bool((scale == 1).all())
    assert torch.equal(decode(encode(x, low, scale, 4), low, scale, 4), x)


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_numbers_out_of_range_for_float16_are_refused(value: float) -> None:
    with pytest.raises(CacheError, match="too large for float16"):
        grid(torch.tensor([[0.0, value]]), 1, 4)


@pytest.mark.parametrize("width, most, sizes", [(10, 32, [10]), (74, 32, [25, 25, 24]), (128, 32, [32] * 4), (10, 4, [4, 4, 2])])
def test_channels_are_split_into_groups_of_nearly_equal_size(width: int, most: int, sizes: list[int]) -> None:
    size = group_size(width, most)
    assert [len(part) for part in torch.arange(width).split(size)] == sizes
    numbers = torch.arange(3 * len(sizes)).view(3, -1)
    want = torch.cat([numbers[:, i : i + 1].expand(3, n) for i, n in enumerate(sizes)], 1)
    assert torch.equal(spread(numbers, size, width).expand(3, width), want)
