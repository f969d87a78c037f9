"""Many clients' turns at once through one frozen backbone.

C clients differ in a few trainable tensors only, so their micro-batches go through the backbone as one flat batch, and each client's LoRA
delta is one slice of a batched product: x (C, b·T, in) @ Aᵀ (C, in, r) @ Bᵀ (C, r, out). Rows of different clients never meet in the
backbone, and each client's loss is divided by its own count, so one backward pass leaves in each slice just that client's gradient.
Clipping, learning rate, AdamW, proximal term and dropout are each client's own.

What a turn is, `clients/trainer.py` says; this must agree with it to rounding, and the tests hold it to that.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from fedtune.clients.meter import peak_mb, reset_peak
from fedtune.clients.trainer import Turn, batches, steps_of
from fedtune.config import TaskConfig
from fedtune.data import Example, collate
from fedtune.errors import FedtuneError, UpdateError
from fedtune.models import LiveAdapter
from fedtune.models.backbone import dropout_rates
from fedtune.models.tasks import IGNORED, counted_logits
from fedtune.plan import Plan, matching
from fedtune.state import AdapterState


@dataclass(frozen=True, kw_only=True)
class Job:
    """One client's turn: its plan, the tensors it starts from, its rows, and what its device can do."""

    plan: Plan
    start: AdapterState
    examples: Sequence[Example]
    max_steps: int | None = None


def why_not(live: LiveAdapter) -> str | None:
    """Why this model's clients cannot be trained at once; None where they can."""
    drawn = dropout_rates(live.backbone.model.config)
    if drawn:
        return f"the backbone draws dropout for the whole batch ({', '.join(drawn)}): set model.dropout=false"
    for name, module in live.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.modules_to_save["default"], nn.Linear):
            return f"the head {name} is not one linear layer"
    return None


def train_together(
    live: LiveAdapter, jobs: Sequence[Job], task: TaskConfig, *, pad_id: int
) -> list[tuple[AdapterState, Turn] | FedtuneError]:
    """Each job's trained tensors (all of them, on the CPU) and its turn, in the order of the jobs; or why that job failed.

    Jobs may differ in everything but `plan.train`, batch size and accumulation; a client that is done leaves the stack.
    """
    reset_peak(live.backbone.device)
    stack = _Stack(live, jobs, task, pad_id)
    with stack.installed():
        while stack.active:
            stack.step()
    peak = peak_mb(live.backbone.device)
    out: list[tuple[AdapterState, Turn] | FedtuneError] = []
    for result in stack.results:
        assert result is not None
        if isinstance(result, FedtuneError):
            out.append(result)
        else:
            state, loss, steps, seconds = result
            out.append((state, Turn(loss=loss, steps=steps, seconds=seconds, peak_mb=peak)))
    return out


class _Client:
    """One client's place in the stack."""

    def __init__(self, job: Job) -> None:
        self.plan, self.rows = job.plan, job.examples
        self.steps = steps_of(job.plan, len(job.examples), job.max_steps)
        self.order = batches(len(job.examples), job.plan.batch_size, job.plan.seed)
        self.random = torch.Generator().manual_seed(job.plan.seed)  # what torch.manual_seed gives the trainer's dropout
        self.loss, self.seen, self.seconds = 0.0, 0, 0.0


class _Stack:
    """The clients that still train, their tensors stacked: `flat` is (C, P), every named tensor a view (C, *shape) of it."""

    def __init__(self, live: LiveAdapter, jobs: Sequence[Job], task: TaskConfig, pad_id: int) -> None:
        self.live, self.task, self.pad_id, self.device = live, task, pad_id, live.backbone.device
        self.clients = [_Client(job) for job in jobs]
        self.active = list(range(len(jobs)))
        self.results: list[Any] = [None] * len(jobs)
        self.names = list(live.parameters)
        self.trained = set(matching(self.names, jobs[0].plan.train))
        self.shapes = {n: self._widest(n, [j.start[n].shape for j in jobs]) for n in self.names}
        self.starts = [job.start for job in jobs]
        sizes = [math.prod(self.shapes[n]) for n in self.names]
        self.flat = torch.zeros(len(jobs), sum(sizes), device=self.device)
        for row, job in zip(self.flat, jobs, strict=True):
            for n, part in zip(self.names, row.split(sizes), strict=True):
                view, tensor = part.view(self.shapes[n]), job.start[n]
                view[tuple(slice(d) for d in tensor.shape)] = tensor.to(self.device)  # a smaller rank is padded with zeros: they stay zeros
        mask = torch.cat([torch.full((s,), float(n in self.trained)) for n, s in zip(self.names, sizes, strict=True)])
        self.mask, self.sizes = mask.to(self.device), sizes
        self.scaling = {m: torch.tensor([j.start.spec.scaling[m] for j in jobs], device=self.device) for m in live.spec.scaling}
        self.anchor = self.flat.clone()
        self.first_moment, self.second_moment = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.done, self.views = 0, dict[str, Tensor]()
        self._look()

    @staticmethod
    def _widest(name: str, shapes: list[torch.Size]) -> tuple[int, ...]:
        return tuple(max(s[d] for s in shapes) for d in range(len(shapes[0])))

    def _look(self) -> None:
        """Leaves for autograd that share the storage of `flat`."""
        parts = self.flat.split(self.sizes, dim=1)
        for n, part in zip(self.names, parts, strict=True):
            self.views[n] = part.view(len(self.active), *self.shapes[n]).detach().requires_grad_(n in self.trained)

    # -- one step -------------------------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One optimiser step of every active client; those that are done or broken leave."""
        began, clients = time.perf_counter(), [self.clients[i] for i in self.active]
        micro = [[[c.rows[i] for i in next(c.order)] for c in clients] for _ in range(clients[0].plan.accumulate)]
        counts = [max(1, sum(self._count(group[k]) for group in micro)) for k in range(len(clients))]
        losses = torch.zeros(len(clients), device=self.device)
        for group in micro:
            losses += self._backward(group, counts)
        grads = [self.views[n].grad for n in self.names]
        grad = torch.cat(
            [torch.zeros_like(self.views[n]).flatten(1) if g is None else g.flatten(1) for n, g in zip(self.names, grads, strict=True)], 1
        )
        norms = self._update(grad, clients)
        seconds = (time.perf_counter() - began) / len(clients)
        leaving = []
        for k, (client, loss, norm) in enumerate(zip(clients, losses.tolist(), norms.tolist(), strict=True)):
            client.seconds += seconds
            client.loss, client.seen = client.loss + loss * counts[k], client.seen + counts[k]
            if not math.isfinite(loss) or not math.isfinite(norm):
                what = f"training loss became {loss}" if not math.isfinite(loss) else f"gradient's norm became {norm}"
                where = f"step {self.done + 1} of {client.steps}"
                self.results[self.active[k]] = UpdateError(f"the {what} in {where}: lower client.lr, or set client.clip_norm")
                leaving.append(k)
            elif self.done + 1 == client.steps:
                self.results[self.active[k]] = (self._read(k), client.loss / client.seen, client.steps, client.seconds)
                leaving.append(k)
        self.done += 1
        self._leave(leaving)

    def _count(self, rows: Sequence[Example]) -> int:
        if self.task.kind == "classification":
            return len(rows)
        return sum(int((e.labels[1:] != IGNORED).sum()) for e in rows)

    def _backward(self, group: list[list[Example]], counts: list[int]) -> Tensor:
        """Gradients of every client's own mean loss; returns each client's share of it, (C,)."""
        self.widths = [max(len(e.input_ids) for e in rows) for rows in group]
        self.rows = [len(rows) for rows in group]
        tall = max(self.rows)
        # a short batch is filled up with its own first row, whose copies count for nothing
        flat = [e for rows in group for e in (*rows, *[rows[0]] * (tall - len(rows)))]
        batch = {k: v.to(self.device) for k, v in collate(flat, self.pad_id).items()}
        real = torch.tensor([j < n for n in self.rows for j in range(tall)], device=self.device)
        share = (1.0 / torch.tensor(counts, device=self.device)).repeat_interleave(tall)
        self.length = batch["input_ids"].shape[1]
        if self.task.kind == "classification":
            row = torch.arange(len(flat), device=self.device)
        else:
            batch["labels"][~real] = IGNORED
            row = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        logits, labels = counted_logits(self.live.model, batch, self.task)
        each = F.cross_entropy(logits, labels, reduction="none") * share[row] * real[row]
        owner = row // tall
        each.sum().backward()
        return torch.zeros(len(group), device=self.device).index_add_(0, owner, each.detach())

    def _update(self, grad: Tensor, clients: list[_Client]) -> Tensor:
        """AdamW on all clients at once, each with its own numbers; returns the gradient norms before clipping, (C,)."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=self.device)[:, None]

        plans, t = [c.plan for c in clients], self.done + 1
        prox = column([p.prox for p in plans])
        if any(p.prox for p in plans):
            grad = grad + prox * (self.flat - self.anchor) * self.mask
        norms = grad.norm(dim=1)
        clip = column([math.inf if p.clip_norm is None else p.clip_norm for p in plans])
        grad = grad * (clip / (norms[:, None] + 1e-6)).clamp(max=1.0)
        lr = column([p.lr + (p.lr_last - p.lr) * self.done / c.steps for p, c in zip(plans, clients, strict=True)])
        self.first_moment.lerp_(grad, 0.1)
        self.second_moment.mul_(0.999).addcmul_(grad, grad, value=0.001)
        self.flat.mul_(1.0 - lr * column([p.weight_decay for p in plans]) * self.mask)
        denominator = (self.second_moment / (1 - 0.999**t)).sqrt_().add_(1e-8)
        self.flat.sub_(lr / (1 - 0.9**t) * self.first_moment / denominator * self.mask)
        for view in self.views.values():
            view.grad = None
        return norms

    def _read(self, k: int) -> AdapterState:
        start, row = self.starts[self.active[k]], self.flat[k]
        tensors = {}
        for n, part in zip(self.names, row.split(self.sizes), strict=True):
            tensors[n] = part.view(self.shapes[n])[tuple(slice(d) for d in start[n].shape)].to("cpu", copy=True).contiguous()
        return start.replace(tensors)

    def _leave(self, leaving: list[int]) -> None:
        if not leaving:
            return
        keep = torch.tensor([k for k in range(len(self.active)) if k not in leaving], dtype=torch.long, device=self.device)
        self.active = [self.active[k] for k in keep.tolist()]
        for name in ("flat", "anchor", "first_moment", "second_moment"):
            setattr(self, name, getattr(self, name)[keep].contiguous())
        self.scaling = {m: s[keep] for m, s in self.scaling.items()}
        self._look()

    # -- what stands in for the adapter's modules -----------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, the model's LoRA layers, head and dropouts work client by client."""
        model, changed = self.live.model, []
        if not model.training:
            model.train()
        try:
            for name, module in model.named_modules():
                name = name.removeprefix("base_model.model.")
                stand_in: Callable[..., Tensor] | None = None
                if isinstance(module, LoraLayer):
                    stand_in = self._lora(name, module)
                elif isinstance(module, ModulesToSaveWrapper):
                    stand_in = self._linear(name)
                elif isinstance(module, nn.Dropout) and module.p > 0:
                    stand_in = self._dropout(module)
                if stand_in is not None:
                    changed.append(module)
                    module.forward = stand_in  # type: ignore[method-assign]
            yield
        finally:
            for module in changed:
                del module.forward  # the class's own is under it

    def _lora(self, name: str, module: Any) -> Callable[..., Tensor]:
        base, dropout = module.base_layer, module.lora_dropout["default"]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y, a, b = base(x, *args, **kwargs), self.views[f"{name}.lora_A"], self.views[f"{name}.lora_B"]
            mine = dropout(x.to(a.dtype)).reshape(len(self.active), -1, x.shape[-1])
            delta = torch.bmm(torch.bmm(mine, a.transpose(1, 2)), b.transpose(1, 2)) * self.scaling[name][:, None, None]
            return y + delta.view(y.shape).to(y.dtype)

        return forward

    def _linear(self, name: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            weight, bias = self.views[f"{name}.weight"], self.views.get(f"{name}.bias")
            y = torch.bmm(x.to(weight.dtype).reshape(len(self.active), -1, x.shape[-1]), weight.transpose(1, 2))
            y = y if bias is None else y + bias[:, None]
            return y.view(*x.shape[:-1], weight.shape[1])

        return forward

    def _dropout(self, module: nn.Dropout) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not module.training:
                return x
            clients, tall = [self.clients[i] for i in self.active], x.shape[0] // len(self.active)
            keep = torch.zeros_like(x)
            for k, client in enumerate(clients):
                rows, shape = self.rows[k], list(x.shape[1:])
                if x.ndim == 3 and shape[0] == self.length:
                    shape[0] = self.widths[k]  # alone, the client's batch would be padded to its own longest row only
                noise = torch.empty(rows, *shape).bernoulli_(1 - module.p, generator=client.random).div_(1 - module.p)
                keep[(slice(k * tall, k * tall + rows), *(slice(d) for d in shape))] = noise.to(x.device, x.dtype)
            return x * keep

        return forward
