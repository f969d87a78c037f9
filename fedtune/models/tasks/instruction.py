"""Instruction tuning: an answer to a prompt, scored by exact match of the greedily generated answer."""

from typing import Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example
from fedtune.errors import DataError
from fedtune.models.tasks._answers import AnswerTask


class Instruction(AnswerTask):
    """The answer's tokens and its end token are the targets. The metrics are those of `AnswerTask`."""

    columns = {"prompt": "text", "answer": "text"}
    columns_hint = " or the templates data.prompt and data.answer"
    adapter_types = ("SEQ_2_SEQ_LM",)

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """Prompt, answer, end token. If they are too long, the prompt is truncated from its start, down to one token, and then the answer
        from its end.

        For an encoder-decoder, prompt and answer each have up to `max_length` tokens and an end token.

        Raises:
            DataError: An answer has no tokens.
        """
        from fedtune.data.examples import begin, end, filler, token_ids

        lead, last, longest = begin(tokenizer), end(tokenizer), self.settings.max_length
        prompts, texts, out = token_ids(rows["prompt"][:], tokenizer), rows["answer"][:], []
        for text, prompt, answer in zip(texts, prompts, token_ids(texts, tokenizer), strict=True):
            answer = (answer + last)[: longest if encoder_decoder else longest - 1]
            if not answer:
                raise DataError("an answer is empty and the tokenizer has no end token, so the row has no target: remove such rows")
            if encoder_decoder:
                room = longest - len(lead) - len(last)
                prompt = lead + prompt[max(0, len(prompt) - room) :] + last or [filler(tokenizer)]
            else:
                room = longest - len(answer)
                kept = lead[: room - 1] if prompt else lead
                prompt = kept + prompt[max(0, len(prompt) - (room - len(kept))) :] or [filler(tokenizer)]
            out.append(_example(prompt, answer, text, encoder_decoder=encoder_decoder))
        return out


def _example(prompt: list[int], answer: list[int], text: str, *, encoder_decoder: bool) -> Example:
    import numpy as np

    if encoder_decoder:  # the first label is a placeholder for the decoder's start token
        return Example(np.array(prompt, np.int32), np.array([IGNORED, *answer], np.int32), len(prompt), text)
    ids = np.array(prompt + answer, np.int32)
    labels = ids.copy()
    labels[: len(prompt)] = IGNORED
    return Example(ids, labels, len(prompt), text)
