"""Formats of the values: fp32, fp16, bf16, and int8 or nf4 with a scale for every 64 values.

A payload is flat: the values of all tensors in one array, their scales in another. One array per tensor would cost 0.2 kB of headers, more
than the values of a small factor. Blocks do not cross tensors, whose magnitudes differ; `lengths` has the tensors' lengths.

Sources: block-wise absmax, Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861; nf4, Dettmers et al. 2023,
QLoRA, arXiv:2305.14314, appendix E. A scale is float32: int8 costs 1 + 4/64 bytes per value, nf4 1/2 + 4/64.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Generator, Tensor

from fedtune.errors import UpdateMismatch

BLOCK = 64
Q, SCALE = "#q", "#scale"
_LARGEST = torch.finfo(torch.float16).max  # 65,504

# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Values(Protocol):
    """A format for a flat vector of float32 values; `lengths` are the lengths of its tensors, each of which starts a new block."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        """Array → its dtype and length."""
        ...

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        """Encode as arrays. With `draw`, rounding is stochastic and unbiased."""
        ...

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        """Decode the vector from arrays that match `layout`. Raises UpdateMismatch if their contents are invalid."""
        ...


class FP32:
    """The values unchanged."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        return {Q: (torch.float32, sum(lengths))}

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        return {Q: flat}

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return arrays[Q]


class FP16:
    """Half precision: relative error up to 2⁻¹¹, stochastic up to 2⁻¹⁰; below 2⁻¹⁴ absolute error up to 2⁻²⁵, stochastic up to 2⁻²⁴."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        return {Q: (torch.float16, sum(lengths))}

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        size = flat.abs()
        if (size > _LARGEST).any():
            raise UpdateMismatch(
                f"a value to send is {float(size.max()):.3g}, but the largest fp16 value is {_LARGEST:,.0f}: use bf16 or int8 (traffic.up,"
                " traffic.down)"
            )
        if draw is None:
            return {Q: flat.to(torch.float16)}
        near = size.to(torch.float16)
        below = (near.view(torch.int16) - (near.float() > size).to(torch.int16)).view(torch.float16)  # neighbors differ by one bit
        above = (below.view(torch.int16) + 1).view(torch.float16)  # infinity only above the largest value, with probability 0
        chance = (size - below.float()) / (above.float() - below.float())
        chosen = torch.where(torch.rand(size.shape, generator=draw) < chance, above, below)
        return {Q: torch.copysign(chosen, flat.to(torch.float16))}

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return arrays[Q].float()


class BF16:
    """The upper half of a float32: relative error up to 2⁻⁸, stochastic up to 2⁻⁷."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        return {Q: (torch.bfloat16, sum(lengths))}

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        if draw is not None:  # between neighbors the bits are linear in the value: a random lower half carries with the right probability
            bits = flat.view(torch.int32) + torch.randint(1 << 16, flat.shape, generator=draw, dtype=torch.int32)
            flat = (bits & -(1 << 16)).view(torch.float32)
        return {Q: flat.to(torch.bfloat16)}

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        return arrays[Q].float()


class Int8:
    """q = round(v / scale) with scale = absmax / 127 of the block: error up to scale / 2, stochastic up to scale."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        return {Q: (torch.int8, sum(lengths)), SCALE: (torch.float32, _blocks(lengths))}

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        codes, scales = [flat.new_empty(0, dtype=torch.int8)], [flat.new_empty(0)]
        for block, length in _in_blocks(flat, lengths):  # (b, 64)
            scale = block.abs().amax(1) / 127
            steps = block / torch.where(scale > 0, scale, 1.0)[:, None]
            steps = steps.round() if draw is None else (steps + torch.rand(steps.shape, generator=draw)).floor()
            codes.append(steps.clamp(-127, 127).to(torch.int8).flatten()[:length])
            scales.append(scale)
        return {Q: torch.cat(codes), SCALE: torch.cat(scales)}

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        if (arrays[Q] == -128).any():
            raise UpdateMismatch("the update's int8 codes are damaged: valid codes are -127 to 127")
        return arrays[Q].float() * _spread(arrays[SCALE], lengths)


class NF4Values:
    """The nearest of 16 quantiles of a normal distribution times the block's absmax, two per byte: error up to 0.152 · scale."""

    def layout(self, lengths: Sequence[int]) -> dict[str, tuple[torch.dtype, int]]:
        return {Q: (torch.uint8, -(-sum(lengths) // 2)), SCALE: (torch.float32, _blocks(lengths))}

    def encode(self, flat: Tensor, lengths: Sequence[int], draw: Generator | None) -> dict[str, Tensor]:
        book = torch.tensor(NF4)
        middles = (book[1:] + book[:-1]) / 2
        codes, scales = [flat.new_empty(0, dtype=torch.uint8)], [flat.new_empty(0)]
        for block, length in _in_blocks(flat, lengths):
            scale = block.abs().amax(1)
            share = block / torch.where(scale > 0, scale, 1.0)[:, None]
            if draw is None:
                code = torch.bucketize(share, middles)
            else:
                below = (torch.bucketize(share, book, right=True) - 1).clamp(0, 14)
                chance = (share - book[below]) / (book[below + 1] - book[below])
                code = below + (torch.rand(share.shape, generator=draw) < chance)
            codes.append(code.to(torch.uint8).flatten()[:length])
            scales.append(scale)
        pairs = torch.cat([*codes, flat.new_zeros(sum(lengths) % 2, dtype=torch.uint8)]).view(-1, 2)
        return {Q: pairs[:, 0] << 4 | pairs[:, 1], SCALE: torch.cat(scales)}

    def decode(self, arrays: Mapping[str, Tensor], lengths: Sequence[int]) -> Tensor:
        codes = torch.stack([arrays[Q] >> 4, arrays[Q] & 15], 1).flatten()[: sum(lengths)]
        return torch.tensor(NF4)[codes.long()] * _spread(arrays[SCALE], lengths)


VALUES: Mapping[str, Values] = {"fp32": FP32(), "fp16": FP16(), "bf16": BF16(), "int8": Int8(), "nf4": NF4Values()}


def _blocks(lengths: Sequence[int]) -> int:
    return sum(-(-n // BLOCK) for n in lengths)


def _in_blocks(flat: Tensor, lengths: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Each tensor's values as (blocks, 64), the last block padded with zeros, and their count."""
    for part in flat.split(list(lengths)):
        if len(part):
            yield torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK), len(part)


def _spread(scales: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each value's scale (n,), expanded from the blocks' scales; raises UpdateMismatch if a scale is invalid."""
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise UpdateMismatch("the update's scales are damaged: each must be finite and not negative")
    parts = scales.split([-(-n // BLOCK) for n in lengths])
    return torch.cat([scales.new_empty(0), *(s.repeat_interleave(BLOCK)[:n] for s, n in zip(parts, lengths, strict=True))])
