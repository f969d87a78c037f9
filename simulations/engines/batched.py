"""Trains many clients at once through one frozen backbone.

C clients differ only in a few trainable tensors, so their micro-batches go through the backbone as one flat batch; `stacked.py` (LoRA and
heads) and `vmapped.py` (other methods) apply each client's tensors to its rows. Each client's loss is divided by its own count, so one
backward pass gives each client's slice exactly its own gradient. The tensors of all clients are one flat matrix (C, P): clipping, learning
rate and AdamW or SGD work row by row, and the batched form of a turn adds the method's own terms.

`clients/trainer.py` defines a turn; this must agree with it up to rounding, which tests check.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.steps import batches, lr_at, steps_of
from fedtune.clients.trainer import TrainingResult
from fedtune.clients.turns import BatchedTurn, batched_turn_of, turn_of
from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.task import task_of
from fedtune.data import Example, collate
from fedtune.errors import FedtuneError, UpdateError
from fedtune.models import LiveAdapter
from fedtune.simulations.engines import stacked, vmapped
from fedtune.simulations.engines.client_batch import ClientBatch, Forward, Way

Result = tuple[AdapterState, TrainingResult] | FedtuneError


@dataclass(frozen=True, kw_only=True)
class TurnInput:
    """One client's turn: its plan, initial tensors and rows, and extra tensors from the server."""

    plan: Plan
    start: AdapterState
    examples: Sequence[Example]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


def way_of(live: LiveAdapter, task: TaskConfig) -> tuple[Way | None, str]:
    """Return the way to batch this model's clients, and why it is not `stacked`; or None and why batching is impossible."""
    if any(getattr(m, "gradient_checkpointing", False) for m in live.backbone.model.modules()):
        return None, "model.checkpointing computes layers twice, and each client's dropout would be drawn twice"
    by_hand = stacked.why_not(live)
    if by_hand is None:
        return stacked.installed, ""
    mapped = vmapped.why_not(live, task)
    return (vmapped.installed, by_hand) if mapped is None else (None, mapped)


def train_together(
    live: LiveAdapter, turn_inputs: Sequence[TurnInput], task: TaskConfig, *, pad_id: int, way: Way = stacked.installed
) -> list[Result]:
    """Train all clients. Returns for each client, in order, all trained tensors (on the CPU) and its turn, or its error.

    All clients must share the turn, `plan.train`, optimizer, batch size and accumulation; a finished client leaves the stack.
    """
    reset_peak(live.backbone.device)
    stack = _Stack(live, turn_inputs, task, pad_id)
    if not (
        live.model.training and live.backbone.model.training
    ):  # PEFT's wrapper starts in training mode, whatever its backbone's mode is
        live.model.train()
    with way(live, stack.client_batch) as forward:
        stack.forward = forward
        stack.measure()
        while stack.active:
            stack.step()
    peak = peak_mb(live.backbone.device)
    out: list[Result] = []
    for client in stack.clients:
        if client.trained is None:
            out.append(client.failed or UpdateError("the turn gave no result"))
            continue
        turn = TrainingResult(
            loss=client.loss / max(client.seen, 1), steps=client.steps, seconds=client.seconds, peak_mb=peak, start_loss=client.start_loss
        )
        out.append((client.trained, turn))
    return out


class _Client:
    """The state of one client in the stack."""

    def __init__(self, turn_input: TurnInput) -> None:
        self.turn_input, self.plan, self.rows = turn_input, turn_input.plan, turn_input.examples
        self.steps = steps_of(turn_input.plan, len(turn_input.examples))
        self.order = batches(len(turn_input.examples), turn_input.plan.batch_size, turn_input.plan.seed)
        self.random = torch.Generator().manual_seed(turn_input.plan.seed)  # the same dropout as with the trainer's torch.manual_seed
        self.loss, self.seen, self.seconds = 0.0, 0, 0.0
        self.start_loss: float | None = None
        self.trained: AdapterState | None = None
        self.failed: UpdateError | None = None


class _Stack:
    """The clients that still train. `flat` (C, P) holds their tensors; every named tensor is a view (C, *shape) of it."""

    forward: Forward

    def __init__(self, live: LiveAdapter, turn_inputs: Sequence[TurnInput], task: TaskConfig, pad_id: int) -> None:
        self.live, self.task, self.pad_id, self.device = live, task, pad_id, live.backbone.device
        self.clients = [_Client(turn_input) for turn_input in turn_inputs]
        self.active, self.client_batch = list(range(len(turn_inputs))), ClientBatch()
        self.names = list(live.parameters)
        trained = set(matching(self.names, turn_inputs[0].plan.train))
        self.shapes = {n: self._widest([j.start[n].shape for j in turn_inputs]) for n in self.names}
        self.sizes = [math.prod(self.shapes[n]) for n in self.names]
        self.is_trained = [n in trained for n in self.names]
        marks = [torch.full((s,), float(t)) for t, s in zip(self.is_trained, self.sizes, strict=True)]
        self.mask = torch.cat(marks).to(self.device)
        self.flat = self._laid([j.start.tensors for j in turn_inputs])
        for n, part in zip(self.names, self.flat.split(self.sizes, dim=1), strict=True):
            if n in live.origin:  # a state is relative to the backbone's value
                part += live.origin[n].to(self.device).flatten()
        adam = turn_inputs[0].plan.optimizer == "adamw"
        self.first = torch.zeros_like(self.flat) if adam else None
        self.second = torch.zeros_like(self.flat) if adam else None
        self.done = 0
        self._look()
        self.turns = (batched_turn_of(turn_inputs[0].plan) or BatchedTurn)([turn_of(j.plan) for j in turn_inputs], self)

    # the interface for a turn's batched form

    @property
    def rows(self) -> list[int]:
        return self.active

    @property
    def views(self) -> Mapping[str, Tensor]:
        return self.client_batch.views

    @property
    def starts(self) -> list[AdapterState]:
        return [c.turn_input.start for c in self.clients]

    @property
    def extras(self) -> list[Mapping[str, Tensor]]:
        return [c.turn_input.extra for c in self.clients]

    @property
    def trained(self) -> list[str]:
        return [n for n, trained in zip(self.names, self.is_trained, strict=True) if trained]

    @staticmethod
    def _widest(shapes: list[torch.Size]) -> tuple[int, ...]:
        return tuple(max(s[d] for s in shapes) for d in range(len(shapes[0])))

    def _laid(self, rows: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return (C, P) with each client's tensors; smaller ranks are padded with zeros, which stay zero."""
        flat = torch.zeros(len(rows), sum(self.sizes), device=self.device)
        for row, tensors in zip(flat, rows, strict=True):
            for n, part in zip(self.names, row.split(self.sizes), strict=True):
                if (tensor := tensors.get(n)) is not None:
                    part.view(self.shapes[n])[tuple(slice(d) for d in tensor.shape)] = tensor.to(self.device)
        return flat

    def _look(self) -> None:
        """Update the client batch for the remaining clients; its tensors are autograd leaves that share the storage of `flat`."""
        clients = [self.clients[i] for i in self.active]
        self.client_batch.generators = [c.random for c in clients]
        scaling = self.live.spec.scaling
        self.client_batch.scaling = {
            m: torch.tensor([c.turn_input.start.spec.scaling[m] for c in clients], device=self.device) for m in scaling
        }
        for n, part, trained in zip(self.names, self.flat.split(self.sizes, dim=1), self.is_trained, strict=True):
            self.client_batch.views[n] = part.view(len(clients), *self.shapes[n]).detach().requires_grad_(trained)

    # -- one step -------------------------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Compute the mean loss over all rows before the first step, for clients whose plan requests it."""
        asked = [c for c in self.clients if "start_loss" in c.plan.measure]
        if not asked:
            return
        size, self.client_batch.training = asked[0].plan.batch_size, False
        total, seen = torch.zeros(len(self.clients)), torch.zeros(len(self.clients))
        with torch.no_grad():
            for i in range(0, max(len(c.rows) for c in asked), size):
                group = [list(c.rows[i : i + size]) if c in asked else [] for c in self.clients]
                total += self._losses(group, [1] * len(group))[1].cpu()
                seen += torch.tensor([self._count(rows) for rows in group])
        self.client_batch.training = True
        for client, loss in zip(self.clients, (total / seen.clamp(min=1)).tolist(), strict=True):
            client.start_loss = loss if client in asked else None

    def step(self) -> None:
        """Run one optimizer step of every active client; finished and failed clients leave."""
        began, clients = time.perf_counter(), [self.clients[i] for i in self.active]
        micro = [[[c.rows[i] for i in next(c.order)] for c in clients] for _ in range(clients[0].plan.accumulate)]
        counts = [sum(self._count(group[k]) for group in micro) for k in range(len(clients))]
        losses = torch.zeros(len(clients), device=self.device)
        for group in micro:
            total, each = self._losses(group, counts)
            total.backward()
            losses += each
        self.turns.step(self)
        norms = self._update(self._gradient(), clients)
        seconds = (time.perf_counter() - began) / len(clients)
        leaving = []
        for k, (client, loss, norm) in enumerate(zip(clients, losses.tolist(), norms.tolist(), strict=True)):
            client.seconds += seconds
            client.loss, client.seen = client.loss + loss * counts[k], client.seen + counts[k]
            where = f"step {self.done + 1} of {client.steps}"
            if not math.isfinite(loss):
                client.failed = UpdateError(f"the training loss became {loss} in {where}: lower client.lr")
            elif not math.isfinite(norm):
                client.failed = UpdateError(f"the gradient's norm became {norm} in {where}: lower client.lr")
            elif self.done + 1 == client.steps:
                client.trained = self._read(k)
            if client.failed or client.trained:
                leaving.append(k)
        self.done += 1
        self._leave(leaving)

    def _count(self, rows: Sequence[Example]) -> int:
        task = task_of(self.task)
        return sum(task.count_terms(e) for e in rows)

    def _losses(self, group: list[list[Example]], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Return Σ_clients (summed loss / count), and each client's term, (C,), without graph."""
        task, tall = task_of(self.task), max(len(rows) for rows in group)
        self.client_batch.rows = [task.sequences * len(rows) for rows in group]
        self.client_batch.widths = [max((e.width for e in rows), default=1) for rows in group]
        # a short batch is padded with copies of its first row, which do not count
        some = next(rows[0] for rows in group if rows)
        flat = [e for rows in group for e in (*rows, *[rows[0] if rows else some] * (tall - len(rows)))]
        batch = {k: v.to(self.device) for k, v in collate(flat, self.pad_id).items()}
        self.client_batch.length = batch["input_ids"].shape[1]
        real = torch.tensor([j < len(rows) for rows in group for j in range(tall)], device=self.device)
        task.silence(batch, ~real)
        example = task.terms(batch)
        losses = task.reduce(self.forward(batch, self.task), batch)
        share = 1.0 / torch.tensor(counts, device=self.device).clamp(min=1)
        owner = example // tall
        each = losses * share[owner] * real[example]
        return each.sum(), torch.zeros(len(group), device=self.device).index_add_(0, owner, each.detach())

    def _gradient(self) -> Tensor:
        views = [self.client_batch.views[n] for n in self.names]
        return torch.cat([torch.zeros_like(v).flatten(1) if v.grad is None else v.grad.flatten(1) for v in views], 1)

    def _update(self, grad: Tensor, clients: list[_Client]) -> Tensor:
        """Run the optimizer for all clients, each with its own settings. Returns the gradient norms before clipping, (C,)."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=self.device)[:, None]

        plans, t = [c.plan for c in clients], self.done + 1
        norms = grad.norm(dim=1)
        clip = column([math.inf if p.clip_norm is None else p.clip_norm for p in plans])
        grad = grad * (clip / (norms[:, None] + 1e-6)).clamp(max=1.0)
        lr = column([lr_at(c.plan, self.done, c.steps) for c in clients])
        self.flat.mul_(1.0 - lr * column([p.weight_decay for p in plans]) * self.mask)
        if self.first is not None and self.second is not None:
            self.first.lerp_(grad, 0.1)
            self.second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            denominator = (self.second / (1 - 0.999**t)).sqrt_().add_(1e-8)
            self.flat.sub_(lr / (1 - 0.9**t) * self.first / denominator * self.mask)
        else:
            self.flat.sub_(lr * grad * self.mask)
        for view in self.client_batch.views.values():
            view.grad = None
        return norms

    def _read(self, k: int) -> AdapterState:
        start, tensors = self.clients[self.active[k]].turn_input.start, {}
        for n, part in zip(self.names, self.flat[k].split(self.sizes), strict=True):
            if n in self.live.origin:
                part = part - self.live.origin[n].to(self.device).flatten()
            tensors[n] = part.view(self.shapes[n])[tuple(slice(d) for d in start[n].shape)].to("cpu", copy=True).contiguous()
        return start.replace(tensors)

    def _leave(self, leaving: list[int]) -> None:
        if not leaving:
            return
        keep = torch.tensor([k for k in range(len(self.active)) if k not in leaving], dtype=torch.long, device=self.device)
        self.active = [self.active[k] for k in keep.tolist()]
        for name in ("flat", "first", "second"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, rows[keep].contiguous())
        self._look()
