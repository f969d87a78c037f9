"""One client's turn: optimise the trainable tensors of a shared frozen backbone on the client's own rows.

Nothing is built anew but the optimiser: the model, the adapter slot and the encoded rows outlive the turn.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.config import TaskConfig
from fedtune.data import Example, collate
from fedtune.errors import Decline, UpdateError
from fedtune.models import LiveAdapter, loss_sum
from fedtune.models.memory import is_out_of_memory
from fedtune.models.methods.sparse import SparseSlot
from fedtune.plan import Plan, matching
from fedtune.privacy.noise import source
from fedtune.privacy.turn import Applied

if TYPE_CHECKING:
    from fedtune.privacy.dpsgd import PrivateGradient


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn did: mean training loss a token (or example) over all its steps (None where that would tell of single rows), steps done,
    wall seconds, and peak MB; where the plan asks for it, the mean loss over all rows before the first step. The memory's mark when it
    began, the rows that went through the model at once in the end, and how often memory ran out."""

    loss: float | None
    steps: int
    seconds: float
    peak_mb: float
    start_loss: float | None = None
    began_mb: float = 0.0
    micro: int = 0
    out_of_memory: int = 0


def steps_of(plan: Plan, examples: int) -> int:
    """Optimiser steps that the plan asks of a client with so many rows."""
    steps = plan.steps if plan.steps is not None else math.ceil(examples * (plan.epochs or 0) / (plan.batch_size * plan.accumulate))
    return max(1, steps)


def batches(examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: each pass a new permutation, its last batch as short as it comes."""
    rng = random.Random(seed)
    while True:
        order = list(range(examples))
        rng.shuffle(order)
        yield from (order[i : i + batch_size] for i in range(0, examples, batch_size))


def lr_at(plan: Plan, step: int, steps: int) -> float:
    """Learning rate of a step, from 0."""
    return plan.lr + (plan.lr_last - plan.lr) * step / steps


def train(
    live: LiveAdapter | SparseSlot,
    examples: Sequence[Example],
    plan: Plan,
    task: TaskConfig,
    *,
    pad_id: int,
    micro: int | None = None,
    correction: Mapping[str, Tensor] | None = None,
    ranks: Mapping[str, int] | None = None,
    private: Applied | None = None,
    secure_rng: bool = False,
) -> Turn:
    """Train the live adapter in place by the plan.

    Args:
        live: The slot, loaded with the tensors that the turn starts from.
        examples: The client's training rows, at least one.
        plan: The server's plan.
        task: What the loss is.
        pad_id: Token id of the padding.
        micro: Most rows that go through the model at once; None takes a batch whole. Out of memory, it is halved, and the step done again.
        correction: Tensor → what is added to its gradient in every step, before clipping, such as SCAFFOLD's c − c_k.
        ranks: LoRA module → the rank that was loaded, for `plan.tail_penalty`.
        private: DP-SGD: each step's gradient is a noisy sum of clipped ones over a sample of the rows, and no loss is told.
        secure_rng: Whether its noise and samples come from the operating system.

    Raises:
        UpdateError: The loss or the gradient is not finite: the turn is lost, and says in which step.
        Decline: A single row is too much for the memory.
    """
    device, start = live.backbone.device, time.perf_counter()
    reset_peak(device)
    began = peak_mb(device)
    names = set(matching(live.parameters, plan.train))
    params = [p for n, p in live.parameters.items() if n in names]
    extra = [(live.parameters[n], c.to(device)) for n, c in (correction or {}).items() if n in names]
    for name, p in live.parameters.items():
        p.requires_grad_(name in names)
    anchor = [p.detach().clone() for p in params] if plan.prox else []
    if plan.optimizer == "adamw":
        optimizer = torch.optim.AdamW(params, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    else:  # without momentum, SGD's decay is the decoupled one
        optimizer = torch.optim.SGD(params, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    before = _mean_loss(live, examples, plan, task, pad_id) if "start_loss" in plan.measure else None
    torch.manual_seed(plan.seed)  # dropout draws from the global generator
    stream = batches(len(examples), plan.batch_size, plan.seed)
    steps, total, seen = steps_of(plan, len(examples)), 0.0, 0
    size, out = min(micro or plan.batch_size, plan.batch_size), 0
    # walking hundreds of modules costs milliseconds: the model stays so between turns. PEFT's wrapper may say so of itself alone
    if not (live.model.training and live.backbone.model.training):
        live.model.train()
    stack = contextlib.ExitStack()
    try:
        noisy = stack.enter_context(_private(live, examples, plan, task, pad_id, private, secure_rng, size)) if private else None
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(plan, step, steps)
            if noisy is None:
                rows = [[examples[i] for i in next(stream)] for _ in range(plan.accumulate)]
                loss, count, size, again = _in_pieces(live, rows, size, task, pad_id, device)
                out += again
            else:
                loss, count = 0.0, 0
                for name, gradient in noisy.step().items():
                    live.parameters[name].grad = gradient
                size, out = noisy.at_once, noisy.out_of_memory
            if not math.isfinite(loss):
                raise UpdateError(
                    f"the training loss became {loss} in step {step + 1} of {steps}: lower client.lr, or set client.clip_norm"
                )
            if plan.prox:
                with torch.no_grad():  # the gradient of μ/2·‖w − w_t‖²
                    for p, w in zip(params, anchor, strict=True):
                        p.grad = plan.prox * (p - w) if p.grad is None else p.grad.add_(p - w, alpha=plan.prox)
            if plan.tail_penalty:
                (plan.tail_penalty * tail_norms(live.parameters, ranks or {}, plan.tail_share)).backward()
            for p, c in extra:
                p.grad = c.clone() if p.grad is None else p.grad.add_(c)
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
    return Turn(
        loss=mean,
        steps=steps,
        seconds=time.perf_counter() - start,
        peak_mb=peak_mb(device),
        start_loss=before,
        began_mb=began,
        micro=size,
        out_of_memory=out,
    )


def _private(
    live: LiveAdapter | SparseSlot,
    examples: Sequence[Example],
    plan: Plan,
    task: TaskConfig,
    pad_id: int,
    applied: Applied,
    secure_rng: bool,
    at_once: int,
) -> "PrivateGradient":
    from fedtune.privacy.dpsgd import PrivateGradient  # Opacus takes a second to load
    from fedtune.privacy.samples import way_of

    assert isinstance(live, LiveAdapter)  # of the phase `peft`: the client agreed to no other
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
        way=way_of(live, names, task),
    )


def tail_norms(tensors: Mapping[str, Tensor], ranks: Mapping[str, int], share: float) -> Tensor:
    """HetLoRA's Σ over modules of ‖B[:, m:r]‖·‖A[m:r]‖ with m = ⌊share·r⌋ (arXiv:2401.06432, eq. 4)."""
    total = torch.zeros(())
    for module, rank in ranks.items():
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        tail = slice(math.floor(share * rank), rank)
        total = total.to(a.device) + torch.linalg.norm(b[:, tail]) * torch.linalg.norm(a[tail])
    return total


def _mean_loss(live: LiveAdapter | SparseSlot, examples: Sequence[Example], plan: Plan, task: TaskConfig, pad_id: int) -> float:
    """Mean loss a token (or example) over all rows, as the model stands."""
    total, seen, device = 0.0, 0, live.backbone.device
    live.model.eval()
    with torch.no_grad():
        for i in range(0, len(examples), plan.batch_size):
            batch = collate(examples[i : i + plan.batch_size], pad_id)
            loss, count = loss_sum(live.model, {k: v.to(device) for k, v in batch.items()}, task)
            total, seen = total + loss.item(), seen + count
    live.model.train()
    return total / max(seen, 1)


def _in_pieces(
    live: LiveAdapter | SparseSlot, batches: list[list[Example]], size: int, task: TaskConfig, pad_id: int, device: torch.device
) -> tuple[float, int, int, int]:
    """`_backward` of these batches in pieces of at most `size` rows; out of memory, once more from the start in pieces of half as many,
    with the same random numbers. Also returns the size that went through, and how often it was halved.

    Raises:
        Decline: Single rows are too large.
    """
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    halved = 0
    while True:
        pieces = [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]
        try:
            loss, count = _backward(live, [collate(piece, pad_id) for piece in pieces], task, device)
            return loss, count, size, halved
        except Exception as bad:
            if not is_out_of_memory(bad):
                raise
        # out of the except clause, whose traceback holds the tensors of the attempt
        size, halved = max(map(len, pieces)) // 2, halved + 1
        if not size:
            width = max(len(e.input_ids) for batch in batches for e in batch)
            raise Decline("memory", f"out of memory with a single row of {width} tokens: lower task.max_length, or take a smaller backbone")
        for p in live.parameters.values():
            p.grad = None
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], device)
            torch.cuda.empty_cache()


def _backward(live: LiveAdapter | SparseSlot, micro: list[dict[str, Tensor]], task: TaskConfig, device: torch.device) -> tuple[float, int]:
    """Gradients of the mean loss over all micro-batches together, exact whatever their sizes; returns that mean and its count."""
    counts = [int((b["labels"][..., 1:] != -100).sum()) if task.kind != "classification" else len(b["labels"]) for b in micro]
    count, mean = max(sum(counts), 1), 0.0
    for batch in micro:
        loss, _ = loss_sum(live.model, {k: v.to(device) for k, v in batch.items()}, task)
        (loss / count).backward()
        mean += loss.item() / count
    return mean, sum(counts)
