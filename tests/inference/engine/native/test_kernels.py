"""Every kernel of each instruction set of this CPU against the float64 product of its weights with the rounded activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array, as_float32, to_bfloat16
from fedtune.inference.engine.linear import dequantized
from fedtune.inference.engine.linear import portable as portable_array
from fedtune.inference.engine.native import build, library
from fedtune.inference.engine.native.library import SETS, Kernels, why_not
from fedtune.inference.engine.native.pack import PACKED, pack, weights_of
from fedtune.inference.engine.reference.tensors import as_array, as_tensor

SHAPES = [(1, 1), (1, 33), (5, 63), (16, 32), (17, 64), (37, 45), (33, 96), (50, 160), (129, 290), (17, 513), (5, 1056)]
MANY = 137  # rows: two tiles of 64 and some
pytestmark = pytest.mark.skipif(isinstance(library._opened(), str), reason=f"run `{build.COMMAND}`: {why_not()}")


def kernels_of(instructions: str) -> Kernels:
    opened = library._opened()
    if not opened.fedtune_supports(SETS.index(instructions)):
        pytest.skip(f"this CPU has no {instructions}")
    return Kernels(opened, instructions)


def portable(kind: str, weight: Tensor, *, group: int = 32) -> dict[str, Array]:
    return portable_array(kind, as_array(weight), group=group)


def product(run: Kernels, parts: dict[str, Array], kind: str, x: Tensor, n_out: int, threads: int = 1) -> Tensor:
    x, y = x.contiguous(), torch.full((x.shape[0], n_out), 7.0)
    weights = weights_of(parts, kind, x.shape[1], n_out)
    run.multiply(weights, threads, x.shape[0], (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes))
    return y


def round_activations(x: Tensor, kind: str) -> Tensor:
    """The activations as the kernels round them, in float64."""
    if kind in ("bf16", "fp32"):
        return (x.bfloat16() if kind == "bf16" else x).double()
    short = -x.shape[1] % 32
    grouped = torch.nn.functional.pad(x, (0, short)).unflatten(1, (-1, 32))
    most = grouped.abs().amax(2, keepdim=True)
    codes = torch.where(most < 1e-30, 0.0, (grouped * (127 / most)).round())
    return (codes.double() * (most / 127).double()).flatten(1)[:, : x.shape[1]]


def unpack(arrays: dict[str, Array], kind: str, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """The weights [N, K] by the formulas of kernels.h, in float64, and for each the sum of the magnitudes of its terms."""
    parts = {name: as_tensor(array) for name, array in arrays.items()}
    codes = parts["codes"]
    if kind == "fp32":
        return codes.double(), codes.double().abs()
    n, k = torch.meshgrid(torch.arange(n_out), torch.arange(n_in), indexing="ij")
    block, row, group, column = n // 16, n % 16, k // 32, k % 32
    if kind == "bf16":
        halves = codes.view(torch.bfloat16)
        weight = halves[block, group, 32 * (column // 2) + 2 * row + column % 2].double()
        return weight, weight.abs()
    if kind == "int8":
        whole = codes[block, group, 64 * (column // 4) + 4 * row + column % 4].double() - 128
        weight = whole * parts["base"].double()[n]
        return weight, weight.abs()
    both = codes[block, group, 64 * (column % 16 // 4) + 4 * row + column % 4].int()
    whole = torch.where(column < 16, both & 15, both >> 4).double() - 8
    wide = parts["scales"].shape[-1] == 64
    scales = parts["scales"].view(torch.bfloat16) if wide else parts["scales"]
    scale = scales[block, group, row].double() * parts["base"].double()[block, 0]
    signed = scales if wide else scales.view(torch.int8)
    zero = signed[block, group, 16 + row].double() * parts["base"].double()[block, 1]
    return whole * scale + zero, (whole * scale).abs() + zero.abs()


def activations(rows: int, n_in: int) -> Tensor:
    """Rows of several kinds: normal, with an outlier, small, denormal, zero."""
    x = torch.randn(rows, n_in)
    x[1::5, 0] = 1e6
    x[2::5] *= 1e-25
    x[3::5] *= 1e-39
    x[4::5] = 0
    return x


@dataclass(frozen=True)
class Case:
    """A product of awkward sizes.

    Attributes:
        kind: One of `PACKED`.
        parts: Packed weights [N, K] with a bias.
        x: [rows, K].
    """

    kind: str
    parts: dict[str, Array]
    n_out: int
    x: Tensor

    def assert_close(self, y: Tensor) -> None:
        """y [rows, N] is the float64 product of the same rounded numbers, but for sums in float32."""
        n_in, bias = self.x.shape[1], as_tensor(self.parts["bias"])
        w, sizes = unpack(self.parts, self.kind, n_in, self.n_out)
        near = round_activations(self.x, self.kind)
        # in any order such sums are off by at most 2^-24 of the sum of magnitudes for each addition
        steps = n_in if self.kind in ("bf16", "fp32") else n_in / 32
        limit = (steps + 8) * 2**-23 * (near.abs() @ sizes.T + bias.abs()) + n_in * 2**-120
        off = (y.double() - (near @ w.T + bias)).abs()
        assert bool((off <= limit).all()), (self.kind, self.n_out, self.x.shape, float((off / limit).max()))


def cases(kind: str) -> Iterator[Case]:
    torch.manual_seed(0)
    for n_out, n_in in SHAPES:
        for wide in (False, True) if kind == "int4" else (False,):
            tensors = {**portable(kind, torch.randn(n_out, n_in) + 0.1), "bias": as_array(torch.randn(n_out))}
            if wide:
                # negative scales, which unsigned 8-bit scales cannot represent
                tensors["scale"] = to_bfloat16(-as_float32(tensors["scale"]))
            parts = pack(kind, tensors, n_in, 32)
            assert kind != "int4" or n_in == 1 or (parts["scales"].shape[-1] == 64) == wide
            for rows in (1, 2, 3, 5, 8, 11, MANY):
                yield Case(kind, parts, n_out, activations(rows, n_in))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", PACKED)
def test_products_equal_those_in_float64(kind: str, instructions: str) -> None:
    run = kernels_of(instructions)
    for case in cases(kind):
        case.assert_close(product(run, case.parts, kind, case.x, case.n_out))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", PACKED)
def test_a_row_does_not_depend_on_other_rows_or_on_threads(kind: str, instructions: str) -> None:
    run = kernels_of(instructions)
    n_out, n_in = 517, 100
    parts = pack(kind, portable(kind, torch.randn(n_out, n_in)), n_in, 32)
    x = activations(MANY, n_in)
    whole = product(run, parts, kind, x, n_out)
    for threads in (2, 3):
        for _ in range(5):
            assert torch.equal(product(run, parts, kind, x, n_out, threads), whole)
    for first, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (28, MANY)):
        assert torch.equal(product(run, parts, kind, x[first:end], n_out, 2), whole[first:end])


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_affect_only_their_row(instructions: str, bad: float) -> None:
    run = kernels_of(instructions)
    for kind in PACKED:
        parts = pack(kind, portable(kind, torch.randn(40, 70)), 70, 32)
        x = torch.randn(3, 70)
        clean = product(run, parts, kind, x, 40)
        x[1, 69] = bad
        y = product(run, parts, kind, x, 40)
        assert torch.equal(y[::2], clean[::2])
        assert not y[1].isfinite().any() if kind in ("bf16", "fp32") else y[1].isnan().all()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_all_instruction_sets_round_activations_alike(kind: str) -> None:
    # one weight of 1 in each row: y is the rounded activation, to the last bit
    weight = torch.eye(64)
    x = torch.cat([torch.randn(20, 64), torch.arange(-64.0, 64.0).view(2, 64) + 0.5, torch.full((1, 64), 1e-30)])
    tensors = portable(kind, weight)
    if kind == "int4":
        tensors["scale"], tensors["zero"] = to_bfloat16(np.ones((64, 2), np.float32)), np.zeros((64, 2), np.uint16)
        codes = as_array(weight.to(torch.uint8) + 8)
        tensors["packed"] = codes[:, ::2] | codes[:, 1::2] << 4
    parts = pack(kind, tensors, 64, 32)
    found = [product(kernels_of(name), parts, kind, x, 64) for name in SETS if library._opened().fedtune_supports(SETS.index(name))]
    assert len(found) > 1 and all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0].double(), round_activations(x, kind), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_reads_four_and_a_half_bits_and_keeps_the_weights(group: int) -> None:
    weight = torch.randn(64, 384) * torch.linspace(0.3, 3, 64)[:, None] / 100
    weight[5] = 0  # the package gives it scales of 1, which would be the block's base
    tensors = portable("int4", weight, group=group)
    parts = pack("int4", tensors, 384, group)
    assert 8 * (parts["codes"].nbytes + parts["scales"].nbytes) == 4.5 * weight.numel() and parts["base"].nbytes == 8 * 64 / 16
    before, (after, _) = torch.from_numpy(dequantized("int4", tensors, n_in=384, group=group)).double(), unpack(parts, "int4", 384, 64)
    # 8-bit scales add this to the squared error of rounding to 4 bits
    assert float((after - before).square().sum()) < 0.01 * float((before - weight).square().sum())
    assert not after[5].any()


def test_scales_that_do_not_fit_8_bits_stay_exact() -> None:
    weight = torch.randn(20, 96)
    weight[3, :32] = 5 + weight[3, :32] / 1000  # 8 bits of its zero, 5, would be coarser than its steps
    for sign in (1, -1):
        tensors = portable("int4", weight)
        tensors["scale"] = to_bfloat16(as_float32(tensors["scale"]) * sign)
        parts = pack("int4", tensors, 96, 32)
        assert parts["scales"].shape[-1] == 64
        exact = torch.from_numpy(dequantized("int4", tensors, n_in=96)).double()
        torch.testing.assert_close(unpack(parts, "int4", 96, 20)[0], exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_int8_and_bf16_are_packed_without_a_change(kind: str) -> None:
    tensors = portable(kind, torch.randn(37, 45))
    found, _ = unpack(pack(kind, tensors, 45, 32), kind, 45, 37)
    exact = {name: as_tensor(array).double() for name, array in tensors.items()}
    assert torch.equal(found, exact["packed"] * exact["scale"][:, None] if kind == "int8" else exact["weight"])


Change = Callable[[library.Weights], None]


def put(name: str, value: int) -> Change:
    return lambda weights: setattr(weights, name, value)


@pytest.mark.parametrize(
    "change",
    [
        put("n_in", 0), put("n_in", -32), put("n_in", 97), put("n_in", 1 << 40), put("n_out", 0),
        put("n_out", 1 << 62), put("n_out", (1 << 63) - 1), put("kind", 4), put("kind", -1), put("codes", 0),
        put("scales", 0), put("base", 0), put("codes_bytes", 767), put("scales_bytes", 96 + 1), put("base_bytes", 4),
        put("bias_bytes", 4), put("bias", 64),
    ],
)  # fmt: skip
def test_sizes_that_do_not_match_are_refused(change: Change) -> None:
    run = kernels_of("portable")
    parts = pack("int4", portable("int4", torch.randn(16, 96)), 96, 32)
    x, y = torch.randn(2, 96), torch.zeros(2, 16)
    weights = weights_of(parts, "int4", 96, 16)
    run.multiply(weights, 1, 2, (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes))
    change(weights)
    with pytest.raises(ModelError, match="export the model again"):
        run.multiply(weights, 1, 2, (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes))


def test_sizes_of_activations_that_do_not_match_are_refused() -> None:
    run = kernels_of("portable")
    parts = pack("int8", portable("int8", torch.randn(16, 96)), 96, 32)
    x, y = torch.randn(2, 96), torch.zeros(2, 16)
    weights = weights_of(parts, "int8", 96, 16)
    for rows, x_bytes, y_bytes in (
        (0, 0, 0),
        (-1, x.nbytes, y.nbytes),
        (3, x.nbytes, y.nbytes),
        (2, x.nbytes, 4),
        (1 << 62, x.nbytes, y.nbytes),
    ):
        with pytest.raises(ModelError, match="parts of other sizes"):
            run.multiply(weights, 1, rows, (x.data_ptr(), x_bytes), (y.data_ptr(), y_bytes))
