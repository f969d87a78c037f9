"""One small training step on an architecture that no test covers. It checks that the step works, that padding and future tokens have no
effect, and that every trainable tensor gets a gradient.

Without this check, such a model could fail in its first turn or silently train incorrectly.
"""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.contracts.task import Example, task_of
from fedtune.data.examples import collate, pack
from fedtune.errors import FedtuneError, ModelError
from fedtune.models.adapter import LiveAdapter
from fedtune.models.checkpoint import first_line
from fedtune.models.losses import counted_logits, loss_sum
from fedtune.models.methods import method
from fedtune.models.quiet import quiet

__all__ = ["TESTED", "probe", "probe_packing"]

# config.model_type of the architectures that tests train with every method
TESTED = frozenset({"llama", "qwen2", "qwen3", "gpt2", "opt", "bert", "roberta", "distilbert", "albert", "t5"})
_LENGTHS = (6, 2, 4)


def probe(live: LiveAdapter, task: TaskConfig) -> None:
    """Try the live adapter on three rows, without changing it; an architecture in `TESTED` is skipped.

    Raises:
        ModelError: The step fails, a trainable tensor gets no gradient, or logits depend on padding or on later tokens.
    """
    kind = live.backbone.model.config.model_type
    if kind in TESTED:
        return
    where = f"the architecture '{kind}' with peft.method={live.spec.method} and task.kind={task.kind}"
    training = {m: m.training for m in live.model.modules()}  # the mode of PEFT's wrapper may differ from its modules'
    try:
        with quiet(), torch.random.fork_rng(devices=[live.backbone.device] if live.backbone.device.type == "cuda" else []):
            unreached = _unreached(live, task)
            off, ahead = _padding_effect(live, task), _future_effect(live, task)
    except FedtuneError:
        raise
    except Exception as bad:  # the model's own code, remote code and PEFT may raise any type
        raise ModelError(
            f"{where} cannot do a training step: {first_line(bad)}: name other layers in peft.targets, or take another peft.method"
        ) from None
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter in live.parameters.values():
            parameter.grad = None
    if unreached:
        raise ModelError(
            f"{where}: no gradient reaches '{unreached[0]}' ({len(unreached)} of {len(live.parameters)} trainable tensors):"
            f" {'leave its layer out of peft.targets' if method(live.spec.method).targeted else 'take peft=lora'}"
        )
    within = 1e-3 if live.backbone.model.dtype is torch.float32 else 0.1
    if ahead > within:
        raise ModelError(
            f"{where}: a token's logits change by {ahead:.1%} with later tokens, so the model is not causal: take another backbone"
        )
    if off > within:
        virtual = method(live.spec.method).virtual_tokens is not None  # padding is between the virtual tokens and the text
        raise ModelError(
            f"{where}: a row's logits change by {off:.1%} with its padding, so the model would learn from padding:"
            f" take another backbone{', ' if virtual else ' or '}another task.kind{' or peft=lora' if virtual else ''}"
        )


def probe_packing(live: LiveAdapter, task: TaskConfig) -> None:
    """Try whether packed rows have the logits of the same rows alone, without changing the live adapter.

    Raises:
        ModelError: A row's logits depend on the rows beside it, or the model takes no positions.
    """
    training = {m: m.training for m in live.model.modules()}
    live.model.eval()
    try:
        with quiet(), torch.no_grad():
            ids, mask = _ids(live, range(len(_LENGTHS)), left=False)
            rows = [row[kept.bool()].cpu().numpy().astype(np.int32) for row, kept in zip(ids, mask, strict=True)]
            examples = sorted((Example(row, row) for row in rows), key=lambda e: -len(e.input_ids))  # the order of packed rows
            alone, packed = (
                counted_logits(live.model, {k: v.to(ids.device) for k, v in batch.items()}, task)[0]
                for batch in (collate(examples, 0), pack(examples, 0, sum(_LENGTHS)))
            )
            off = _change(packed, alone)
    except Exception as bad:  # the model's own code and PEFT may raise any type
        off, why = math.inf, f"it fails ({first_line(bad)})"
    else:
        why = f"a row's logits change by {off:.1%} with the rows beside it"
    finally:
        for module, flag in training.items():
            module.training = flag
    if off > (1e-3 if live.backbone.model.dtype is torch.float32 else 0.1):
        kind = live.backbone.model.config.model_type
        raise ModelError(
            f"the architecture '{kind}' with peft.method={live.spec.method} cannot train packed rows: {why}: set task.packing=false"
        )


def _unreached(live: LiveAdapter, task: TaskConfig) -> list[str]:
    """Names of trainable tensors without a gradient. Excludes experts, which get a gradient only from rows routed to them."""
    live.model.train()
    loss, count = loss_sum(live.model, _batch(live, task, range(len(_LENGTHS))), task)
    (loss / max(count, 1)).backward()
    return [n for n, p in live.parameters.items() if p.grad is None and ".experts." not in n]


def _padding_effect(live: LiveAdapter, task: TaskConfig) -> float:
    """The largest relative difference of a row's logits between a padded batch and the row alone, in training and in generation."""
    live.model.eval()
    rows = range(len(_LENGTHS))
    with torch.no_grad():
        together = counted_logits(live.model, _batch(live, task, rows), task)[0]
        alone = torch.cat([counted_logits(live.model, _batch(live, task, [i]), task)[0] for i in rows])
        pairs = [(together, alone)]
        if task_of(task).answer_tokens:
            pairs.append((_next_logits(live, rows), torch.cat([_next_logits(live, [i]) for i in rows])))
    return max(_change(a, b) for a, b in pairs)


def _future_effect(live: LiveAdapter, task: TaskConfig) -> float:
    """The largest relative change of a causal model's logits when later tokens are added; 0 for a model that may attend to them."""
    if task_of(task).head or live.backbone.seq2seq:
        return 0.0
    live.model.eval()
    whole = _batch(live, task, [0])
    part = {k: v[:, :-2] for k, v in whole.items()}
    with torch.no_grad():
        early = counted_logits(live.model, part, task)[0]
        return _change(counted_logits(live.model, whole, task)[0][: len(early)], early)


def _change(a: Tensor, b: Tensor) -> float:
    """The largest relative difference between rows of logits (N, classes)."""
    return ((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)).max().item()


def _next_logits(live: LiveAdapter, rows: Any) -> Tensor:
    """Logits of the token after each prompt, with left padding as in `generate_answers`."""
    ids, mask = _ids(live, rows, left=True)
    out = cast(Any, live.model).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0].float()


def _batch(live: LiveAdapter, task: TaskConfig, rows: Any) -> dict[str, Tensor]:
    ids, mask = _ids(live, rows, left=False)
    return {"input_ids": ids, "attention_mask": mask, "labels": task_of(task).example_labels(ids, mask)}


def _ids(live: LiveAdapter, rows: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, longest row) each, of rows without special tokens."""
    tokenizer, device = live.backbone.tokenizer, live.backbone.device
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(min(len(tokenizer), len(special) + 64)) if i not in special] or [0]
    lists = [[plain[(7 * i + 3 * j) % len(plain)] for j in range(_LENGTHS[i])] for i in rows]
    width = max(map(len, lists))
    ids = torch.full((len(lists), width), int(tokenizer.pad_token_id), device=device)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(lists):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens, device=device), 1
    return ids, mask
