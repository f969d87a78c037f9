"""What a device chooses so that a turn fits its memory and the deadline: a pure function of profile, shapes and plan.

The plan's work is kept as far as it goes. Given up is, in this order,

    for memory     micro-batch (halved; the step's rows stay the same), precision (a step down at a time), length (halved)
    for the time   steps, then batch (halved)

Rank comes first, by bandwidth and memory, and stays: one that changed from round to round would throw away what was learned.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.clients.devices.estimate import STATE, Shapes, flops, memory_bytes, seconds
from fedtune.config import DeviceClass
from fedtune.errors import Decline

SHORTEST = 16  # tokens: below that a row says too little
ROOM, HASTE = 0.9, 0.75  # shares of memory and deadline that an estimate may fill: it is one
_SHARE = 0.25  # of memory and deadline that the adapter may take


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a plan asks of this client.

    Args:
        batch: Rows of a batch; `accumulate` of them make a step.
        accumulate: See there.
        steps: Optimizer steps.
        length: Longest row that the task allows, in tokens.
        longest: The client's longest row; in a private turn `length`.
        counted: The most tokens of a row that have a loss; in a private turn the most that `length` allows.
        entries: Entries of the adapter that is trained.
        nbytes: Bytes that are received and sent.
    """

    batch: int
    accumulate: int = 1
    steps: int
    length: int
    longest: int
    counted: int
    entries: int
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Measured / estimated, of what memory holds beside the weights and of time."""

    memory: float = 1.0
    time: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the device does, and what it expects of it.

    Args:
        precision: Of the frozen backbone.
        rank: LoRA rank; 0 where the method has none.
        batch: Rows of a batch.
        micro: Rows that go through the model at once.
        length: Longest row, in tokens.
        steps: Optimizer steps.
        memory_mb: Estimated, correction included.
        seconds: Estimated, correction included.
    """

    precision: str
    rank: int
    batch: int
    micro: int
    length: int
    steps: int
    memory_mb: float
    seconds: float


def choose_rank(device: DeviceClass, shapes: Shapes, deadline_s: float | None) -> int:
    """The largest of the config's rank, its half, … that is at most the profile's, travels both ways in a quarter of the deadline, and
    takes no more than a quarter of the memory with its gradient and moments; at least 1, and 0 for a method without ranks."""
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
    work: Work,
    *,
    rank: int,
    precisions: Sequence[str],
    correction: Correction = Correction(),  # noqa: B008  frozen
    deadline_s: float | None = None,
) -> Choice:
    """The device's choice.

    Args:
        device: The profile.
        shapes: Of the model and its adapter.
        work: What the plan asks.
        rank: Of the adapter.
        precisions: What the machine and the model can do, finest first.
        correction: What the last turns have taught.
        deadline_s: Seconds that a turn may take; None waits.

    Raises:
        Decline: Nothing fits; says what is wanting.
    """
    precision, length, micro, memory = _for_memory(device, shapes, work, precisions, correction)
    width = min(length, work.longest)
    batch, steps, took = _for_time(device, shapes, work, width, correction, deadline_s)
    return Choice(
        precision=precision,
        rank=rank,
        batch=batch,
        micro=min(micro, batch),
        length=length,
        steps=steps,
        memory_mb=memory,
        seconds=took,
    )


def estimated_mb(shapes: Shapes, work: Work, precision: str, micro: int, width: int, correction: Correction) -> float:
    """Weights, and what the correction has taught of the rest."""
    weights, rest = memory_bytes(shapes, precision, work.entries, micro, width, min(work.counted, width))
    return (weights + correction.memory * rest) / 1e6


def estimated_s(device: DeviceClass, shapes: Shapes, tokens: float, nbytes: int, correction: Correction) -> float:
    return correction.time * seconds(device, flops(shapes, tokens), nbytes)


def told(device: DeviceClass, choice: Choice) -> str:
    """One line for a person: what was found, and what was chosen."""
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
    device: DeviceClass, shapes: Shapes, work: Work, precisions: Sequence[str], correction: Correction
) -> tuple[str, int, int, float]:
    """Precision, length, micro-batch and MB."""
    length, least = work.length, math.inf
    while True:
        width = min(length, work.longest)
        for precision in precisions:
            micro = work.batch
            while True:
                least = estimated_mb(shapes, work, precision, micro, width, correction)
                if device.memory_mb is None or least <= ROOM * device.memory_mb:
                    return precision, length, micro, least
                if micro == 1:
                    break
                micro //= 2
        if length // 2 < SHORTEST:
            break
        length //= 2
    raise Decline(
        "memory",
        f"one row of {width} tokens in {precisions[-1]} takes {least:,.1f} MB, the device has {device.memory_mb:g} MB: it needs more"
        " memory, a smaller backbone or a smaller adapter",
    )


def _for_time(
    device: DeviceClass, shapes: Shapes, work: Work, width: int, correction: Correction, deadline_s: float | None
) -> tuple[int, int, float]:
    """Batch, steps and seconds."""
    batch = work.batch

    def took(batch: int, steps: int) -> float:
        return estimated_s(device, shapes, steps * batch * work.accumulate * width, work.nbytes, correction)

    if deadline_s is None:
        return batch, work.steps, took(batch, work.steps)
    most = HASTE * deadline_s
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
        f" network, the deadline is {deadline_s:g} s: it needs a faster device, a faster network or a later deadline",
    )
