"""Positions: round trip, size, and checks of received bytes."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import UpdateMismatch
from fedtune.traffic.positions import pack, packed_bytes, unpack


@st.composite
def chosen(draw: st.DrawFn) -> tuple[list[int], int]:
    total = draw(st.integers(1, 700))
    count = draw(st.integers(0, total))
    return sorted(random.Random(draw(st.integers(0, 9999))).sample(range(total), count)), total


@given(chosen())
def test_positions_are_unpacked_as_they_were_packed(case: tuple[list[int], int]) -> None:
    places, total = case
    packed = pack(torch.tensor(places, dtype=torch.int64), total)
    assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(len(places), total) <= math.ceil(total / 8)
    assert unpack(packed, len(places), total).tolist() == places


def test_elias_fano_by_hand() -> None:
    # 2 of 40: 40 // 2 = 20, so 4 low bits each. 5 = 0·16 + 5 and 37 = 2·16 + 5. Upper parts 0 and 2 in unary: 1 001; lows, least bit first:
    # 1010 1010. 1001 1010 | 1010 0000
    assert pack(torch.tensor([5, 37]), 40).tolist() == [0b10011010, 0b10100000]
    # 6 of 9 cost 6·(1 + 0) + 8 = 14 bits by Elias–Fano, a bitmap 9: 110101101 with 0, 1, 3, 5, 6, 8
    assert pack(torch.tensor([0, 1, 3, 5, 6, 8]), 9).tolist() == [0b11010110, 0b10000000]


def test_one_percent_costs_nine_bits_each() -> None:
    # 100 // 1 has 7 bits, so 6 low ones: 10,000·(1 + 6) + 999,999 // 64 = 85,624 bits
    assert packed_bytes(10_000, 1_000_000) == 85_624 // 8 == 10_703
    assert packed_bytes(10_000, 10_000) == 0 and packed_bytes(0, 10) == 0


@pytest.mark.parametrize(
    ("places", "total"),
    [([5, 37], 40), ([5, 36], 38), ([0, 1, 3, 5, 6, 8], 9)],  # Elias–Fano; where a flipped bit makes 36 the total, 38; a bitmap
)
def test_invalid_positions_are_refused(places: list[int], total: int) -> None:
    good = pack(torch.tensor(places), total)
    refused = 0
    for bit in range(8 * len(good)):
        bad = good.clone()
        bad[bit // 8] ^= 1 << (bit % 8)
        try:
            unpacked = unpack(bad, len(places), total)
        except UpdateMismatch:
            refused += 1
        else:  # other positions, but valid: ascending and below total
            assert len(unpacked) == len(places) and unpacked.max() < total and (unpacked.diff() > 0).all()
    assert refused > 4
    with pytest.raises(UpdateMismatch, match=rf"^the positions have 3 bytes, but {len(places)} of {total} positions take 2 bytes$"):
        unpack(torch.cat([good, good[:1]]), len(places), total)
