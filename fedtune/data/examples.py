"""Encode rows as token ids with labels, and collate them into batches."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example, task_of


def encode(
    rows: RowSet, indices: np.ndarray, tokenizer: Any, task: TaskConfig, *, seq2seq: bool = False, keep_short: bool = False
) -> list[Example]:
    """The rows at `indices` as examples of at most `task.max_length` tokens.

    The task defines the encoding. Prompts and texts start with the tokenizer's own start token (Llama's <s>, none for GPT-2), in training
    as in generation.

    Args:
        rows: Rows with the task's columns.
        indices: (n,) indices of the rows, in order.
        tokenizer: The backbone's tokenizer.
        task: The task, with the maximum length.
        seq2seq: Whether the backbone is an encoder-decoder.
        keep_short: Whether a row too short for a target becomes an example without one, instead of being left out.

    Raises:
        DataError: A row has no target.
    """
    if not len(indices):
        return []
    chosen = rows.select(np.asarray(indices).tolist())
    return task_of(task).encode(chosen, tokenizer, encoder_decoder=seq2seq, keep_short=keep_short)


def pad_id(tokenizer: Any) -> int:
    """Token id of the padding: the pad token, else the end token, else 0. The attention mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids without special tokens."""
    # verbose=False: no warning about texts beyond the model's context, which are truncated later
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def begin(tokenizer: Any) -> list[int]:
    """[bos] if the tokenizer adds it to texts, else []."""
    start = tokenizer("", add_special_tokens=True).input_ids
    return [tokenizer.bos_token_id] if start and start[0] == tokenizer.bos_token_id else []


def end(tokenizer: Any) -> list[int]:
    """[eos], or [] if the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def filler(tokenizer: Any) -> int:
    """The token of a text without tokens, since a model needs at least one."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)


def whole_texts(texts: list[str], tokenizer: Any, longest: int, *, one_end: bool) -> list[np.ndarray]:
    """(T,) int32 ids of each text, truncated, with the tokenizer's special tokens.

    Args:
        texts: The texts.
        tokenizer: The backbone's tokenizer.
        longest: Maximum number of tokens of a text.
        one_end: Whether each text gets exactly one end token, as its last, even if the tokenizer adds none or the text contains one: T5
            classifies at it.
    """
    coded = tokenizer(texts, truncation=True, max_length=longest, return_attention_mask=False).input_ids
    if one_end:
        last = end(tokenizer)
        coded = [[i for i in ids if i not in last][: longest - 1] + last for ids in coded]
    return [np.array(ids or [filler(tokenizer)], np.int32) for ids in coded]


def collate(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"] = "right") -> dict[str, Tensor]:
    """A batch of B examples, padded to the longest, T.

    Returns:
        input_ids (B, T) int64; attention_mask (B, T) int64, 1 on tokens; labels (B, T) int64, -100 on padding; or for row targets (B,)
        class ids or numbers, or (B, L) float32; for an encoder-decoder's answers (B, 1 + A) int64. Pairs of sequences give 2B rows, of
        which rows 2i and 2i + 1 are example i, and reference (B, 2) float32.
    """
    if examples[0].first:
        return _collate_pairs(examples, pad_id, side)
    ids, mask = _pad([e.input_ids for e in examples], pad_id, side)
    if all(len(e.labels) == 1 for e in examples):  # examples with token targets have at least two labels
        labels = torch.tensor([e.labels[0].item() for e in examples])
    elif examples[0].labels.dtype == np.float32:
        labels = torch.from_numpy(np.stack([e.labels for e in examples]))
    else:
        labels, _ = _pad([e.labels for e in examples], IGNORED, side)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _collate_pairs(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"]) -> dict[str, Tensor]:
    split = [np.split(values, [e.first]) for e in examples for values in (e.input_ids, e.labels)]
    ids, mask = _pad([part for parts in split[::2] for part in parts], pad_id, side)
    labels, _ = _pad([part for parts in split[1::2] for part in parts], IGNORED, side)
    reference = torch.tensor([e.reference or (0.0, 0.0) for e in examples], dtype=torch.float32)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "reference": reference}


def pack(examples: Sequence[Example], pad_id: int, longest: int) -> dict[str, Tensor]:
    """A batch of B ≤ len(examples) rows. Each joins one or more examples; a row of several has at most `longest` tokens.

    Returns:
        input_ids (B, T) int64; labels (B, T) int64, -100 on padding and at the first token of each example; position_ids (B, T) int64,
        which start from 0 at each example and at the padding.
    """
    bins: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):  # first fit, the longest first
        size = len(example.input_ids)
        fitting = next((row for row in bins if sum(len(e.input_ids) for e in row) + size <= longest), None)
        if fitting is None:
            bins.append(fitting := [])
        fitting.append(example)
    ids, mask = _pad([np.concatenate([e.input_ids for e in row]) for row in bins], pad_id, "right")
    labels, _ = _pad([np.concatenate([np.append(np.int32(IGNORED), e.labels[1:]) for e in row]) for row in bins], IGNORED, "right")
    width = ids.shape[1]
    lengths = [[*(len(e.input_ids) for e in row), width - int(real)] for row, real in zip(bins, mask.sum(1), strict=True)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def prompts(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """The prompts alone, padded on the left so that generation continues at the last column: input_ids, attention_mask (B, T) int64."""
    ids, mask = _pad([e.input_ids[: e.prompt_length] for e in examples], pad_id, "left")
    return {"input_ids": ids, "attention_mask": mask}


def _pad(arrays: Sequence[np.ndarray], fill: int, side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, arrays))
    out = torch.full((len(arrays), width), fill, dtype=torch.int64)
    mask = torch.zeros((len(arrays), width), dtype=torch.int64)
    for row, values in enumerate(arrays):
        where = slice(0, len(values)) if side == "right" else slice(width - len(values), width)
        out[row, where] = torch.from_numpy(values.astype(np.int64))
        mask[row, where] = 1
    return out, mask
