"""Encodings by hand, with a tokenizer of one token per word: a is 3, b is 4, ... h is 10; <s> is 0, </s> is 1, <pad> is 2."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from fedtune.config import TaskConfig
from fedtune.contracts.rows import RowSet
from fedtune.data.examples import Example, collate, encode, pad_id, prompts
from fedtune.errors import DataError
from tests.data.words import word_tokenizer


def instruction(prompt: str, answer: str, longest: int = 16, **kinds: bool) -> Example:
    rows = RowSet({"prompt": [prompt], "answer": [answer]})
    return encode(rows, np.array([0]), word_tokenizer(**kinds), TaskConfig(kind="instruction", max_length=longest))[0]


def texts(values: list[str], longest: int = 4, indices: list[int] | None = None, stride: bool = True, **kinds: bool) -> list[list[int]]:
    chosen = np.arange(len(values)) if indices is None else np.array(indices)
    task = TaskConfig(kind="causal_lm", max_length=longest, stride_texts=stride)
    result = encode(RowSet({"text": values}), chosen, word_tokenizer(**kinds), task)
    for example in result:
        assert_array_equal(example.input_ids, example.labels)
    return [example.input_ids.tolist() for example in result]


def test_only_the_answer_and_the_end_are_learned() -> None:
    example = instruction("a b", "c d")
    assert example.input_ids.tolist() == [0, 3, 4, 5, 6, 1]
    assert example.labels.tolist() == [-100, -100, -100, 5, 6, 1]
    assert (example.prompt_length, example.answer) == (3, "c d")
    assert example.input_ids.dtype == example.labels.dtype == np.int32


def test_a_long_prompt_loses_its_beginning_but_not_the_start_token() -> None:
    example = instruction("a b c d", "e f", longest=6)
    # answer and end take 3 of 6; <s> stays, and the last two words of the prompt
    assert example.input_ids.tolist() == [0, 5, 6, 7, 8, 1]
    assert example.prompt_length == 3
    without = instruction("a b c d", "e f", longest=6, bos=False)
    assert without.input_ids.tolist() == [4, 5, 6, 7, 8, 1]


def test_a_long_answer_loses_its_end_and_one_prompt_token_stays() -> None:
    example = instruction("a b", "c d e f g", longest=4)
    assert example.input_ids.tolist() == [4, 5, 6, 7]  # the prompt's last token, then the answer's first three
    assert example.labels.tolist() == [-100, 5, 6, 7]
    assert example.answer == "c d e f g"  # scored against all of it


@pytest.mark.parametrize(
    ("kinds", "prompt", "answer", "ids", "start"),
    [
        ({}, "", "a", [0, 3, 1], 1),
        ({"bos": False}, "", "a", [1, 3, 1], 1),  # no <s>: the end token replaces the empty prompt
        ({"bos": False, "eos": False}, "", "a", [0, 3], 1),  # only id 0 is left
        ({}, "a", "", [0, 3, 1], 2),  # the target of an empty answer is the end token
        ({"eos": False}, "a", "b", [0, 3, 4], 2),
    ],
)
def test_empty_parts_and_missing_special_tokens_are_encoded(
    kinds: dict[str, bool], prompt: str, answer: str, ids: list[int], start: int
) -> None:
    example = instruction(prompt, answer, **kinds)
    assert (example.input_ids.tolist(), example.prompt_length) == (ids, start)
    assert (example.labels[1:] != -100).any()  # after the shift there is something to learn


def test_an_empty_answer_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="an answer is empty and the tokenizer has no end token"):
        instruction("a", "", eos=False)


def test_no_example_is_longer_than_the_limit_or_without_loss() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        prompt, answer = (" ".join(rng.choice(list("abcdefg"), rng.integers(0, 9))) for _ in range(2))
        longest = int(rng.integers(2, 9))
        example = instruction(prompt, answer, longest, bos=bool(rng.integers(2)))
        assert 2 <= len(example.input_ids) <= longest
        assert (example.labels[1:] != -100).any()
        assert 1 <= example.prompt_length < len(example.input_ids)
        assert_array_equal(example.labels[: example.prompt_length], -100)


def test_texts_are_joined_with_end_tokens_and_cut_into_blocks() -> None:
    # <s> a b </s> | <s> c d e | </s>: the last block has one token and is left out
    assert texts(["a b", "c d e"]) == [[0, 3, 4, 1], [0, 5, 6, 7]]
    # without <s>: a b </s> c | d e </s>
    assert texts(["a b", "c d e"], bos=False) == [[3, 4, 1, 5], [6, 7, 1]]


def test_texts_are_encoded_separately() -> None:
    assert texts(["a b c d", "e"], stride=False) == [[0, 3, 4, 5], [0, 7, 1]]
    assert texts(["a", "b c"], stride=False, bos=False, eos=False) == [[4, 5]]  # one token alone predicts nothing


def test_only_the_selected_rows_are_encoded_in_order() -> None:
    assert texts(["a", "b", "c"], indices=[2, 0], longest=8) == [[0, 5, 1, 0, 3, 1]]
    assert texts(["a", "b"], indices=[]) == []
    assert texts(["", "a"], longest=8) == [[0, 3, 1]]


def test_classification_cuts_and_carries_the_class() -> None:
    rows = RowSet({"text": ["a b c d", ""], "label": [1, 0]})
    long, empty = encode(rows, np.arange(2), word_tokenizer(), TaskConfig(kind="classification", max_length=3))
    assert (long.input_ids.tolist(), long.labels.tolist()) == ([0, 3, 4], [1])
    assert (empty.input_ids.tolist(), empty.labels.tolist()) == ([0], [0])
    bare = encode(rows, np.array([1]), word_tokenizer(bos=False), TaskConfig(kind="classification"))
    assert bare[0].input_ids.tolist() == [1]  # a model needs one token at least


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer() -> None:
    rows = RowSet({"prompt": ["a b c d e", "", "a"], "answer": ["f g h a b", "c", ""]})
    task = TaskConfig(kind="instruction", max_length=4)
    long, empty, silent = encode(rows, np.arange(3), word_tokenizer(bos=False), task, seq2seq=True)
    # the prompt loses its beginning, the answer its end; each ends with </s> where it is not cut
    assert long.input_ids.tolist() == [5, 6, 7, 1] and long.labels.tolist() == [-100, 8, 9, 10, 3]
    assert (long.prompt_length, long.answer) == (4, "f g h a b")
    assert empty.input_ids.tolist() == [1] and empty.labels.tolist() == [-100, 5, 1]
    assert silent.input_ids.tolist() == [3, 1] and silent.labels.tolist() == [-100, 1]
    batch = collate([empty, long], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 9, 9, 9], [5, 6, 7, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 1, -100, -100], [-100, 8, 9, 10, 3]]
    assert collate([silent], pad_id=9)["labels"].tolist() == [[-100, 1]]
    assert prompts([empty, long], pad_id=9)["input_ids"].tolist() == [[9, 9, 9, 1], [5, 6, 7, 1]]
    bare = encode(rows.select([0]), np.array([0]), word_tokenizer(eos=False), task, seq2seq=True)[0]
    assert bare.input_ids.tolist() == [0, 5, 6, 7] and bare.labels.tolist() == [-100, 8, 9, 10, 3]
    with pytest.raises(DataError, match="an answer is empty and the tokenizer has no end token"):
        encode(rows, np.array([2]), word_tokenizer(eos=False), task, seq2seq=True)


def test_an_encoder_decoder_classifies_at_the_one_end_token() -> None:
    rows = RowSet({"text": ["a b c d", "a </s> b", ""], "label": [1, 0, 2]})
    examples = encode(rows, np.arange(3), word_tokenizer(bos=False), TaskConfig(kind="classification", max_length=3), seq2seq=True)
    assert [e.input_ids.tolist() for e in examples] == [[3, 4, 1], [3, 4, 1], [1]]
    assert [e.labels.tolist() for e in examples] == [[1], [0], [2]]


def test_collate_pads_on_either_side() -> None:
    batch = [instruction("a", "b"), instruction("a b", "c d")]
    right = collate(batch, pad_id=9)
    assert right["input_ids"].tolist() == [[0, 3, 4, 1, 9, 9], [0, 3, 4, 5, 6, 1]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert right["labels"].tolist() == [[-100, -100, 4, 1, -100, -100], [-100, -100, -100, 5, 6, 1]]
    left = collate(batch, pad_id=9, side="left")
    assert left["input_ids"].tolist()[0] == [9, 9, 0, 3, 4, 1]
    assert left["labels"].tolist()[0] == [-100, -100, -100, -100, 4, 1]
    assert {tensor.dtype for tensor in right.values()} == {torch.int64}


def test_collate_gives_class_ids_as_a_vector() -> None:
    one = np.array([3], np.int32)
    batch = [Example(np.array([0, 3], np.int32), one), Example(one, np.array([2], np.int32))]
    assert collate(batch, 0)["labels"].tolist() == [3, 2]


def test_prompts_are_padded_on_the_left_and_hold_no_answer() -> None:
    batch = prompts([instruction("a", "b"), instruction("a b", "c d")], pad_id=9)
    assert batch["input_ids"].tolist() == [[9, 0, 3], [0, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(("kinds", "expected"), [({"pad": True}, 2), ({}, 1), ({"eos": False}, 0)])
def test_the_padding_token_of_a_tokenizer(kinds: dict[str, Any], expected: int) -> None:
    assert pad_id(word_tokenizer(**kinds)) == expected
