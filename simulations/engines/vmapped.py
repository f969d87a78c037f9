"""Batches any PEFT method with `torch.func.vmap`: the model as a function of one client's tensors, mapped over clients.

Frozen weights are not mapped, so their products still use one flat batch. It is slower than `stacked.py`, but independent of the method.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.models import LiveAdapter
from fedtune.models.losses import counted_logits
from fedtune.models.masks import masks_from_shapes
from fedtune.models.methods import swapped
from fedtune.simulations.engines.client_batch import ClientBatch, Forward, shared_dropout


def why_not(live: LiveAdapter, task: TaskConfig) -> str | None:
    """Why this model cannot be mapped over clients; None if a test with two clients of two ragged rows gives the same results as alone."""
    if drawn := shared_dropout(live):
        return drawn
    if quantized := [
        type(m).__name__ for m in live.model.modules() if any(c.__module__.startswith("bitsandbytes") for c in type(m).__mro__)
    ]:
        return f"torch.func.vmap does not support quantized layers ({quantized[0]})"
    clients = ClientBatch(generators=[torch.Generator(), torch.Generator()], rows=[2, 2], widths=[4, 4], length=4, training=False)
    clients.views = {n: torch.stack([p.detach(), p.detach() * 1.25]) for n, p in live.parameters.items()}
    clients.scaling = {m: torch.full((2,), s, device=live.backbone.device) for m, s in live.spec.scaling.items()}
    batch = _probe(live, task)
    try:
        with torch.no_grad(), _mapped(live, clients) as forward:
            mapped, _ = forward(batch, task)
    except Exception as bad:  # vmap and the model's code raise many types: then vmap cannot be used
        return f"torch.func.vmap fails on the model ({type(bad).__name__}: {str(bad).splitlines()[0][:160]})"
    alone = []
    with torch.no_grad(), _without_dropout(live.model):
        for k in range(2):
            with swapped({p: clients.views[n][k] for n, p in live.parameters.items()}):
                alone.append(counted_logits(live.model, {n: v[2 * k : 2 * k + 2] for n, v in batch.items()}, task)[0])
    apart, size = (mapped - torch.cat(alone)).norm(), mapped.norm()
    exact = live.backbone.model.dtype == torch.float32
    return None if apart <= (1e-4 if exact else 3e-2) * size else "torch.func.vmap changes its results"


@contextlib.contextmanager
def installed(live: LiveAdapter, clients: ClientBatch) -> Iterator[Forward]:
    """Yield a forward function that maps the model over the clients."""
    with _mapped(live, clients) as forward:
        yield lambda batch, task: task_of(task).loss(*forward(batch, task), "none")


@contextlib.contextmanager
def _mapped(live: LiveAdapter, clients: ClientBatch) -> Iterator[Callable[[Mapping[str, Tensor], TaskConfig], tuple[Tensor, Tensor]]]:
    """Yield a function to the clients' logits and targets, as in `counted_logits`."""
    layers = {m: live.model.get_submodule(live.names[f"{m}.lora_A"].split(".lora_")[0]).scaling for m in live.spec.scaling}
    kept = {m: dict(s) for m, s in layers.items()}
    dropouts = [m for m in live.model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    try:
        for module in dropouts:
            module.forward = _dropout(clients, module.p)  # type: ignore[method-assign]
        yield lambda batch, task: _forward(live, clients, layers, batch, task)
    finally:
        for module in dropouts:
            del module.forward  # the class's own is under it
        for m, s in kept.items():
            layers[m].update(s)


def _forward(
    live: LiveAdapter, clients: ClientBatch, layers: Mapping[str, dict[str, Any]], batch: Mapping[str, Tensor], task: TaskConfig
) -> tuple[Tensor, Tensor]:
    c, kind = len(clients), task_of(task)
    inputs, counts = kind.inputs(live.model, batch), kind.counts(batch)
    # the output layer gets only positions with a target; vmap needs equally many per client
    where, real = _places(counts.view(c, -1, counts.shape[1]))

    def one(mine: dict[str, Tensor], factors: dict[str, Tensor], inputs: dict[str, Tensor], where: Tensor) -> Tensor:
        for m, s in factors.items():
            layers[m]["default"] = s
        named = {live.names[n]: t for n, t in mine.items()}

        def call(**more: Any) -> Any:
            return functional_call(live.model, named, (), {**inputs, **more})

        return kind.logits(live.model, call, counts.shape[1], lambda hidden: hidden.flatten(0, 1)[where])

    inputs = {n: t.view(c, -1, t.shape[1]) for n, t in inputs.items()}
    with masks_from_shapes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # attention kernels run in a loop over the clients
        logits = torch.vmap(one, randomness="error")(clients.views, clients.scaling, inputs, where).float()
    return logits[real], kind.targets(batch)[counts]


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counted positions (C, B, T'): return (C, K) indices into each client's B·T', with K the maximum over clients, and (C, K) whether
    real."""
    flat = counts.flatten(1)
    most = max(1, int(flat.sum(1).max()))
    where = flat.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return where, flat.gather(1, where)


class _Drop(torch.autograd.Function):
    """Dropout that knows each row's client inside vmap."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, clients: ClientBatch, p: float) -> Tensor:
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("dropout outside of a client batch")

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, clients: ClientBatch, p: float) -> tuple[Tensor, int]:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return clients.drop(x, p), 0


def _dropout(clients: ClientBatch, p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: _Drop.apply(x, clients, p) if clients.training else x  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Disable dropout without `eval()`, which would repack quantized layers."""
    rates = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    try:
        for module in rates:
            module.p = 0.0
        yield
    finally:
        for module, p in rates.items():
            module.p = p


def _probe(live: LiveAdapter, task: TaskConfig) -> dict[str, Tensor]:
    """Two clients of two rows, (4, 4), three of them padded."""
    device, size = live.backbone.device, int(cast(Any, live.backbone.model.get_input_embeddings()).num_embeddings)
    ids = torch.tensor(list(itertools.islice(itertools.cycle(range(min(5, size - 1), size)), 16)), device=device).view(4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], device=device)
    ids = ids.masked_fill(mask == 0, int(live.backbone.model.config.get_text_config().pad_token_id or 0))
    return {"input_ids": ids, "attention_mask": mask, "labels": task_of(task).example_labels(ids, mask)}
