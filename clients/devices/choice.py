"""A device's choice: the settings that fit a turn to its memory and the deadline, as a pure function of profile, shapes and plan.

The choice keeps as much of the plan's work as possible. It reduces, in this order,

    for memory     micro-batch (halved; the rows of a step stay the same) and layers that keep intermediate tensors (in a lean step; the
                   others compute them again), precision (one level at a time), length (halved)
    for time       steps, then batch (halved)

Of the micro-batches that fit, each with as many kept layers as fit, it takes the fastest. A pass over n tokens takes time in proportion to
n + 64, because it also reads (and dequantizes) the weights. It takes up to a quarter more if layers compute tensors again. Measured on one
core with 20 M and 125 M parameters in float32, bf16 and nf4, n = 32 to 1,024.

The rank is chosen first, by bandwidth and memory, and does not change between rounds, because a smaller rank would lose trained components.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.clients.devices.estimate import STATE, Shapes, flops, memory_bytes, seconds
from fedtune.config import DeviceClass
from fedtune.errors import Decline

MIN_LENGTH = 16  # tokens; shorter rows contain too little text for training
MEMORY_MARGIN, TIME_MARGIN = 0.9, 0.75  # an estimate may use at most this share of memory and deadline, because it is only an estimate
PASS_TOKENS = 64  # a pass over the weights takes as long as this many tokens
_SHARE = 0.25  # maximum share of memory and deadline for the adapter


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A plan's work for this client.

    Args:
        batch: Rows per batch.
        accumulate: Batches per step.
        steps: Optimizer steps.
        length: Maximum row length of the task, in tokens.
        longest: Length of the client's longest row; `length` in a private turn.
        counted: Largest number of target tokens of a row; in a private turn, the most that `length` allows.
        entries: Trained entries of the adapter.
        nbytes: Bytes received and sent.
        passes: Gradients that a step of the plan's turn computes, such as 2 if it also trains a personal adapter.
    """

    batch: int
    accumulate: int = 1
    steps: int
    length: int
    longest: int
    counted: int
    entries: int
    nbytes: int = 0
    passes: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Measured divided by estimated: the memory excluding the weights, and the time."""

    memory: float = 1.0
    time: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A device's settings for a turn, and their estimated cost.

    Args:
        precision: Precision of the frozen backbone.
        rank: LoRA rank; 0 for a method without ranks.
        batch: Rows per batch.
        micro: Rows per micro-batch.
        length: Maximum row length, in tokens.
        steps: Optimizer steps.
        memory_mb: Estimated memory, with the correction.
        seconds: Estimated time, with the correction.
        kept_layers: Layers that keep intermediate tensors for the backward pass of a lean step; None: all, or the step is not lean.
    """

    precision: str
    rank: int
    batch: int
    micro: int
    length: int
    steps: int
    memory_mb: float
    seconds: float
    kept_layers: int | None = None


def choose_rank(device: DeviceClass, shapes: Shapes, deadline_s: float | None) -> int:
    """The config's rank, halved until three limits hold: it is at most the profile's rank; sending the adapter both ways takes at most a
    quarter of the deadline; adapter, gradient and moments take at most a quarter of the memory. At least 1; 0 for a method without ranks.
    """
    rank = shapes.rank
    while rank > 1:
        entries = shapes.adapter(rank)
        slow = deadline_s is not None and seconds(device, 0.0, 2 * 4 * entries) > _SHARE * deadline_s
        large = device.memory_mb is not None and STATE * entries > _SHARE * device.memory_mb * 1e6
        if not slow and not large and rank <= (device.rank or rank):
            break
        rank //= 2
    return rank


def choose(
    device: DeviceClass,
    shapes: Shapes,
    work: Workload,
    *,
    rank: int,
    precisions: Sequence[str],
    correction: Correction = Correction(),  # noqa: B008  frozen
    deadline_s: float | None = None,
) -> Choice:
    """The device's choice.

    Args:
        device: The profile.
        shapes: Shapes of the model and its adapter.
        work: The plan's work.
        rank: Rank of the adapter.
        precisions: Precisions that machine and model support, highest first.
        correction: Corrections learned from earlier turns.
        deadline_s: Seconds for a turn; None sets no deadline.

    Raises:
        Decline: No choice fits; the message says what is missing.
    """
    precision, length, micro, kept, memory = _for_memory(device, shapes, work, precisions, correction)
    width = min(length, work.longest)
    batch, steps, took = _for_time(device, shapes, work, width, correction, deadline_s)
    return Choice(
        precision=precision,
        rank=rank,
        batch=batch,
        micro=min(micro, batch),
        kept_layers=None if kept == shapes.layers else kept,
        length=length,
        steps=steps,
        memory_mb=memory,
        seconds=took,
    )


def estimated_mb(shapes: Shapes, work: Workload, precision: str, micro: int, width: int, correction: Correction, kept: int) -> float:
    """MB of the weights plus the corrected MB of all other memory, with this many kept layers."""
    weights, rest = memory_bytes(shapes, precision, work.entries, micro, width, min(work.counted, width), kept)
    return (weights + correction.memory * rest) / 1e6


def estimated_s(device: DeviceClass, shapes: Shapes, tokens: float, nbytes: int, correction: Correction) -> float:
    return correction.time * seconds(device, flops(shapes, tokens), nbytes)


def describe(device: DeviceClass, choice: Choice) -> str:
    """One line for the operator: the device's profile and its choice."""
    cores = f"{device.cores} core{'s' if device.cores > 1 else ''}"
    fast = device.accelerator_gflops if device.accelerator != "none" else device.cores * device.gflops_per_core
    found = [device.accelerator if device.accelerator != "none" else cores]
    found += [f"{fast:,.3g} GFLOP/s"] if fast else []
    found += [f"{device.memory_mb:,.0f} MB free"] if device.memory_mb is not None else []
    rank = f"rank {choice.rank}, " if choice.rank else ""
    what = f"{choice.precision}, {rank}{choice.batch} rows of at most {choice.length} tokens in micro-batches of {choice.micro}"
    cost = f"about {choice.memory_mb:,.0f} MB" + (f" and {choice.seconds:,.1f} s a turn" if choice.seconds else "")
    return f"{', '.join(found)}: {what}, {choice.steps} steps a round; {cost}"


def _for_memory(
    device: DeviceClass, shapes: Shapes, work: Workload, precisions: Sequence[str], correction: Correction
) -> tuple[str, int, int, int, float]:
    """Precision, length, micro-batch, kept layers and MB."""
    length, least = work.length, math.inf
    while True:
        width = min(length, work.longest)
        for precision in precisions:
            tried = [
                _most_kept(device, shapes, work, precision, work.batch >> i, width, correction) for i in range(work.batch.bit_length())
            ]
            if fitting := [t for t in tried if _fits(device, t[-1])]:
                return precision, length, *min(fitting, key=lambda t: _time(shapes, *t[:2], width))
            least = tried[-1][-1]
        if length // 2 < MIN_LENGTH:
            break
        length //= 2
    raise Decline(
        "memory",
        f"one row of {width} tokens in {precisions[-1]} takes {least:,.1f} MB, but the device has {device.memory_mb:g} MB: it needs more"
        " memory, a smaller backbone or a smaller adapter",
    )


def _fits(device: DeviceClass, memory_mb: float) -> bool:
    return device.memory_mb is None or memory_mb <= MEMORY_MARGIN * device.memory_mb


def _most_kept(
    device: DeviceClass, shapes: Shapes, work: Workload, precision: str, micro: int, width: int, correction: Correction
) -> tuple[int, int, float]:
    """The micro-batch, the most kept layers that fit (or the fewest possible), and MB."""
    kept = shapes.layers
    while True:
        memory = estimated_mb(shapes, work, precision, micro, width, correction, kept)
        if _fits(device, memory) or not kept or precision not in shapes.lean or shapes.checkpointing:
            return micro, kept, memory
        kept -= 1


def _time(shapes: Shapes, micro: int, kept: int, width: int) -> float:
    """Relative time of a step."""
    return (1 + PASS_TOKENS / (micro * width)) * (1.25 - 0.25 * kept / max(shapes.layers, 1))


def _for_time(
    device: DeviceClass, shapes: Shapes, work: Workload, width: int, correction: Correction, deadline_s: float | None
) -> tuple[int, int, float]:
    """Batch, steps and seconds."""
    batch = work.batch

    def took(batch: int, steps: int) -> float:
        return estimated_s(device, shapes, work.passes * steps * batch * work.accumulate * width, work.nbytes, correction)

    if deadline_s is None:
        return batch, work.steps, took(batch, work.steps)
    most = TIME_MARGIN * deadline_s
    while True:
        network = took(batch, 0)
        if network > most:
            break
        step = took(batch, 1) - network
        steps = work.steps if step <= 0 else math.floor(min(work.steps, (most - network) / step + 1e-9))
        if steps >= 1:
            return batch, steps, took(batch, steps)
        if batch == 1:
            break
        batch //= 2
    raise Decline(
        "deadline",
        f"one step of {batch * work.accumulate} row{'s' if batch * work.accumulate > 1 else ''} takes {took(batch, 1):,.1f} s with the"
        f" network, but the deadline is {deadline_s:g} s: it needs a faster device, a faster network or a later deadline",
    )
