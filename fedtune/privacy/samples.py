"""Per-row gradients for every PEFT method: (B, *shape) of each trained tensor.

    hooked  Opacus' hooks on the layers' inputs and output gradients: one backward pass for all rows. Exact where each trained tensor is
            the weight of a layer whose input has the rows in its first dimension (LoRA, heads).
    mapped  torch.func: vmap over the rows of the gradient of the model as a function of the trained tensors (prompts, DoRA, (IA)³,
            adapters, biases, all weights), for which the hooks fail or, for prompts, give wrong results.
    looped  One backward pass per row: correct for every model, including those without vmap, such as prompts on a quantized backbone.

`find_way` selects the first method that matches the loop's gradients on three artificial rows: a wrong gradient norm would make the stated
ε false. If a row's result depends on the other rows of the batch, it selects the loop: otherwise neighboring data sets would differ in more
than that row's gradient.

A row's loss is the mean over its counted tokens, so that long rows are not clipped more.
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

_ROWS, _LENGTH = 3, 5  # of the artificial rows; no other dimension is 3
_chosen: WeakKeyDictionary[LiveAdapter, dict[tuple[str, tuple[str, ...]], Way]] = WeakKeyDictionary()


def find_way(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Way:
    """The fastest correct method for this model's per-row gradients; determined once per model.

    Args:
        live: The live adapter, in train mode; exactly the named tensors require gradients.
        names: Canonical names of the trained tensors.
        task: The task, which defines the loss.
    """
    known = _chosen.setdefault(live, {})
    key = (task.kind, tuple(names))
    if key not in known:
        with torch.random.fork_rng(devices=[]):
            fast = () if _mixes_rows(live) else (hooked, mapped)
            known[key] = next((way for way in fast if _is_correct(way, live, names, task)), looped)
    return known[key]


@contextlib.contextmanager
def looped(live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> Iterator[Grads]:
    """One backward pass per row."""
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
        ModelError: A tensor does not have one gradient per row.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of layers whose input needs no gradient, which is intended
        module = GradSampleModule(live.model, batch_first=True, loss_reduction="sum", strict=False)

        def grads(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rows, out = len(batch["labels"]), {}
            try:
                _losses(live, batch, task).backward()
                for n in names:
                    found = cast(Any, live.parameters[n]).grad_sample
                    if not isinstance(found, Tensor) or found.shape[0] != rows:
                        got = "none" if found is None else "several" if isinstance(found, list) else f"{found.shape[0]}"
                        raise ModelError(f"'{n}' does not have one gradient per row: {rows} rows, {got} gradients")
                    out[n] = found
            except BaseException:
                _clear_hooks(live)
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
            _clear_hooks(live)


def _clear_hooks(live: LiveAdapter) -> None:
    """Drop the data that Opacus' hooks keep from an interrupted pass; the next pass would use it as its own."""
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
        where = counts.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # the same number for each row, padded
        real, chosen = counts[row, where], targets[row, where]
        rows["where"], rows["weights"] = where, real / counts.sum(1, keepdim=True).clamp(min=1)
        rows["targets"] = chosen.where(real.view(*real.shape, *[1] * (chosen.ndim - 2)), 0)
        trained = {n: live.parameters[n].detach() for n in names}
        with masks_from_shapes(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # vmap loops attention kernels over the rows
            return torch.vmap(grad(loss), in_dims=(None, 0), randomness="different")(trained, rows)

    yield grads


def _losses(live: LiveAdapter, batch: Mapping[str, Tensor], task: TaskConfig) -> Tensor:
    """The sum of the rows' mean losses."""
    kind = task_of(task)
    logits, targets = counted_logits(live.model, batch, task)
    sizes = kind.counts(batch).sum(1)
    return (kind.loss(logits, targets, "none") / sizes.repeat_interleave(sizes)).sum()


def _mixes_rows(live: LiveAdapter) -> bool:
    """Whether a layer's result for a row depends on the whole batch: LLM.int8 (arXiv:2208.07339) removes a feature from every row's 8-bit
    product if one row has an outlier there, which the artificial rows may lack. On a CPU, bitsandbytes uses dequantized weights instead."""
    if live.backbone.device.type == "cpu":
        return False
    return any(getattr(getattr(m, "state", None), "threshold", 0.0) > 0 for m in live.model.modules())


def _is_correct(way: Way, live: LiveAdapter, names: Sequence[str], task: TaskConfig) -> bool:
    """Whether the method gives the loop's gradients on three rows of different lengths; tensors are perturbed, as LoRA's B starts at 0."""
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
            except Exception:  # hooks, vmap or the model's code may raise anything: the method does not work
                return False
    finally:
        for m, p in dropouts.items():
            m.p = p
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    within = 1e-4 if live.backbone.model.dtype == torch.float32 else 3e-2
    return all(got[n].shape == g.shape and bool((got[n] - g).norm() <= within * size) for n, g in wanted.items())


def _probe(live: LiveAdapter, task: TaskConfig) -> dict[str, Tensor]:
    """Artificial rows of 5, 3 and 4 tokens, each ending in an end token."""
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
