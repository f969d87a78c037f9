"""One client's turn: optimize the trainable tensors of a shared frozen backbone on the client's own rows.

A turn creates only the optimizer: turns share the model, the adapter slot and the encoded rows.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.steps import batches, lr_at, optimizer_of, steps_of
from fedtune.clients.turns import Loss, Turn, Work, turn_of
from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.task import task_of
from fedtune.data import Example, collate
from fedtune.data.examples import pack
from fedtune.errors import Decline, UpdateError
from fedtune.models import LiveAdapter, lean, loss_sum
from fedtune.models.memory import is_out_of_memory
from fedtune.models.sparse import SparseSlot
from fedtune.privacy.noise import source
from fedtune.privacy.turn import TurnPrivacy

if TYPE_CHECKING:
    from fedtune.privacy.dpsgd import PrivateGradient


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Loss and cost of one training turn.

    Args:
        loss: Mean training loss per token (or example) over all steps; None in a private turn, because it could disclose single rows.
        steps: Optimizer steps.
        seconds: Wall time.
        peak_mb: Peak memory of the process or the GPU, in MB.
        start_loss: Mean loss over all rows before the first step; None if the plan does not request it.
        began_mb: Memory in use before training, in MB.
        micro: Rows per micro-batch at the end of the turn.
        kept_layers: Layers that kept intermediate tensors at the end of the turn; None without a limit.
        out_of_memory: Number of out-of-memory errors.
        memory: What the turn's `begin` returned.
        moments: The optimizer's state after the last step, `<tensor>/<part>`; None unless the plan asks to keep it.
    """

    loss: float | None
    steps: int
    seconds: float
    peak_mb: float
    start_loss: float | None = None
    began_mb: float = 0.0
    micro: int = 0
    kept_layers: int | None = None
    out_of_memory: int = 0
    memory: Any = None
    moments: AdapterState | None = None


def train(
    work: Work,
    turn: Turn | None = None,
    *,
    micro: int | None = None,
    kept_layers: int | None = None,
    private: TurnPrivacy | None = None,
    secure_rng: bool = False,
    moments: AdapterState | None = None,
) -> TrainingResult:
    """Train the adapter of `work` in place, according to its plan.

    Args:
        work: The plan, the rows, and the slot with the initial tensors loaded.
        turn: The client side of the method; None uses the plan's turn.
        micro: Largest micro-batch, in rows; None uses the whole batch. On an out-of-memory error, it is halved and the step is repeated.
        kept_layers: Layers that keep intermediate tensors for the backward pass of a lean step; None: all. If a single row runs out of
            memory, none does.
        private: Clipping and noise of DP-SGD: each step's gradient is the noisy sum of clipped gradients of a sample of the rows, and no
            loss is reported.
        secure_rng: Whether noise and samples come from the operating system's generator.
        moments: The optimizer's state of the client's last turn, which this turn continues; None starts with a new state.

    Raises:
        UpdateError: The loss or the gradient is not finite; the message names the step.
        Decline: Not even a single row fits into memory.
    """
    live, examples, plan, task, pad_id = work.live, work.examples, work.plan, work.task, work.pad_id
    turn = turn or turn_of(plan)
    device, start = live.backbone.device, time.perf_counter()
    reset_peak(device)
    began = peak_mb(device)
    names = set(matching(live.parameters, plan.train))
    params = [p for n, p in live.parameters.items() if n in names]
    for name, p in live.parameters.items():
        p.requires_grad_(name in names)
    memory = turn.begin(work)
    optimizer = optimizer_of(plan, params)
    if moments is not None and (moments.spec.method, moments.spec.ranks) != (work.start.spec.method, work.start.spec.ranks):
        moments = None  # of other tensors
    if moments is not None:
        _restore(optimizer, {n: p for n, p in live.parameters.items() if n in names}, moments)
    before = _mean_loss(live, examples, plan, task, pad_id) if "start_loss" in plan.measure else None
    torch.manual_seed(plan.seed)  # dropout draws from the global generator
    stream = batches(len(examples), plan.batch_size, plan.seed)
    steps, total, seen = steps_of(plan, len(examples)), 0.0, 0
    size = min(micro or plan.batch_size, plan.batch_size)
    # train() visits hundreds of modules, which takes milliseconds, so the model stays in training mode between turns. PEFT's wrapper may be
    # in training mode while the model inside is not
    if not (live.model.training and live.backbone.model.training):
        live.model.train()
    stack = contextlib.ExitStack()
    try:
        keep_none = stack.enter_context(lean.keeping(live.model, kept_layers))
        noisy = stack.enter_context(_private(live, examples, plan, task, pad_id, private, secure_rng, size)) if private else None
        rows = _Rows(work, lambda batch: turn.loss(work, memory, batch), size, kept_layers, keep_none)
        if noisy is None:
            work = dataclasses.replace(work, minibatch=rows)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(plan, step, steps)
            if noisy is None:
                rows.take([[examples[i] for i in next(stream)] for _ in range(plan.accumulate)])
                loss, count = turn.gradient(work, memory), rows.targets
            else:
                loss, count = 0.0, 0
                for name, gradient in noisy.step().items():
                    live.parameters[name].grad = gradient
            if not math.isfinite(loss):
                raise UpdateError(f"the training loss became {loss} in step {step + 1} of {steps}: lower client.lr")
            turn.step(work, memory)
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            if not torch.isfinite(norm):
                raise UpdateError(f"the gradient's norm became {norm.item()} in step {step + 1} of {steps}: lower client.lr")
            if plan.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(params, plan.clip_norm, norm)
            optimizer.step()
            optimizer.zero_grad()
            total, seen = total + loss * count, seen + count
    finally:
        stack.close()
        for p in live.parameters.values():
            p.requires_grad_(True)
            p.grad = None
    mean = None if private else total / max(seen, 1)
    return TrainingResult(
        loss=mean,
        steps=steps,
        seconds=time.perf_counter() - start,
        peak_mb=peak_mb(device),
        start_loss=before,
        began_mb=began,
        micro=rows.size if noisy is None else noisy.at_once,
        kept_layers=rows.kept_layers,
        out_of_memory=rows.out_of_memory if noisy is None else noisy.out_of_memory,
        memory=memory,
        moments=_moments(optimizer, live, names, moments) if plan.keep_optimizer and optimizer.state else None,
    )


def _restore(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], moments: AdapterState) -> None:
    """Continue with these moments; a tensor without moments starts with none."""
    for path, tensor in moments.tensors.items():
        name, _, part = path.rpartition("/")
        if name in trained:
            optimizer.state[trained[name]][part] = tensor.to(trained[name].device, copy=True)


def _moments(
    optimizer: torch.optim.Optimizer, live: LiveAdapter | SparseSlot, names: set[str], earlier: AdapterState | None
) -> AdapterState:
    """The optimizer's state on the CPU, with the earlier moments of the tensors that this turn did not train."""
    parts = {f"{n}/{part}": t for n in sorted(names) for part, t in optimizer.state.get(live.parameters[n], {}).items()}
    own = {n: t.to("cpu", copy=True) for n, t in parts.items()}
    return AdapterState({**(earlier.tensors if earlier else {}), **own}, live.spec)


def _private(
    live: LiveAdapter | SparseSlot,
    examples: Sequence[Example],
    plan: Plan,
    task: TaskConfig,
    pad_id: int,
    applied: TurnPrivacy,
    secure_rng: bool,
    at_once: int,
) -> "PrivateGradient":
    from fedtune.privacy.dpsgd import PrivateGradient  # Opacus takes a second to load
    from fedtune.privacy.samples import find_way

    assert isinstance(live, LiveAdapter)  # `check_private` rejects private turns of the sparse slot
    names = matching(live.parameters, plan.train)
    return PrivateGradient(
        live,
        names,
        task,
        rows=len(examples),
        batch_of=lambda some: collate([examples[i] for i in some], pad_id),
        clip=applied.clip,
        noise=applied.noise,
        batch=plan.batch_size * plan.accumulate,
        at_once=at_once,
        source=source(secure_rng, plan.seed, "noise"),
        way=find_way(live, names, task),
    )


def _batch(examples: Sequence[Example], pad_id: int, task: TaskConfig) -> dict[str, Tensor]:
    return pack(examples, pad_id, task.max_length) if task.packing else collate(examples, pad_id)


def _mean_loss(live: LiveAdapter | SparseSlot, examples: Sequence[Example], plan: Plan, task: TaskConfig, pad_id: int) -> float:
    """Mean loss per token (or example) over all rows with the current weights."""
    total, seen, device = 0.0, 0, live.backbone.device
    live.model.eval()
    with torch.no_grad():
        for i in range(0, len(examples), plan.batch_size):
            batch = _batch(examples[i : i + plan.batch_size], pad_id, task)
            loss, count = loss_sum(live.model, {k: v.to(device) for k, v in batch.items()}, task)
            total, seen = total + loss.item(), seen + count
    live.model.train()
    return total / max(seen, 1)


class _Rows:
    """The rows of each optimizer step, and their gradient, in micro-batches that fit into memory (`Minibatch`).

    Args:
        work: The turn's arguments.
        loss: The summed loss of a micro-batch, and its number of targets.
        size: Largest micro-batch, in rows.
        kept_layers: As for `train`.
        keep_none: Stops layers from keeping intermediate tensors; returns whether any did.
    """

    def __init__(self, work: Work, loss: Loss, size: int, kept_layers: int | None, keep_none: Callable[[], bool]) -> None:
        self._live, self._task, self._pad_id = work.live, work.task, work.pad_id
        self._loss, self._keep_none = loss, keep_none
        self.size, self.kept_layers, self.out_of_memory, self.targets = size, kept_layers, 0, 0

    def take(self, batches: list[list[Example]]) -> None:
        """Set the rows of the next step: its batches."""
        device = self._live.backbone.device
        self._batches = batches
        self._drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def gradient(self, loss: Loss | None = None) -> float:
        return self._mean(lambda micro: _backward(micro, loss or self._loss, self._task, self._live.backbone.device))

    def loss(self) -> float:
        return self._mean(self._forward)

    def _forward(self, micro: list[dict[str, Tensor]]) -> tuple[float, int]:
        device = self._live.backbone.device
        with torch.no_grad():
            each = [self._loss({k: v.to(device) for k, v in batch.items()}) for batch in micro]
        count = sum(n for _, n in each)
        return sum(loss.item() for loss, _ in each) / max(count, 1), count

    def _mean(self, compute: Callable[[list[dict[str, Tensor]]], tuple[float, int]]) -> float:
        """The mean loss by `compute`, which gets the micro-batches. On an out-of-memory error, it starts over with half the micro-batch. If
        a single row runs out of memory, it calls `keep_none` and starts over once more.

        Raises:
            Decline: Not even a single row fits into memory.
        """
        while True:
            self._restart()
            pieces = [batch[i : i + self.size] for batch in self._batches for i in range(0, len(batch), self.size)]
            try:
                mean, self.targets = compute([_batch(piece, self._pad_id, self._task) for piece in pieces])
                return mean
            except Exception as bad:
                if not is_out_of_memory(bad):
                    raise
            # outside the except clause: there, the traceback keeps the tensors of the failed attempt alive
            self.size, self.out_of_memory = max(map(len, pieces)) // 2, self.out_of_memory + 1
            if not self.size:
                self.size, self.kept_layers = 1, 0
                if not self._keep_none():
                    width = max(len(e.input_ids) for batch in self._batches for e in batch)
                    raise Decline(
                        "memory",
                        f"out of memory with a single row of {width} tokens: lower task.max_length, or take a smaller backbone",
                    )
            if self._live.backbone.device.type == "cuda":
                torch.cuda.empty_cache()

    def _restart(self) -> None:
        cpu, cuda = self._drawn
        for p in self._live.parameters.values():
            p.grad = None
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._live.backbone.device)


def _backward(micro: list[dict[str, Tensor]], loss: Loss, task: TaskConfig, device: torch.device) -> tuple[float, int]:
    """Compute the gradients of the mean loss over all micro-batches, exact for unequal sizes. Returns this mean and its count."""
    counts = [len(task_of(task).terms(batch)) for batch in micro]
    count, mean = max(sum(counts), 1), 0.0
    for batch in micro:
        summed, _ = loss({k: v.to(device) for k, v in batch.items()})
        (summed / count).backward()
        mean += summed.item() / count
    return mean, sum(counts)
