"""A codec: which entries of the tensors are sent, and the format of the values.

The encoded floating-point tensors of a mapping are at most three flat arrays, `#index`, `#q` and `#scale`; integers, such as the positions
of a sparse mask, are sent unchanged. Shapes and codec determine every array's size, so a receiver can check it without trusting the sender.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.errors import PlanError, UpdateMismatch
from fedtune.traffic.positions import pack, packed_bytes, unpack
from fedtune.traffic.values import VALUES

INDEX = "#index"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Top-k, then quantized values; each is optional.

    The k entries are the largest over all tensors together, which keeps the most of the vector's norm.

    Args:
        values: Format of the values: fp32, fp16, bf16, int8 or nf4.
        share: Top-k: share of all entries to send, rounded up to an integer count; 1 sends all.
        stochastic: Stochastic rounding, which is unbiased.
        feedback: Error feedback: the client adds this update's error to its next update.
    """

    values: str = "fp32"
    share: float = 1.0
    stochastic: bool = False
    feedback: bool = False

    @property
    def name(self) -> str:
        """Such as `topk=0.05+int8+stochastic+feedback`."""
        parts = [f"topk={self.share!r}"] if self.share < 1 else []
        return "+".join([*parts, self.values, *["stochastic"] * self.stochastic, *["feedback"] * self.feedback])

    @classmethod
    def from_name(cls, name: str) -> "Codec":
        """The inverse of `name`.

        Raises:
            PlanError: This version does not know the codec.
        """
        words = name.split("+")
        try:
            share = float(words.pop(0)[5:]) if words[0].startswith("topk=") else 1.0
            codec = cls(values=words[0], share=share, stochastic="stochastic" in words, feedback="feedback" in words)
            good = codec.values in VALUES and 0 < share <= 1 and codec.name == name
        except (ValueError, IndexError):
            good = False
        if not good:
            known = "'[topk=SHARE+]VALUES[+stochastic][+feedback]' with VALUES one of " + ", ".join(VALUES)
            raise PlanError(f"the plan asks for codec '{name[:60]}', but this client knows {known}: update fedtune on the client")
        return codec

    def layout(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoded arrays for tensors of these shapes and dtypes, without values (on torch's meta device)."""
        lengths, k = self._lengths(like)
        total = sum(lengths)
        out = {n: torch.empty_like(t, device="meta") for n, t in like.items() if not t.is_floating_point()}
        arrays = VALUES[self.values].layout(lengths if k == total else (k,))
        if k < total:
            arrays = {INDEX: (torch.uint8, packed_bytes(k, total)), **arrays}
        return out | {n: torch.empty(length, dtype=dtype, device="meta") for n, (dtype, length) in arrays.items()}

    def nbytes(self, like: Mapping[str, Tensor]) -> int:
        """Encoded bytes of tensors of these shapes, without the headers of Flower's arrays."""
        return sum(t.numel() * t.element_size() for t in self.layout(like).values())

    def encode(self, tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
        """Encode tensors as arrays; `seed` is for stochastic rounding. Raises UpdateMismatch if a value is not finite."""
        lengths, k = self._lengths(tensors)
        flat = torch.cat([torch.empty(0), *(t.detach().cpu().float().flatten() for t in tensors.values() if t.is_floating_point())])
        if not torch.isfinite(flat).all():
            raise UpdateMismatch("the tensors to send have values that are not finite (NaN or infinity)")
        out = {n: t for n, t in tensors.items() if not t.is_floating_point()}
        if k < len(flat):
            places = _largest(flat, k)
            out[INDEX] = pack(places, len(flat))
            flat, lengths = flat[places], (k,)
        draw = torch.Generator().manual_seed(seed) if self.stochastic else None
        return out | VALUES[self.values].encode(flat, lengths, draw)

    def decode(self, arrays: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode tensors of the names and shapes of `like`: floats as float32, with 0 for entries that were not sent; integers unchanged.

        Raises:
            UpdateMismatch: The arrays do not match this codec and these shapes, or have invalid contents.
        """
        _compare(arrays, self.layout(like))
        lengths, k = self._lengths(like)
        total = sum(lengths)
        flat = VALUES[self.values].decode(arrays, lengths if k == total else (k,))
        if not torch.isfinite(flat).all():
            raise UpdateMismatch("the update has values that are not finite (NaN or infinity)")
        if k < total:
            flat = torch.zeros(total).index_copy(0, unpack(arrays[INDEX], k, total), flat)
        parts = iter(flat.split(list(lengths)))
        return {n: next(parts).view(t.shape) if t.is_floating_point() else arrays[n] for n, t in like.items()}

    def _lengths(self, like: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int]:
        """Entries of each floating-point tensor, and the number k of entries to send."""
        lengths = tuple(t.numel() for t in like.values() if t.is_floating_point())
        return lengths, math.ceil(self.share * sum(lengths))


def _largest(flat: Tensor, k: int) -> Tensor:
    """Positions (k,) of the largest magnitudes, ascending; ties are broken by position, so that every process agrees."""
    size = flat.abs()
    least = size.topk(k, sorted=False).values.min()
    chosen = size > least
    equal = (size == least).nonzero().flatten()
    chosen[equal[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def _compare(arrays: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in [*wanted, *arrays]:
        if name not in arrays:
            raise UpdateMismatch(f"array '{name}' of the encoded tensors is missing: the plan's codec needs {', '.join(wanted)}")
        if name not in wanted:
            raise UpdateMismatch(f"array '{name[:80]}' is not one of the codec's arrays")
        got, want = arrays[name], wanted[name]
        if got.dtype != want.dtype or got.shape != want.shape:
            raise UpdateMismatch(
                f"array '{name}' of the encoded tensors is {got.dtype} {tuple(got.shape)}, wanted {want.dtype} {tuple(want.shape)}"
            )
