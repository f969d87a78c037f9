"""Gradients of single rows, for every PEFT method: (B, *shape) of each trained tensor.

    hooked  Opacus' hooks on the layers' inputs and output gradients: one backward pass for all rows. Exact where each trained tensor is
            the weight of a layer that is called with the rows in its first dimension (LoRA, heads).
    mapped  torch.func: vmap over the rows of the gradient of the model as a function of the trained tensors (prompts, DoRA, (IA)³,
            adapters, biases, all weights), which the hooks miss or, for prompts, get wrong.
    looped  One backward pass a row: right for every model, also where vmap does not run, such as prompts over a quantized backbone.

`way_of` takes the first that gives the loop's gradients on three made-up rows: a wrong gradient norm would make the stated ε false. Where
one row's numbers hang on who else is in the batch, it takes the loop unasked: neighboring data sets would differ in more
than that row's gradient.

The loss of a row is the mean over its counted tokens, so that long rows are not clipped for being long.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter
from fedtune.models.losses import counted_logits
from fedtune.models.masks import masks_from_shapes
from fedtune.models.methods import swapped

Grads = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Way = Callable[[LiveAdapter, Sequence[str], TaskConfig], contextlib.AbstractContextManager[Grads]]

_ROWS, _LENGTH = 3, 5  # of the made-up rows: nothing else in them is three
_chosen: WeakKeyDictionary[LiveAdapter, dict[tuple[str, tuple[str, ...]], Way]] = WeakKeyDictionary()


def way_of(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Way:
    """The quickest way to this model's gradients of single rows that is right; found once a model.

    Args:
        live: In train mode; exactly the named tensors require a gradient.
        names: Canonical names of the trained tensors.
        task: What the loss is.
    """
    known = _chosen.setdefault(live, {})
    key = (task.kind, tuple(names))
    if key not in known:
        with torch.random.fork_rng(devices=[]):
            quick = () if _mixes_rows(live) else (hooked, mapped)
            known[key] = next((way for way in quick if _right(way, live, names, task)), looped)
    return known[key]


@contextlib.contextmanager
def looped(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Iterator[Grads]:
    """One backward pass a row."""
    params = [live.parameters[n] for n in names]

    def grads(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = []
        for i in range(len(batch["labels"])):
            loss = _losses(live, {n: t[i : i + 1] for n, t in batch.items()}, task)
            rows.append(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))
        return {n: torch.stack([row[at] for row in rows]) for at, n in enumerate(names)}

    yield grads


@contextlib.contextmanager
def hooked(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Iterator[Grads]:
    """Opacus' hooks.

    Raises:
        ModelError: A tensor's gradients are not one a row.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on layers whose input needs no gradient, which is as it should be here
        module = GradSampleModule(live.model, batch_first=True, loss_reduction="sum", strict=False)

        def grads(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rows, out = len(batch["labels"]), {}
            try:
                _losses(live, batch, task).backward()
                for n in names:
                    found = cast(Any, live.parameters[n]).grad_sample
                    if not isinstance(found, Tensor) or found.shape[0] != rows:
                        got = "none" if found is None else "several" if isinstance(found, list) else f"{found.shape[0]}"
                        raise ModelError(f"the gradients of '{n}' are not one a row: {rows} rows, {got} gradients")
                    out[n] = found
            except BaseException:
                _forget(live)
                raise
            finally:
                module.set_grad_sample_to_none()
                for p in live.parameters.values():
                    p.grad = None
            return out

        try:
            yield grads
        finally:
            module.cleanup()
            for p in live.model.parameters():
                if hasattr(p, "_forward_counter"):
                    del p._forward_counter
            _forget(live)


def _forget(live: LiveAdapter) -> None:
    """Drop what Opacus' hooks hold of a pass that broke off, which the next pass would take for its own."""
    for p in live.model.parameters():
        if hasattr(p, "_forward_counter"):
            p._forward_counter = 0
    for m in live.model.modules():
        for left in ("activations", "max_batch_len"):
            if left in m.__dict__:
                delattr(m, left)


@contextlib.contextmanager
def mapped(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Iterator[Grads]:
    """torch.func's vmap over the rows."""
    kind, places = task_of(task), 0

    def loss(trained: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
        named = {live.names[n]: t for n, t in trained.items()}
        inputs = {n: t[None] for n, t in row.items() if n not in ("where", "targets", "weights")}

        def call(**more: Any) -> Any:
            return functional_call(live.model, named, (), {**inputs, **more})

        logits = kind.logits(live.model, call, places, lambda hidden: hidden[0][row["where"]]).float()
        return (kind.loss(logits, row["targets"], "none") * row["weights"]).sum()

    def grads(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nonlocal places
        rows, counts, targets = kind.inputs(live.model, batch), kind.counts(batch), kind.targets(batch)
        places, row = counts.shape[1], torch.arange(len(counts), device=counts.device)[:, None]
        most = max(1, int(counts.sum(1).max()))
        where = counts.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # as many of each row, filled up
        real, chosen = counts[row, where], targets[row, where]
        rows["where"], rows["weights"] = where, real / counts.sum(1, keepdim=True).clamp(min=1)
        rows["targets"] = chosen.where(real.view(*real.shape, *[1] * (chosen.ndim - 2)), 0)
        trained = {n: live.parameters[n].detach() for n in names}
        with masks_from_shapes(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # attention kernels are looped over the rows
            return torch.vmap(grad(loss), in_dims=(None, 0), randomness="different")(trained, rows)

    yield grads


def _losses(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig) -> Tensor:
    """The sum over the rows of each row's mean loss."""
    kind = task_of(task)
    logits, targets = counted_logits(live.model, batch, task)
    sizes = kind.counts(batch).sum(1)
    return (kind.loss(logits, targets, "none") / sizes.repeat_interleave(sizes)).sum()


def _mixes_rows(live: LiveAdapter) -> bool:
    """Whether a layer looks at the batch as a whole: LLM.int8 (arXiv:2208.07339) takes a feature out of every row's 8-bit product as soon
    as one row has an outlier there, which made-up rows need not have. On a CPU, bitsandbytes trains through the weights in full instead."""
    if live.backbone.device.type == "cpu":
        return False
    return any(getattr(getattr(m, "state", None), "threshold", 0.0) > 0 for m in live.model.modules())


def _right(way: Way, live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> bool:
    """Whether it gives the loop's gradients on three ragged rows, with every tensor moved off its start (LoRA's B is zero there)."""
    batch, moved = _probe(live, task), torch.Generator().manual_seed(0)
    values = {p: p.detach() + 0.05 * torch.randn(p.shape, generator=moved).to(p) for p in live.parameters.values()}
    dropouts = {m: m.p for m in live.model.modules() if isinstance(m, nn.Dropout)}
    try:
        for m in dropouts:
            m.p = 0.0
        with swapped(values):
            with looped(live, names, task) as grads:
                wanted = grads(batch)
            try:
                with way(live, names, task) as grads:
                    got = grads(batch)
            except Exception:  # whatever hooks, vmap and the model's own code raise: then this is no way
                return False
    finally:
        for m, p in dropouts.items():
            m.p = p
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    within = 1e-4 if live.backbone.model.dtype == torch.float32 else 3e-2
    return all(got[n].shape == g.shape and bool((got[n] - g).norm() <= within * size) for n, g in wanted.items())


def _probe(live: LiveAdapter, task: TaskConfig) -> dict[str, Tensor]:
    """Rows of 5, 3 and 4 tokens, each with one end token, its last."""
    device, config = live.backbone.device, cast(Any, live.backbone.model.config).get_text_config()
    size = int(cast(Any, live.backbone.model.get_input_embeddings()).num_embeddings)
    pad = int(config.pad_token_id or 0)
    ends = config.eos_token_id if isinstance(config.eos_token_id, int) else None
    plain = [i for i in range(size) if i not in (pad, ends)] or [0]
    ids = torch.tensor([plain[(3 + i) % len(plain)] for i in range(_ROWS * _LENGTH)], device=device).view(_ROWS, _LENGTH)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], device=device)
    if ends is not None:
        ids[torch.arange(_ROWS), mask.sum(1) - 1] = ends
    ids = ids.masked_fill(mask == 0, pad)
    return {"input_ids": ids, "attention_mask": mask, "labels": task_of(task).example_labels(ids, mask)}
