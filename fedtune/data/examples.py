"""Rows → token ids with labels, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.errors import DataError

IGNORE = -100  # a label without loss, as torch's cross-entropy and transformers have it


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation example of T tokens.

    Args:
        input_ids: (T,) int32.
        labels: (T,) int32, -100 where there is no loss; not shifted, models do that. Classification: (1,), the class id. Instruction for an
            encoder-decoder, whose `input_ids` are the prompt: (1 + A,), -100 for the decoder's start token, then the answer.
        prompt_length: Instruction: tokens before the answer, at least 1; else 0.
        answer: Instruction: the whole answer as text; else "".
    """

    input_ids: np.ndarray
    labels: np.ndarray
    prompt_length: int = 0
    answer: str = ""


def encode(
    rows: datasets.Dataset, indices: np.ndarray, tokenizer: Any, task: TaskConfig, *, seq2seq: bool = False, keep_short: bool = False
) -> list[Example]:
    """The rows at `indices` as examples of at most `task.max_length` tokens.

    instruction: prompt + answer + end token, loss on the answer and the end. Too long: the prompt loses its beginning, but one token of it
    stays; an answer that is longer still loses its end.
    causal_lm: texts, each with its end token, joined in the order of `indices` and cut into blocks (`stride_texts`), or one text an
    example, cut. What has fewer than two tokens can teach nothing and is left out, so the list may be empty; `keep_short` keeps
    it as an example without a loss, so that the count of examples does not tell how long a text is.
    classification: one text an example, cut, with the tokeniser's special tokens.
    seq2seq (an encoder-decoder, T5): of an instruction, prompt and answer each have `task.max_length` tokens of their own, and each its end
    token; a text to classify has one end token, its last, where T5 looks.

    Prompts and texts begin as the tokeniser begins them (Llama's <s>, nothing for GPT-2), so that training sees what generation will.

    Raises:
        DataError: An answer without a single token to learn.
    """
    if not len(indices):
        return []
    chosen = rows.select(np.asarray(indices).tolist())
    if task.kind == "instruction" and seq2seq:
        return _pairs(chosen["prompt"][:], chosen["answer"][:], tokenizer, task.max_length)
    if task.kind == "instruction":
        return _instructions(chosen["prompt"][:], chosen["answer"][:], tokenizer, task.max_length)
    if task.kind == "classification":
        return _classes(chosen["text"][:], chosen["label"][:], tokenizer, task.max_length, ended=seq2seq)
    return _texts(chosen["text"][:], tokenizer, task, keep_short)


def pad_id(tokenizer: Any) -> int:
    """What to pad with: the pad token, else the end token, else 0; the mask hides it either way."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids without special tokens."""
    # verbose=False: it would warn of texts beyond the model's context, which are cut below
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def _lead(tokenizer: Any) -> list[int]:
    """[bos] if this tokeniser begins texts with it by itself."""
    begun = tokenizer("", add_special_tokens=True).input_ids
    return [tokenizer.bos_token_id] if begun and begun[0] == tokenizer.bos_token_id else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _first(tokenizer: Any) -> int:
    """What stands for a text without any token: a model needs at least one."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)


def _instructions(prompts: list[str], answers: list[str], tokenizer: Any, longest: int) -> list[Example]:
    lead, end, out = _lead(tokenizer), _end(tokenizer), []
    for text, prompt, answer in zip(answers, _tokens(prompts, tokenizer), _tokens(answers, tokenizer), strict=True):
        answer = (answer + end)[: longest - 1]
        _require(answer)
        room = longest - len(answer)
        kept = lead[: room - 1] if prompt else lead
        prompt = kept + prompt[max(0, len(prompt) - (room - len(kept))) :] or [_first(tokenizer)]
        ids = np.array(prompt + answer, np.int32)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE
        out.append(Example(ids, labels, len(prompt), text))
    return out


def _pairs(prompts: list[str], answers: list[str], tokenizer: Any, longest: int) -> list[Example]:
    lead, end, out = _lead(tokenizer), _end(tokenizer), []
    for text, prompt, answer in zip(answers, _tokens(prompts, tokenizer), _tokens(answers, tokenizer), strict=True):
        answer = (answer + end)[:longest]
        _require(answer)
        room = longest - len(lead) - len(end)
        prompt = lead + prompt[max(0, len(prompt) - room) :] + end or [_first(tokenizer)]
        out.append(Example(np.array(prompt, np.int32), np.array([IGNORE, *answer], np.int32), len(prompt), text))
    return out


def _require(answer: list[int]) -> None:
    if not answer:
        raise DataError("an answer is empty and the tokeniser has no end token: there is nothing to learn; leave such rows out")


def _classes(texts: list[str], classes: list[int], tokenizer: Any, longest: int, *, ended: bool) -> list[Example]:
    coded = tokenizer(texts, truncation=True, max_length=longest, return_attention_mask=False).input_ids
    if ended:  # one end token, also where the tokeniser writes none or the text spells it
        end = _end(tokenizer)
        coded = [[i for i in ids if i not in end][: longest - 1] + end for ids in coded]
    first = _first(tokenizer)
    return [Example(np.array(ids or [first], np.int32), np.array([label], np.int32)) for ids, label in zip(coded, classes, strict=True)]


def _texts(texts: list[str], tokenizer: Any, task: TaskConfig, keep_short: bool) -> list[Example]:
    lead, end = _lead(tokenizer), _end(tokenizer)
    coded = [lead + ids + end if ids else [] for ids in _tokens(texts, tokenizer)]
    if task.stride_texts:
        joined = np.array([i for ids in coded for i in ids], np.int32)
        pieces = [joined[at : at + task.max_length] for at in range(0, len(joined), task.max_length)]
    else:
        pieces = [np.array(ids[: task.max_length], np.int32) for ids in coded]
    silent = Example(np.full(2, _first(tokenizer), np.int32), np.full(2, IGNORE, np.int32))
    return [Example(ids, ids) if len(ids) >= 2 else silent for ids in pieces if keep_short or len(ids) >= 2]


def collate(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"] = "right") -> dict[str, Tensor]:
    """A batch of B examples, padded to the longest, T.

    Returns:
        input_ids (B, T) int64; attention_mask (B, T) int64, 1 on tokens; labels (B, T) int64, -100 on padding, or (B,) class ids; of
        answers of an encoder-decoder (B, 1 + A).
    """
    ids, mask = _pad([e.input_ids for e in examples], pad_id, side)
    if all(len(e.labels) == 1 for e in examples):  # token examples have two labels at least
        labels = torch.tensor([int(e.labels[0]) for e in examples])
    else:
        labels, _ = _pad([e.labels for e in examples], IGNORE, side)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompts(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """The prompts alone, padded on the left so that generation goes on from the last column: input_ids and attention_mask, (B, T) int64."""
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
