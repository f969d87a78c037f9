"""The choice of a device, checked by hand arithmetic.

The model has 100 linear layers of 100 × 100, 10⁶ entries, and layers that store only 2 kB a token: a row of 100 tokens takes 0.2 MB.
The adapter has 12,500 entries: 0.2 MB with gradient and moments. Estimates may fill 0.9 of the memory and 0.75 of the deadline.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.clients.devices import Choice, Correction, Shapes, Workload, choose, choose_rank, describe
from fedtune.clients.devices.choice import MEMORY_MARGIN, MIN_LENGTH, TIME_MARGIN
from fedtune.clients.devices.estimate import dequantized_bytes, flops, memory_bytes, seconds, weights_bytes
from fedtune.config import DeviceClass
from fedtune.errors import Decline

LADDER = ["fp32", "bf16", "int8", "nf4"]
DTYPES = {"fp32": torch.float32, **dict.fromkeys(LADDER[1:], torch.bfloat16)}
SHAPES = Shapes(
    linear={str(i): (100, 100) for i in range(100)},
    layers=0,
    hidden=250,
    inner=0,
    attention_heads=0,
    query=0,
    logits=0,
    entries=12_500,
    per_rank=1_000,
    rank=8,
    compute=DTYPES,
)
WORK = Workload(batch=16, steps=12, length=100, longest=100, counted=10, entries=12_500)


def pick(device: DeviceClass, work: Workload = WORK, **changes: Any) -> Choice:
    return choose(device, SHAPES, work, **{"rank": 8, "precisions": LADDER, **changes})


def test_the_bytes_of_the_weights_by_hand() -> None:
    assert weights_bytes(SHAPES, "fp32") == 4_000_000 and weights_bytes(SHAPES, "bf16") == 2_000_000
    # a byte an entry, 4 bytes a row
    assert weights_bytes(SHAPES, "int8") == 1_000_000 + 100 * 100 * 4
    # of each layer: 10⁴/2, ⌈10⁴/64⌉ = 157 scales, one scale of those, tables of 16 and 256 numbers
    assert weights_bytes(SHAPES, "nf4") == 100 * (5000 + 157 + 4 + 1088)
    assert dequantized_bytes(SHAPES, "nf4") == 20_000 and dequantized_bytes(SHAPES, "bf16") == 0
    some = dataclasses.replace(SHAPES, rest=1000, heads=10, whole=frozenset({"0"}))
    assert weights_bytes(some, "nf4") == 99 * 6249 + 20_000 + 2000 + 40


def test_the_bytes_of_a_layer_s_activations_by_hand() -> None:
    one = dataclasses.replace(
        SHAPES, layers=1, hidden=8, inner=24, attention_heads=2, query=8, logits=100, inputs=8, modules=1, rank=3, linear={"q": (8, 8)}
    )
    # float32, 2 rows of 5 tokens, 3 counted: norms 2·4·8, attention 4·(4·8), feed-forward 4·24·3, A's input 4·8, A's output 4·3 a token
    layer = 64 + 128 + 288 + 32 + 12
    logits = 2 * 3 * 100 * 4
    assert memory_bytes(one, "fp32", 0, 2, 5, 3)[1] == 10 * layer + 10 * 32 + logits + logits
    # bf16: halves of attention, feed-forward and the factors' inputs, and attention's probabilities: 2 heads · 5 tokens · (4 + 2)
    layer = 64 + 64 + 144 + 16 + 6 + 60
    assert memory_bytes(one, "bf16", 0, 2, 5, 3)[1] == 10 * layer + 10 * 32 + logits + logits
    # checkpointing keeps the layers' inputs, and one layer while it is computed again
    assert memory_bytes(dataclasses.replace(one, checkpointing=True), "fp32", 0, 2, 5, 3)[1] == 10 * (32 + 524) + 320 + 2 * logits


def test_the_bytes_of_a_lean_step_by_hand() -> None:
    one = dataclasses.replace(
        SHAPES,
        layers=2,
        hidden=8,
        inner=24,
        attention_heads=2,
        query=8,
        keys=4,
        logits=100,
        linear={"q": (8, 8), "up": (24, 8)},
        lean=frozenset(LADDER),
    )

    def rest(precision: str, kept: int | None, **changes: Any) -> int:
        return memory_bytes(dataclasses.replace(one, **changes), precision, 0, 2, 5, 3, kept)[1]

    # 10 tokens: the inputs of two layers and of the last norm; of each kept layer x2, q and the input of o, k and v, gate and up
    inside = 10 * (8 + 2 * 8 + 2 * 4 + 2 * 24)
    # the loss: two gradients of 6 targets, their logits, a copy of the head's weight
    loss = 2 * 6 * 8 + 6 * 100 + 100 * 8
    for width, precision in ((4, "fp32"), (2, "bf16")):
        stored = width * 10 * 3 * 8 + 4 * 10 * 8
        assert rest(precision, None) == rest(precision, 2) == stored + width * (2 * inside + loss)
        assert rest(precision, 1) == stored + width * (inside + loss)
        # with a small vocabulary, a layer's backward pass takes more than the loss: three tensors of the MLP and four of the hidden size, a
        # copy of `up`, and without kept layers the tensors that the layer computes again
        layer = 10 * (3 * 24 + 4 * 8) + 24 * 8
        assert rest(precision, 1, logits=2) == stored + width * (inside + layer)
        assert rest(precision, 0, logits=2) == rest(precision, 2, logits=2, checkpointing=True) == stored + width * (inside + layer)
    # the scores of attention, four tensors of 2 rows, 2 heads, 5 × 5
    wide = 10 * (3 * 8 + 4 * 4 + 2 * 8) + 4 * 2 * 2 * 25
    assert rest("fp32", 1, logits=2, inner=2, linear={}) == 4 * (10 * 3 * 8 + 10 * 8 + 10 * (8 + 16 + 8 + 4) + wide)


LEAN = dataclasses.replace(SHAPES, layers=4, hidden=50, inner=200, query=50, keys=50, lean=frozenset(LADDER))


@pytest.mark.parametrize(
    ("memory_mb", "micro", "kept"),
    # 4.24 MB, and for a row of 100 tokens 0.44 and 0.26 a kept layer; 0.9 of the memory counts
    [
        (31.1, 16, None),  # 4.24 + 16·(0.44 + 4·0.26) = 27.92 ≤ 27.99
        (30.0, 8, None),  # rather than 16 rows and 3 layers, which take 23.76: (1 + 64/800) < (1 + 64/1600)·(1 + 1/16)
        (16.0, 8, 3),  # 4.24 + 8·(0.44 + 3·0.26) = 14.0 ≤ 14.4 < 16.08: (1 + 64/800)·(1 + 1/16) < (1 + 64/400)
        (14.0, 4, None),  # rather than 8 rows and 2 layers, which take 11.92: (1 + 64/400) < (1 + 64/800)·(1 + 2/16)
        (10.0, 4, 2),  # 8.08 ≤ 9 < 9.12: (1 + 64/400)·(1 + 2/16) < (1 + 64/200)
        (5.2, 1, 1),  # 4.59 ≤ 4.68 < 4.85
    ],
)
def test_little_memory_gives_fewer_kept_layers_or_smaller_micro_batches(memory_mb: float, micro: int, kept: int | None) -> None:
    choice = choose(DeviceClass(memory_mb=memory_mb), LEAN, WORK, rank=8, precisions=["fp32"])
    assert (choice.micro, choice.kept_layers) == (micro, kept)
    # with checkpointing no layer keeps anything, so a smaller micro-batch is the only way
    shapes = dataclasses.replace(LEAN, checkpointing=True)
    assert choose(DeviceClass(memory_mb=memory_mb), shapes, WORK, rank=8, precisions=["fp32"]).kept_layers is None


def test_the_operations_and_bytes_of_a_step_by_hand() -> None:
    # 4 operations an entry and token; with checkpointing 2 more, for the second forward pass
    assert flops(SHAPES, 100) == 4e8 and flops(dataclasses.replace(SHAPES, checkpointing=True), 100) == 6e8
    assert seconds(DeviceClass(gflops_per_core=0.2, mbit_per_second=4.0), 4e8, 1e6) == pytest.approx(2.0 + 2.0)


@pytest.mark.parametrize(
    ("memory_mb", "precision", "length", "micro"),
    [
        (None, "fp32", 100, 16),
        (8.5, "fp32", 100, 16),  # 4 + 0.2 + 16·0.2 = 7.4 ≤ 7.65
        (8.0, "fp32", 100, 8),  # 7.4 > 7.2; 8 rows: 5.8
        (5.0, "fp32", 100, 1),  # 4.4 ≤ 4.5
        (4.8, "bf16", 100, 8),  # 4.4 > 4.32; 2 + 0.2 + 8·0.2 = 3.8
        (2.6, "int8", 100, 4),  # 2.4 > 2.34; 1.04 + 0.02 + 0.2 + 4·0.2 = 2.06
        (1.2, "nf4", 100, 1),  # 1.46 > 1.08; 0.6249 + 0.02 + 0.2 + 0.2 = 1.0449
        (1.1, "nf4", 50, 1),  # 1.0449 > 0.99; half a row: 0.9449
        (1.0, "nf4", 25, 1),  # 0.9449 > 0.9; a quarter: 0.8949
    ],
)
def test_a_memory_limit_reduces_precision_length_or_micro_batch(memory_mb: float | None, precision: str, length: int, micro: int) -> None:
    choice = pick(DeviceClass(memory_mb=memory_mb))
    assert (choice.precision, choice.length, choice.micro, choice.batch, choice.steps) == (precision, length, micro, 16, 12)


def test_no_length_below_the_shortest_is_chosen() -> None:
    work = dataclasses.replace(WORK, length=2 * MIN_LENGTH, longest=2 * MIN_LENGTH)
    # nf4 without a row takes 0.8449 MB; a row of 32 tokens 0.064, of 16 0.032, of 8 0.016
    assert pick(DeviceClass(memory_mb=0.99), work).length == MIN_LENGTH  # 0.9089 > 0.891 ≥ 0.8769
    with pytest.raises(Decline, match=f"one row of {MIN_LENGTH} tokens in nf4"):
        pick(DeviceClass(memory_mb=0.96), work)  # 0.8769 > 0.864, which 8 tokens would fit


def test_a_row_that_does_not_fit_is_declined_with_a_reason() -> None:
    with pytest.raises(Decline, match=r"^one row of 25 tokens in nf4 takes 0.9 MB, but the device has 0.9 MB: it needs more memory") as bad:
        pick(DeviceClass(memory_mb=0.9))
    assert bad.value.kind == "memory"
    with pytest.raises(Decline, match="one row of 25 tokens in bf16 takes"):  # a precision that the machine lacks is not tried
        pick(DeviceClass(memory_mb=1.2), precisions=["fp32", "bf16"])


@pytest.mark.parametrize(
    ("deadline_s", "batch", "steps"),
    [
        (None, 16, 12),
        (103.0, 16, 12),  # a step: 16·100·4·10⁶ = 6.4 s; 12 take 76.8 of 77.25
        (40.0, 16, 4),  # ⌊30 / 6.4⌋
        (8.0, 8, 1),  # 6.4 > 6; 8 rows: 3.2
        (1.0, 1, 1),  # 0.4 ≤ 0.75 < 0.8
    ],
)
def test_a_deadline_reduces_batch_or_steps(deadline_s: float | None, batch: int, steps: int) -> None:
    choice = pick(DeviceClass(gflops_per_core=1.0), deadline_s=deadline_s)
    assert (choice.batch, choice.steps, choice.micro, choice.precision, choice.length) == (batch, steps, batch, "fp32", 100)
    assert choice.seconds == pytest.approx(0.4 * batch * steps)


def test_rows_of_half_the_length_take_half_the_time() -> None:
    choice = pick(DeviceClass(gflops_per_core=1.0), dataclasses.replace(WORK, longest=50))
    assert (choice.length, choice.seconds) == (100, pytest.approx(0.2 * 16 * 12))


def test_a_step_beyond_the_deadline_is_declined_with_a_reason() -> None:
    with pytest.raises(
        Decline, match=r"^one step of 1 row takes 0.4 s with the network, but the deadline is 0.2 s: it needs a faster dev"
    ) as bad:
        pick(DeviceClass(gflops_per_core=1.0), deadline_s=0.2)
    assert bad.value.kind == "deadline"
    with pytest.raises(Decline, match=r"takes 1.0 s with the network"):  # 1 MB at 8 Mbit/s
        pick(DeviceClass(mbit_per_second=8.0), dataclasses.replace(WORK, nbytes=1_000_000), deadline_s=1.0)


def test_the_clients_own_rows_decide_not_the_longest_allowed_row() -> None:
    # rows of 30 tokens: 60 kB; 4 + 0.2 + 4·0.06 = 4.44 ≤ 4.5, where rows of 100 allow one
    choice = pick(DeviceClass(memory_mb=5.0), dataclasses.replace(WORK, longest=30))
    assert (choice.precision, choice.micro, choice.length) == ("fp32", 4, 100)


def test_a_correction_changes_the_choice() -> None:
    # everything but the weights is doubled: 4 + 0.4 + 8·0.4 = 7.6 > 7.2; 4 rows: 6
    assert pick(DeviceClass(memory_mb=8.0), correction=Correction(memory=2.0)).micro == 4
    assert pick(DeviceClass(gflops_per_core=1.0), deadline_s=40.0, correction=Correction(time=2.0)).steps == 2  # ⌊30 / 12.8⌋


@pytest.mark.parametrize(
    ("device", "deadline_s", "rank"),
    [
        (DeviceClass(), 1.0, 8),
        (DeviceClass(mbit_per_second=2.2), 1.0, 4),  # 12,500 entries, 4 bytes, both ways: 0.36 s > 0.25; 8,500: 0.247
        (DeviceClass(memory_mb=0.8), None, 8),  # 16·12,500 = 0.2 MB
        (DeviceClass(memory_mb=0.7), None, 4),  # 0.2 > 0.175; 16·8,500 = 0.136
        (DeviceClass(memory_mb=0.01), None, 1),
        (DeviceClass(rank=3), None, 2),
    ],
)
def test_the_choice_of_the_rank(device: DeviceClass, deadline_s: float | None, rank: int) -> None:
    assert choose_rank(device, SHAPES, deadline_s) == rank


def test_a_method_without_ranks_has_none() -> None:
    assert choose_rank(DeviceClass(memory_mb=0.01), dataclasses.replace(SHAPES, rank=0, per_rank=0), None) == 0


def test_the_description_for_the_operator() -> None:
    device = DeviceClass(memory_mb=3200.0, cores=4, gflops_per_core=2.5)
    choice = Choice(precision="nf4", rank=4, batch=16, micro=2, length=64, steps=9, memory_mb=1234.5, seconds=14.2)
    assert describe(device, choice) == (
        "4 cores, 10 GFLOP/s, 3,200 MB free: nf4, rank 4, 16 rows of at most 64 tokens in micro-batches of 2, 9 steps a round;"
        " about 1,234 MB and 14.2 s a turn"
    )


@given(
    st.builds(
        DeviceClass,
        memory_mb=st.none() | st.floats(0.01, 20.0),
        cores=st.integers(1, 8),
        gflops_per_core=st.floats(0.0, 5.0),
        duty=st.floats(0.01, 1.0),
        mbit_per_second=st.floats(0.0, 50.0),
    ),
    st.builds(
        Workload, batch=st.integers(1, 40), accumulate=st.integers(1, 4), steps=st.integers(1, 50), length=st.integers(2, 300),
        longest=st.integers(2, 300), counted=st.integers(1, 300), entries=st.integers(1, 50_000), nbytes=st.integers(0, 10**7),
    ),
    st.builds(Correction, memory=st.floats(0.2, 5.0), time=st.floats(0.2, 5.0)),
    st.none() | st.floats(0.1, 100.0),
)  # fmt: skip
def test_for_every_profile_the_choice_fits_its_estimate_or_declines(
    device: DeviceClass, work: Workload, correction: Correction, deadline_s: float | None
) -> None:
    try:
        choice = pick(device, work, correction=correction, deadline_s=deadline_s)
    except Decline as bad:
        assert bad.kind in ("memory", "deadline")
        return
    width = min(choice.length, work.longest)
    weights, rest = memory_bytes(SHAPES, choice.precision, work.entries, choice.micro, width, min(work.counted, width))
    assert device.memory_mb is None or (weights + correction.memory * rest) / 1e6 <= MEMORY_MARGIN * device.memory_mb * (1 + 1e-9)
    took = correction.time * seconds(device, flops(SHAPES, choice.steps * choice.batch * work.accumulate * width), work.nbytes)
    assert deadline_s is None or took <= TIME_MARGIN * deadline_s * (1 + 1e-6)
    assert 1 <= choice.micro <= choice.batch <= work.batch and 1 <= choice.steps <= work.steps
    assert choice.length == work.length or choice.length >= MIN_LENGTH
