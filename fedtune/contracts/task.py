"""Tasks: the columns of the rows, their encoding, the model class, the loss and the scores. Each task is one file in models/tasks/.

Fast commands and config checks import a task's module to read its columns, so it imports torch and transformers only inside the methods
that need them.
"""

import abc
import graphlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.config.bounds import require
from fedtune.config.registry import TASKS
from fedtune.contracts.rows import RowSet
from fedtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fedtune.config import Config, TaskConfig

IGNORED = -100  # label of a token without a loss, as in PyTorch's cross-entropy and transformers


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation example of T tokens.

    Args:
        input_ids: (T,) int32.
        labels: (T,) int32, -100 at tokens without a loss; not shifted, because models shift them. With a task head: (1,), such as the class
            id, or (L,) float32. Instruction with an encoder-decoder (`input_ids` are then the prompt): (1 + A,), -100 for the decoder's
            start token, then the answer.
        prompt_length: Instruction: number of tokens before the answer, at least 1; else 0.
        answer: Instruction: the full answer as text; else "".
        first: Number of tokens of the first of two sequences, a pair, that `input_ids` and `labels` join; 0: there is one sequence.
        reference: Log-probability of each sequence's targets under the reference model, summed, in nats; (): not computed.
    """

    input_ids: "np.ndarray"
    labels: "np.ndarray"
    prompt_length: int = 0
    answer: str = ""
    first: int = 0
    reference: tuple[float, ...] = ()

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.first, len(self.input_ids) - self.first)


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one example.

    Args:
        loss: Summed over `count` targets.
        count: Number of targets of the example.
        detail: Additional data for the task's metrics.
    """

    loss: float
    count: int
    detail: Any = None


class Task(abc.ABC):
    """One task with the settings of an experiment. It has no other state.

    Args:
        settings: The config's `task`.

    Attributes:
        columns: Columns that a row needs → type of their values: `text`, `class` (a name or an integer, stored as a class id), `classes`
            (any number of them, stored as bytes: 1 for each class that the row has, else 0), `number`, `numbers` (`task.outputs` numbers,
            stored as a list), `messages` (a conversation, see `data/messages.py`), `answers` (the last message of a conversation, stored as
            the whole; two such columns make a pair, and the source's column `prompt` may hold what comes before), or `raw` (stored as in
            the source). The column `label` is always a `class`.
        columns_hint: End of the error about a missing column, after "set data.columns.NAME".
        drops_blank: Text columns; a row with a blank value in one of them is dropped.
        metrics: Metric → whether higher is better, the primary metric first. The loss is the last metric of every task.
        classes: Targets are classes: their names are stored with the run, and there must be at least two.
        head: The task has its own head, which gives one row of logits per example and is trained with the adapter. Otherwise the loss is
            on the tokens that the model's output layer predicts.
        encoder_decoder: The task supports encoder-decoder models.
        gives_text: The trained model generates text, so `fedtune generate` and the engine can use it.
        noun, gives: Words for the trained model and its output in messages: "a classifier", "labels".
        prompted: Rows are prompts with answers: an export includes the prompt template, and a run shows sample answers.
        packs: Rows can be joined for training (task.packing).
        conversational: Rows are conversations in the model's chat template.
        sequences: Sequences of an example, which are neighboring rows of a batch.
        cross_entropy: The loss is the cross-entropy of one choice at each target, so its logits can be distilled.
        adapter_types: PEFT task types that select this task for an adapter folder without a fedtune task.
    """

    columns: ClassVar[Mapping[str, str]]
    columns_hint: ClassVar[str] = ""
    drops_blank: ClassVar[tuple[str, ...]] = ()
    metrics: ClassVar[Mapping[str, bool]]
    classes: ClassVar[bool] = False
    head: ClassVar[bool]
    encoder_decoder: ClassVar[bool] = True
    gives_text: ClassVar[bool]
    noun: ClassVar[str] = "a language model"
    gives: ClassVar[str] = "text"
    prompted: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    conversational: ClassVar[bool] = False
    sequences: ClassVar[int] = 1
    cross_entropy: ClassVar[bool] = False
    adapter_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: "TaskConfig") -> None:
        self.settings = settings

    # -- names, columns, checks: nothing here needs torch ---------------------------------------------------------------------------------

    def check(self, config: "Config") -> None:  # noqa: B027  most tasks go with any config
        """Raises ConfigError if the task conflicts with the rest of the config."""

    @property
    def primary(self) -> tuple[str, bool]:
        """The run's primary metric, and whether higher is better."""
        return next(iter(self.metrics.items()))

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens that an evaluation generates per answer; 0 if it does not generate."""
        return 0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with the one before the run, so that examples need their `reference`."""
        return False

    @property
    def longest_sequence(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self.settings.max_length // self.sequences

    @property
    def length_text(self) -> str:
        """The setting of `longest_sequence`, for a sentence."""
        return f"task.max_length={self.settings.max_length}" + (f" for {self.sequences} sequences" if self.sequences > 1 else "")

    @abc.abstractmethod
    def outputs(self, labels: int) -> int:
        """Outputs of the task's head for `labels` classes; 0 without a head."""

    @abc.abstractmethod
    def most_targets(self, length: int) -> int:
        """Maximum number of targets in a row of `length` tokens."""

    def usual_targets(self, length: int) -> int:
        """Typical number of targets in a row of `length` tokens, for memory estimates before any row is known."""
        return self.most_targets(length)

    @abc.abstractmethod
    def auto_class(self, encoder_decoder: bool) -> str:
        """Name of the transformers class that loads the model."""

    @abc.abstractmethod
    def peft_type(self, encoder_decoder: bool) -> str:
        """PEFT's name for the task."""

    def model_settings(self, outputs: int) -> dict[str, Any]:
        """Settings to add to the checkpoint's model config.

        Raises:
            ModelError: The task has no model with this number of outputs.
        """
        return {}

    # -- rows and batches -----------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """Encode rows as examples of at most `settings.max_length` tokens.

        Args:
            rows: Rows with the task's columns.
            tokenizer: The backbone's tokenizer.
            encoder_decoder: Whether the backbone is an encoder-decoder.
            keep_short: Whether a row that is too short for training becomes an example without a target; otherwise it is dropped.

        Raises:
            DataError: A row has no target.
        """

    def unusable(self, rows: RowSet, tokenizer: Any) -> str:
        """Why `encode` makes no example of these rows, for the end of an error."""
        return f"none of {len(rows)} rows has two tokens or more: give longer rows"

    @abc.abstractmethod
    def example_labels(self, ids: "Tensor", mask: "Tensor") -> "Tensor":
        """Labels for artificial rows (B, T) of token ids; `mask` is 0 at tokens that are not targets."""

    @abc.abstractmethod
    def count(self, example: Example) -> int:
        """Number of targets of one example."""

    @abc.abstractmethod
    def counts(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, P) bool: whether each of a row's P positions has a target."""

    def terms(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(M,): for each term of the loss its example in the batch, in ascending order; by default there is a term for each target."""
        return self.counts(batch).nonzero()[:, 0]

    def count_terms(self, example: Example) -> int:
        """Number of terms of the loss of one example."""
        return self.count(example)

    @abc.abstractmethod
    def targets(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, P, …): the target of each position; undefined at positions without a target."""

    def silence(self, batch: "dict[str, Tensor]", examples: "Tensor") -> None:  # noqa: B027  some tasks cannot remove a target
        """Remove the targets of the masked examples from the batch in place, if possible; the caller also gives them weight 0."""

    def decoder_mask(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, A) bool: whether each position of an encoder-decoder's decoder input is not padding."""
        return batch["attention_mask"].bool()

    # -- model and loss -------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def inputs(self, model: Any, batch: "Mapping[str, Tensor]") -> "dict[str, Any]":
        """Keyword arguments of the model's forward pass; tensors have one row per row of the batch."""

    @abc.abstractmethod
    def logits(self, model: Any, call: Callable[..., Any], places: int, choose: "Callable[[Tensor], Tensor]") -> "Tensor":
        """The model's logits, in its own dtype.

        Args:
            model: The model; its output layer may be hooked during the call.
            call: Runs the model on the inputs, with additional keyword arguments.
            places: P.
            choose: Selects the needed positions of (B, P, …), as (N, …). A task with a head does not call it: its head gives one row of
                logits per row of the batch.
        """

    @abc.abstractmethod
    def loss(self, logits: "Tensor", targets: "Tensor", reduction: str) -> "Tensor":
        """The loss of N positions from their float32 logits: (N,) if `reduction` is "none", their sum if it is "sum"."""

    def reduce(self, losses: "Tensor", batch: "Mapping[str, Tensor]") -> "Tensor":
        """(M,): the terms of the loss, in the order of `terms`, from the losses (N,) of all positions."""
        return losses

    # -- scores ---------------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """A score for each example of a batch.

        Args:
            logits: (N, …) float32 for all targets, in the order of the examples.
            targets: (N, …).
            sizes: Number of targets of each row of the batch.
            examples: The batch.
            tokenizer: The backbone's tokenizer.
        """

    def settle(
        self, model: Any, tokenizer: Any, examples: Sequence[Example], scores: Sequence[Score], *, batch_size: int
    ) -> Sequence[Score]:
        """The final scores, after steps that need more than a forward pass, such as generation."""
        return scores

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        """The metrics except the loss.

        Args:
            scores: At least one.
            loss: Mean loss per target.
        """
        return {}

    def summarize(self, scores: Sequence[Score]) -> dict[str, float]:
        """The metrics over examples.

        Raises:
            DataError: There are no examples or no targets.
        """
        if not scores:
            raise DataError("there are no examples to evaluate")
        count = sum(s.count for s in scores)
        if not count:
            length = self.settings.max_length
            raise DataError(f"none of the {len(scores)} examples has a token to score: task.max_length={length} is too small")
        loss = math.fsum(s.loss for s in scores) / count
        return {"loss": loss, **self.measure(scores, loss)}


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: There is no such task.
    """
    if name not in TASKS:
        require("task.kind", name, choices=TASKS.names())
    return TASKS.find(name)


def task_of(settings: "TaskConfig") -> Task:
    """The task of these settings.

    Raises:
        ConfigError: There is no such task.
    """
    return find(settings.kind)(settings)


def tasks() -> dict[str, type[Task]]:
    """Name → task."""
    return {name: find(name) for name in TASKS}


def tasks_with(**attributes: bool) -> str:
    """The names of the tasks with these attribute values, for a sentence: "classification or instruction"."""
    return " or ".join(name for name, task in tasks().items() if all(getattr(task, a) == value for a, value in attributes.items()))


def adapter_tasks() -> dict[str, str]:
    """PEFT's task type → the task of an adapter folder with this type."""
    return {peft: name for name, task in tasks().items() for peft in task.adapter_types}


def metrics() -> dict[str, bool]:
    """All tasks' metrics → whether higher is better. The order agrees with every task's ranking, so the first metric that a run reports is
    its primary metric.

    Raises:
        ConfigError: Two tasks disagree about a metric's direction or rank.
    """
    order, better = graphlib.TopologicalSorter[str](), {"loss": False}
    for name, task in tasks().items():
        for metric, higher in task.metrics.items():
            if better.setdefault(metric, higher) != higher:
                raise ConfigError(f"task {name} and another task disagree about whether higher {metric} is better: rename one metric")
        ranked = [*task.metrics, *(["loss"] if "loss" not in task.metrics else [])]
        order.add(ranked[0])
        for above, below in zip(ranked, ranked[1:], strict=False):
            order.add(below, above)
    try:
        return {metric: better[metric] for metric in order.static_order()}
    except graphlib.CycleError as bad:
        cycle = ", ".join(dict.fromkeys(bad.args[1]))
        raise ConfigError(f"tasks rank the metrics {cycle} in different orders: rename one metric") from None


def higher_is_better(metric: str) -> bool:
    """Whether higher is better. A number that is not a task's metric counts as higher-is-better, except train_loss and forgetting."""
    return metrics().get(metric.removeprefix("earlier_"), metric not in ("train_loss", "forgetting"))
