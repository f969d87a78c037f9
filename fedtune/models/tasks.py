"""What a task's loss and scores are: causal LM, instruction tuning, sequence classification."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtune.config import TaskConfig
from fedtune.data.examples import Example, collate, prompts
from fedtune.errors import DataError
from fedtune.models.backbone import is_seq2seq

PRIMARY = {"causal_lm": "perplexity", "instruction": "exact_match", "classification": "accuracy"}
_PIECE = 1 << 22  # logits that are float32 at once in training
IGNORED = -100  # the label of a position that does not count


def primary(task: TaskConfig) -> tuple[str, bool]:
    """The task's main metric, and whether higher is better."""
    name = "perplexity" if task.kind == "instruction" and not task.generate else PRIMARY[task.kind]
    return name, name != "perplexity"


def loss_sum(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, int]:
    """Summed loss and how much it sums over, so that accumulation over unequal micro-batches is exact.

    Args:
        model: Gives `logits`.
        batch: `input_ids`, `attention_mask` (B, T) and `labels`: (B, T) unshifted with -100 where a token does not count, or (B,) classes,
            or of an encoder-decoder (B, 1 + A), the answers behind their start.
        task: `kind` counts.

    Returns:
        Cross-entropy in nats (float32, summed), and the number of counted tokens (or of examples, for classification).
    """
    logits, labels = _counted(model, batch, task)
    if logits.dtype == torch.float32:
        return _nats(logits, labels), len(labels)
    # in narrow logits, the float32 copy and its log-softmax would be most of what a step needs at its end: they are made a piece at a time
    rows = max(1, _PIECE // logits.shape[-1])
    pieces = zip(logits.split(rows), labels.split(rows), strict=True)
    losses = [checkpoint(_nats, some, wanted, use_reentrant=False, preserve_rng_state=False) for some, wanted in pieces]
    return torch.stack(losses).sum(), len(labels)


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def counted_logits(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """float32 logits (N, classes) and labels (N,) of everything that counts, row by row.

    The output layer sees only the positions that have a label: with a large vocabulary, its product and its float32 logits over prompts and
    padding would cost more than the backbone.
    """
    logits, labels = _counted(model, batch, task)
    return logits.float(), labels


def _counted(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """`counted_logits` in the dtype that the model gives them in."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if task.kind == "classification":
        return model(**inputs).logits, batch["labels"]
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    if _is_seq2seq(model):  # the decoder reads its start token and the answer
        inputs["decoder_input_ids"] = cast(Any, model).prepare_decoder_input_ids_from_labels(F.pad(labels, (0, 1), value=IGNORED))
    speaking = F.pad(counts, (0, 1))  # (B, T): the last position predicts nothing that is known
    head = cast(Any, model).get_output_embeddings()
    length = labels.shape[1] + 1  # virtual tokens, which a prompt puts before the sequence, drop out
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, -length:][speaking],))
    try:
        return model(**inputs, use_cache=False).logits, labels[counts]
    finally:
        hook.remove()


def _is_seq2seq(model: nn.Module) -> bool:
    return is_seq2seq(getattr(model, "config", None))


@dataclass(frozen=True, slots=True)
class Score:
    """What one example says: loss in nats summed over `count` tokens (or itself); its class and the guess; whether its answer is right."""

    loss: float
    count: int
    label: int = -1
    guess: int = -1
    hit: bool = False


def evaluate(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> dict[str, float]:
    """The task's scores on these examples; the model's train or eval mode is as before afterwards.

    Returns:
        causal_lm: loss (nats a token), perplexity, tokens. instruction: loss and perplexity of the answers' tokens, and if `task.generate`
        exact_match: the share of greedily generated answers that equal the reference, but for white space at the ends. classification:
        loss, accuracy, macro_f1 (mean F1 of the classes that occur in labels or predictions).

    Raises:
        DataError: There is nothing to count.
    """
    return summarise(score_examples(model, tokenizer, examples, task, batch_size=batch_size), task)


def score_examples(model: nn.Module, tokenizer: Any, examples: Sequence[Example], task: TaskConfig, *, batch_size: int) -> list[Score]:
    """One score an example, in their order: of one client, or of many at once."""
    scores: list[Score | None] = [None] * len(examples)
    unsure: list[int] = []
    with _evaluating(model):
        for chunk in _by_length([len(e.input_ids) for e in examples], batch_size):
            batch = _to_device(collate([examples[i] for i in chunk], tokenizer.pad_token_id), model)
            logits, labels = counted_logits(model, batch, task)
            each = F.cross_entropy(logits, labels, reduction="none")
            guesses = logits.argmax(-1)
            if task.kind == "classification":
                for i, loss, label, guess in zip(chunk, each.tolist(), labels.tolist(), guesses.tolist(), strict=True):
                    scores[i] = Score(loss, 1, label, guess)
                continue
            sizes = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
            for i, losses, said, wanted in zip(chunk, each.split(sizes), guesses.split(sizes), labels.split(sizes), strict=True):
                verdict: bool | None = False
                if task.kind == "instruction" and task.generate:
                    verdict = _verdict(said.tolist(), wanted.tolist(), examples[i].answer, tokenizer, task.max_new_tokens)
                if verdict is None:
                    unsure.append(i)
                scores[i] = Score(losses.sum().item(), len(losses), hit=bool(verdict))
        answers = generate_answers(model, tokenizer, [examples[i] for i in unsure], task, batch_size=batch_size)
    for i, answer in zip(unsure, answers, strict=True):
        score = scores[i]
        assert score is not None
        scores[i] = replace(score, hit=answer == examples[i].answer.strip())
    return [s for s in scores if s is not None]


def summarise(scores: Sequence[Score], task: TaskConfig) -> dict[str, float]:
    """The metrics of `evaluate` from its examples' scores."""
    if not scores:
        raise DataError("there are no examples to evaluate")
    count = sum(s.count for s in scores)
    if not count:
        raise DataError(f"none of the {len(scores)} examples has a token to score: see task.max_length={task.max_length}")
    loss = math.fsum(s.loss for s in scores) / count
    if task.kind == "classification":
        truth, guesses = [s.label for s in scores], [s.guess for s in scores]
        hits = sum(g == t for g, t in zip(guesses, truth, strict=True))
        return {"loss": loss, "accuracy": hits / count, "macro_f1": macro_f1(truth, guesses)}
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a float at 709.8
    if task.kind == "causal_lm":
        metrics["tokens"] = float(count)
    elif task.generate:
        metrics["exact_match"] = sum(s.hit for s in scores) / len(scores)
    return metrics


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
            begun = 1 if _is_seq2seq(model) else batch["input_ids"].shape[1]  # the decoder's start token, or the prompt
            texts = tokenizer.batch_decode(tokens[:, begun:], skip_special_tokens=True)
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
