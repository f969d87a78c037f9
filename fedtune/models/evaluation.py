"""Score examples with the task's metrics, and generate answers to their prompts."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.contracts.task import Score, task_of
from fedtune.data.examples import Example, collate, prompts
from fedtune.models.backbone import is_seq2seq
from fedtune.models.losses import counted_logits


def evaluate(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> dict[str, float]:
    """The loss and the task's metrics on these examples. The model's train or eval mode is restored.

    Raises:
        DataError: No example has a target.
    """
    return task_of(task).summarize(score_examples(model, tokenizer, examples, task, batch_size=batch_size))


def score_examples(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> Sequence[Score]:
    """One score per example, in order. The examples may come from several clients."""
    kind, found = task_of(task), dict[int, Score]()
    with _evaluating(model):
        for chunk in _by_length([len(e.input_ids) for e in examples], batch_size):
            some = [examples[i] for i in chunk]
            batch = _to_device(collate(some, tokenizer.pad_token_id), model)
            logits, targets = counted_logits(model, batch, task)
            sizes = kind.counts(batch).sum(1).tolist()
            found.update(zip(chunk, kind.score(logits, targets, sizes, some, tokenizer), strict=True))
        scores = [found[i] for i in range(len(examples))]
        return kind.settle(model, tokenizer, examples, scores, batch_size=batch_size)


def sequence_log_probs(
    model: nn.Module, examples: Sequence[Example], task: TaskConfig, *, batch_size: int, pad_id: int
) -> list[tuple[float, ...]]:
    """For each example, in order, the log-probability of each sequence's targets, summed, in nats."""
    kind, found = task_of(task), dict[int, tuple[float, ...]]()
    with _evaluating(model):
        for chunk in _by_length([len(e.input_ids) for e in examples], batch_size):
            batch = _to_device(collate([examples[i] for i in chunk], pad_id), model)
            losses = kind.loss(*counted_logits(model, batch, task), "none")
            sums = torch.stack([each.sum() for each in losses.split(kind.counts(batch).sum(1).tolist())])
            found.update(zip(chunk, map(tuple, (-sums).view(len(chunk), -1).tolist()), strict=True))
    return [found[i] for i in range(len(examples))]


def generate_answers(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> list[str]:
    """Greedily generated answers to the examples' prompts, in order, without surrounding white space."""
    out = [""] * len(examples)
    with _evaluating(model):
        for chunk in _by_length([e.prompt_length for e in examples], batch_size):
            batch = _to_device(prompts([examples[i] for i in chunk], tokenizer.pad_token_id), model)
            tokens = cast(Any, model).generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            # skip the decoder's start token, or the prompt
            begun = 1 if is_seq2seq(getattr(model, "config", None)) else batch["input_ids"].shape[1]
            texts = tokenizer.batch_decode(tokens[:, begun:], skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                out[index] = text.strip()
    return out


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, to reduce padding; the longest first, so that out-of-memory errors occur immediately."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def _to_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
