"""PEFT methods, one file a family. Each attaches to a model in place, names what it trains, and says how it is handed off."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedtune.errors import FedtuneError, ModelError

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

    from fedtune.config import PeftConfig, TaskConfig
    from fedtune.state import AdapterState

_HOME = {
    "lora": "lora",
    "rslora": "lora",
    "dora": "lora",
    "ia3": "ia3",
    "prompt": "prompt",
    "prefix": "prefix",
    "adapter": "bottleneck",
    "ptuning_v2": "prompt_layers",
    "bitfit": "bitfit",
    "full": "full",
}


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A method on a model, ready to train.

    Args:
        model: What to call instead of the bare model, with the same inputs.
        parameters: Canonical name → live parameter (float32, requires a gradient), a classifier's head included.
        names: Canonical name → the parameter's name in `model`.
        disabled: A context in which the model is the untouched backbone, a classifier with the head that it was loaded with.
        save: Writes the live adapter as a folder that `PeftModel.from_pretrained` opens; None where PEFT does not know the method.
        origin: Canonical name → the frozen value that the state is relative to, for tensors that are the backbone's own (biases, all
            weights, DoRA's magnitudes): state = parameter − origin. So a server, which has no backbone, starts from zeros. A head's tensors
            have none.
        ranks: LoRA family: module → rank.
        scaling: LoRA family: module → factor s.
    """

    model: "nn.Module"
    parameters: "Mapping[str, nn.Parameter]"
    names: Mapping[str, str]
    disabled: Callable[[], AbstractContextManager[None]]
    save: Callable[[Path], None] | None = None
    origin: "Mapping[str, Tensor]" = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol):
    """What the file of a method offers, as functions."""

    def attach(self, model: "PreTrainedModel", peft: "PeftConfig", task: "TaskConfig") -> Attached:
        """Change the model in place.

        The model may lie on the meta device, to learn names and shapes without weights. Every parameter of the model is frozen before.

        Raises:
            ModelError: The method makes no sense on this architecture or task.
        """
        ...

    def initial(self, name: str, shape: tuple[int, ...], peft: "PeftConfig", generator: "Generator", std: float) -> "Tensor":
        """Version 0 of a tensor that is neither of a head nor relative to an origin, float32, from its name and shape alone.

        Args:
            name: Canonical.
            shape: Its shape.
            peft: Method and settings.
            generator: This tensor's own.
            std: The architecture's initializer_range.
        """
        ...

    def merge(self, model: "PreTrainedModel", state: "AdapterState") -> None:
        """Put a state (without head) into the weights of a bare float32 backbone, in place; sums in float64, rounded once.

        A method that no weights can express has no `merge`: then the backbone is exported with the adapter beside it.

        Raises:
            ModelError: The state names what the model lacks, or has another shape.
        """
        ...


def method(name: str) -> Method:
    """The file of a method; loads torch and PEFT."""
    return importlib.import_module(f"fedtune.models.methods.{_HOME[name]}")  # pyright: ignore[reportReturnType]


def attach(model: "PreTrainedModel", peft: "PeftConfig", task: "TaskConfig") -> Attached:
    """Attach the method that peft.method names; whatever goes wrong becomes a sentence.

    Raises:
        ModelError: The method, its targets or PEFT's own rules do not fit the architecture.
    """
    try:
        return method(peft.method).attach(model, peft, task)
    except FedtuneError:
        raise
    except Exception as bad:  # PEFT's own rules for an architecture, and the model's code, raise what they like
        said = (str(bad).strip().splitlines() or [type(bad).__name__])[0]
        raise ModelError(
            f"peft.method={peft.method} with peft.targets={peft.targets} does not fit the architecture '{model.config.model_type}':"
            f" {said.rstrip('.')}: name other layers in peft.targets, or take another peft.method"
        ) from None


def mergeable(name: str) -> bool:
    """Whether weights alone can express the method."""
    return hasattr(method(name), "merge")


@contextmanager
def swapped(values: "Mapping[nn.Parameter, Tensor]") -> Iterator[None]:
    """Within it, the parameters hold these values; afterwards their own."""
    kept = {p: p.data for p in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value
