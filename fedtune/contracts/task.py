"""What a task is: the columns of its rows, their encoding, the model class, the loss, the scores. Each task is one file in models/tasks/.

The config names tasks, and quick commands ask for their columns, so a task's module imports torch and transformers inside the methods that
need them.
"""

import abc
import graphlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.config.bounds import require
from fedtune.config.registry import TASKS
from fedtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from torch import Tensor

    from fedtune.config import Config, TaskConfig

IGNORED = -100  # the label of a token without a loss, as PyTorch's cross-entropy and transformers have it


@dataclass(frozen=True, slots=True)
class Example:
    """One training or evaluation example of T tokens.

    Args:
        input_ids: (T,) int32.
        labels: (T,) int32, -100 where there is no loss; not shifted, models do that. Of a task with a head: (1,), such as the class id, or
            (L,) float32. Instruction for an encoder-decoder, whose `input_ids` are the prompt: (1 + A,), -100 for the decoder's start
            token, then the answer.
        prompt_length: Instruction: tokens before the answer, at least 1; else 0.
        answer: Instruction: the whole answer as text; else "".
    """

    input_ids: "np.ndarray"
    labels: "np.ndarray"
    prompt_length: int = 0
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one example.

    Args:
        loss: Summed over `count` targets.
        count: Targets of the example.
        detail: What the task's metrics need beside the loss.
    """

    loss: float
    count: int
    detail: Any = None


class Task(abc.ABC):
    """One task with the settings of an experiment; it holds nothing else.

    Args:
        settings: The config's `task`.

    Attributes:
        columns: The columns that a row needs → what their values are: `text`, `class` (a name or a whole number, stored as a class id),
            `number`, or `raw` (stored as the source has it). The column `label` is always a `class`.
        columns_hint: Ends the error about a missing column, after "set data.columns.NAME".
        drops_blank: Columns of text; a row that has nothing in one of them is left out.
        metrics: Metric → whether higher is better, the primary metric first. The loss is the last metric of every task.
        classes: The targets are classes: their names are stored with the run, and at least two must be known.
        head: A head of the task's own, with one row of logits for an example, is trained with the adapter; otherwise the loss is on the
            tokens that the model's output layer predicts.
        encoder_decoder: An encoder-decoder can do the task.
        gives_text: The trained model gives text: it can be used with `fedtune generate` and the engine.
        noun, gives: What the trained model is and what it gives, for sentences: "a classifier", "labels".
        prompted: Rows are prompts with answers: an export keeps the prompt template, and a run shows sample answers.
        adapter_types: PEFT task types that this task stands for where a bare adapter folder does not name a task of ours.
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
    adapter_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: "TaskConfig") -> None:
        self.settings = settings

    # -- names, columns, refusals: nothing here needs torch -------------------------------------------------------------------------------

    def check(self, config: "Config") -> None:  # noqa: B027  most tasks go with any config
        """Raises ConfigError where the task does not go with the rest of the config."""

    @property
    def primary(self) -> tuple[str, bool]:
        """The metric that a run is judged by, and whether higher is better."""
        return next(iter(self.metrics.items()))

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer that an evaluation generates; 0 where it generates none."""
        return 0

    @abc.abstractmethod
    def outputs(self, labels: int) -> int:
        """Outputs of the task's head where the data has so many classes; 0 without a head."""

    @abc.abstractmethod
    def most_targets(self, length: int) -> int:
        """The most targets of a row of `length` tokens."""

    def usual_targets(self, length: int) -> int:
        """Targets of a row of `length` tokens, for an estimate of memory before any row is known."""
        return self.most_targets(length)

    @abc.abstractmethod
    def auto_class(self, encoder_decoder: bool) -> str:
        """Name of the class of transformers that loads the model."""

    @abc.abstractmethod
    def peft_type(self, encoder_decoder: bool) -> str:
        """PEFT's name of the task."""

    def model_settings(self, outputs: int) -> dict[str, Any]:
        """What the model's config needs beside the checkpoint's own.

        Raises:
            ModelError: The task has no model with so many outputs.
        """
        return {}

    # -- rows and batches -----------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def encode(self, rows: "datasets.Dataset", tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """The rows as examples of at most `settings.max_length` tokens.

        Args:
            rows: They have the task's columns.
            tokenizer: The backbone's.
            encoder_decoder: Whether the backbone reads the input in an encoder and writes the answer with a decoder.
            keep_short: Whether a row that is too short to teach anything becomes an example without a target, instead of none.

        Raises:
            DataError: A row has no target.
        """

    @abc.abstractmethod
    def example_labels(self, ids: "Tensor", mask: "Tensor") -> "Tensor":
        """Labels for made-up rows (B, T) of token ids; `mask` is 0 where a token is not a target."""

    @abc.abstractmethod
    def count(self, example: Example) -> int:
        """Targets of one example."""

    @abc.abstractmethod
    def counts(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, P) bool: which of each row's P places has a target."""

    @abc.abstractmethod
    def targets(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, P, …): the target of each place; without meaning where there is none."""

    def silence(self, batch: "dict[str, Tensor]", rows: "Tensor") -> None:  # noqa: B027  where a target cannot be taken away
        """Take the targets of the rows (B,) bool out of the batch, in place, if the task can; the caller weights them with 0 as well."""

    def decoder_mask(self, batch: "Mapping[str, Tensor]") -> "Tensor":
        """(B, A) bool: which positions that an encoder-decoder's decoder reads are not padding."""
        return batch["attention_mask"].bool()

    # -- model and loss -------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def inputs(self, model: Any, batch: "Mapping[str, Tensor]") -> "dict[str, Any]":
        """Keyword arguments of the model's forward pass; tensors have a row for each row of the batch."""

    @abc.abstractmethod
    def logits(self, model: Any, call: Callable[..., Any], places: int, choose: "Callable[[Tensor], Tensor]") -> "Tensor":
        """The model's logits, in its own dtype.

        Args:
            model: The model, whose output layer may be hooked for the time of the call.
            call: Runs it on the inputs, with further keyword arguments.
            places: P.
            choose: Takes from (B, P, …) the places that are wanted, as (N, …); not called by a task with a head, which gives one row of
                logits for each row of the batch.
        """

    @abc.abstractmethod
    def loss(self, logits: "Tensor", targets: "Tensor", reduction: str) -> "Tensor":
        """The loss of N places from their float32 logits: (N,) if `reduction` is "none", their sum if it is "sum"."""

    # -- scores ---------------------------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def score(self, logits: "Tensor", targets: "Tensor", sizes: Sequence[int], examples: Sequence[Example], tokenizer: Any) -> list[Score]:
        """A score for each example of a batch.

        Args:
            logits: (N, …) float32, of all examples' targets, one example after the other.
            targets: (N, …).
            sizes: Targets of each example.
            examples: The batch.
            tokenizer: The backbone's.
        """

    def settle(
        self, model: Any, tokenizer: Any, examples: Sequence[Example], scores: Sequence[Score], *, batch_size: int
    ) -> Sequence[Score]:
        """The final scores, after whatever needs more than a forward pass."""
        return scores

    def measure(self, scores: Sequence[Score], loss: float) -> dict[str, float]:
        """The metrics beside the loss.

        Args:
            scores: At least one.
            loss: The mean loss of a target.
        """
        return {}

    def summarize(self, scores: Sequence[Score]) -> dict[str, float]:
        """The metrics of some examples.

        Raises:
            DataError: There is no example or no target.
        """
        if not scores:
            raise DataError("there are no examples to evaluate")
        count = sum(s.count for s in scores)
        if not count:
            raise DataError(f"none of the {len(scores)} examples has a token to score: see task.max_length={self.settings.max_length}")
        loss = math.fsum(s.loss for s in scores) / count
        return {"loss": loss, **self.measure(scores, loss)}


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: There is no such task.
    """
    require("task.kind", name, choices=TASKS.names())
    return TASKS.find(name, Task)


def task_of(settings: "TaskConfig") -> Task:
    """The task of these settings.

    Raises:
        ConfigError: There is no such task.
    """
    return find(settings.kind)(settings)


def tasks() -> dict[str, type[Task]]:
    """Every task by its name."""
    return {name: find(name) for name in TASKS}


def tasks_with(**attributes: bool) -> str:
    """The names of the tasks that have these attributes, for a sentence: "classification or instruction"."""
    return " or ".join(name for name, task in tasks().items() if all(getattr(task, a) == value for a, value in attributes.items()))


def adapter_tasks() -> dict[str, str]:
    """PEFT's task type → the task that a bare adapter folder of that type is for."""
    return {peft: name for name, task in tasks().items() for peft in task.adapter_types}


def metrics() -> dict[str, bool]:
    """Every task's metrics → whether higher is better. A metric comes before those that a task ranks below it, so the first that a run
    reports is its primary metric.

    Raises:
        ConfigError: Two tasks disagree about a metric's direction or rank.
    """
    order, better = graphlib.TopologicalSorter[str](), {"loss": False}
    for name, task in tasks().items():
        for metric, higher in task.metrics.items():
            if better.setdefault(metric, higher) != higher:
                raise ConfigError(f"task {name} says the opposite of another task about whether higher {metric} is better: rename one")
        ranked = [*task.metrics, *(["loss"] if "loss" not in task.metrics else [])]
        order.add(ranked[0])
        for above, below in zip(ranked, ranked[1:], strict=False):
            order.add(below, above)
    try:
        return {metric: better[metric] for metric in order.static_order()}
    except graphlib.CycleError as bad:
        raise ConfigError(f"tasks rank the metrics {', '.join(dict.fromkeys(bad.args[1]))} in different orders: rename one") from None


def higher_is_better(metric: str) -> bool:
    """Whether a higher value is the better one; of a number that is no task's metric, yes, unless it is a loss."""
    return metrics().get(metric, metric != "train_loss")
