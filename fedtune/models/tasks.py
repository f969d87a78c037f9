"""What a task's loss and scores are: causal LM, instruction tuning, sequence classification."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.data.encode import Example, collate, prompts
from fedtune.errors import DataError

PRIMARY = {"causal_lm": "perplexity", "instruction": "exact_match", "classification": "accuracy"}
IGNORED = -100  # the label of a position that does not count


def primary(task: TaskConfig) -> tuple[str, bool]:
    """The task's main metric, and whether higher is better."""
    name = "perplexity" if task.kind == "instruction" and not task.generate else PRIMARY[task.kind]
    return name, name != "perplexity"


def loss_sum(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, int]:
    """Summed loss and how much it sums over, so that accumulation over unequal micro-batches is exact.

    Args:
        model: Gives `logits`.
        batch: `input_ids`, `attention_mask` (B, T) and `labels`: (B, T) unshifted with -100 where a token does not count, or (B,) classes.
        task: `kind` counts.

    Returns:
        Cross-entropy in nats (float32, summed), and the number of counted tokens (or of examples, for classification).
    """
    logits, labels = _counted(model, batch, task)
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


def _counted(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """float32 logits (N, classes) and labels (N,) of everything that counts."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if task.kind == "classification":
        return model(**inputs).logits.float(), batch["labels"]
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    counts = labels != IGNORED
    return logits[counts].float(), labels[counts]  # picked out before the cast: padding and prompts cost no float32 copy


def evaluate(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int, num_labels: int = 0
) -> dict[str, float]:
    """The task's scores on these examples; the model's train or eval mode is as before afterwards.

    Returns:
        causal_lm: loss (nats a token), perplexity, tokens. instruction: loss and perplexity of the answers' tokens, and if `task.generate`
        exact_match: the share of greedily generated answers that equal the reference, but for white space at the ends. classification:
        loss, accuracy, macro_f1 (mean F1 of the classes that occur in labels or predictions).

    Raises:
        DataError: There is nothing to count.
    """
    if not examples:
        raise DataError("there are no examples to evaluate")
    pad = tokenizer.pad_token_id
    with _evaluating(model):
        total, count, guesses, truth = 0.0, 0, [], []
        decided: dict[int, bool] = {}
        for chunk in _by_length([len(e.input_ids) for e in examples], batch_size):
            batch = _to_device(collate([examples[i] for i in chunk], pad), model)
            logits, labels = _counted(model, batch, task)
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            if task.kind == "classification":
                guesses += logits.argmax(-1).tolist()
                truth += labels.tolist()
            elif task.kind == "instruction" and task.generate:
                sizes = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
                for i, said, wanted in zip(chunk, logits.argmax(-1).split(sizes), labels.split(sizes), strict=True):
                    verdict = _verdict(said.tolist(), wanted.tolist(), examples[i].answer, tokenizer, task.max_new_tokens)
                    if verdict is not None:
                        decided[i] = verdict
        if not count:
            raise DataError(f"none of the {len(examples)} examples has a token to score: see task.max_length={task.max_length}")
        loss = total / count
        if task.kind == "classification":
            hits = sum(g == t for g, t in zip(guesses, truth, strict=True))
            return {"loss": loss, "accuracy": hits / count, "macro_f1": macro_f1(truth, guesses)}
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a float at 709.8
        if task.kind == "causal_lm":
            return {**scores, "tokens": float(count)}
        if task.generate:
            open_ones = [e for i, e in enumerate(examples) if i not in decided]
            answers = generate_answers(model, tokenizer, open_ones, task, batch_size=batch_size)
            hits = sum(decided.values()) + sum(a == e.answer.strip() for a, e in zip(answers, open_ones, strict=True))
            scores["exact_match"] = hits / len(examples)
        return scores


def _verdict(said: list[int], wanted: list[int], answer: str, tokenizer: Any, max_new_tokens: int) -> bool | None:
    """Whether greedy generation gives the answer, where one forward pass over the reference decides it already; None where it does not.

    Up to the first token that differs, generation follows the reference; what comes then either still spells the answer in other tokens,
    and only generating tells, or it does not, and nothing that follows can mend it. So most rows of an evaluation need no generation.

    Args:
        said: Argmax at each counted position, given the reference before it.
        wanted: The reference: the answer's tokens and the end-of-sequence token.
        answer: The reference as text.
        tokenizer: Decodes; its `eos_token_id` ends an answer.
        max_new_tokens: Where generation would be cut.
    """
    end, wish = tokenizer.eos_token_id, answer.strip()
    if not wanted or len(wanted) > max_new_tokens or wanted[-1] != end:
        return None
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return None  # such decoders take back what they wrote ("do n" → "don't"), so that a prefix tells nothing
    first = next((j for j, (s, w) in enumerate(zip(said, wanted, strict=True)) if s != w), None)
    if first is None or said[first] == end:
        return tokenizer.decode(wanted[: len(wanted) - 1 if first is None else first], skip_special_tokens=True).strip() == wish
    text = tokenizer.decode([*wanted[:first], said[first]], skip_special_tokens=True).lstrip()
    if wish.startswith(text) or text.rstrip() == wish or "\ufffd" in text:  # the last: half a character, which the next token completes
        return None
    return False


def generate_answers(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> list[str]:
    """Greedy answers to the examples' prompts, stripped, in the order of the examples."""
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
            texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                out[index] = text.strip()
    return out


def macro_f1(truth: Sequence[int], guesses: Sequence[int]) -> float:
    """Mean over the classes that occur of 2·hits / (labelled + guessed)."""
    labelled, guessed = Counter(truth), Counter(guesses)
    hits = Counter(t for t, g in zip(truth, guesses, strict=True) if t == g)
    classes = labelled.keys() | guessed.keys()
    return math.fsum(2 * hits[c] / (labelled[c] + guessed[c]) for c in classes) / len(classes)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padded; the longest first, so that running out of memory shows at once."""
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
