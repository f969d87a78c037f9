"""PEFT methods: `peft.method=NAME` is the file NAME.py of this folder.

A method's file attaches the method to a model and says what the rest of fedtune must know of it.

A method is added with its file and `conf/peft/NAME.yaml`; nothing else lists methods. Files that methods share begin with `_`. A method's
file loads neither PEFT nor transformers before `attach` is called, so that inference can ask it what an adapter does to a weight.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedtune.config import PeftConfig, TaskConfig
from fedtune.config.method_files import METHODS
from fedtune.errors import FedtuneError, ModelError

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

__all__ = ["SLOT", "Attached", "Change", "DecoderShape", "Edit", "Method", "attach", "mergeable", "method", "swapped"]

SLOT = "default"  # PEFT's name of the one adapter


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
        keeps_inputs: Modules of the backbone whose input a training step keeps for the backward pass; for estimates of memory.
    """

    model: "nn.Module"
    parameters: "Mapping[str, nn.Parameter]"
    names: Mapping[str, str]
    disabled: Callable[[], AbstractContextManager[None]]
    save: Callable[[Path], None] | None = None
    origin: "Mapping[str, Tensor]" = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    keeps_inputs: Iterable[str] = ()


# Rows a to b of a tensor, float64 → the same rows, changed. Rows of a linear layer's weight are outputs, also where it is kept as (in, out)
Edit = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an adapter does to one tensor of its backbone.

    Args:
        name: Of the tensor.
        shape: That the adapter expects it to have; of a linear layer's weight, (out, in).
        edit: Its arithmetic, on some rows at a time.
        linear: It must be the weight of a linear layer that is not tied to the embedding.
    """

    name: str
    shape: tuple[int, ...]
    edit: Edit
    linear: bool = False


class DecoderShape(Protocol):
    """The sizes of a decoder that virtual tokens depend on."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the file of a method offers, under these names. Those with a default may be missing, but for one of `edits` and `beside`.

    A file whose method begins otherwise than with peft.init=default too has the constant `inits` besides, a tuple of strings, which
    `fedtune.config.method_files` reads.

    Args:
        attach: Changes a model in place: (model, peft, task) → `Attached`. The model may lie on the meta device, to learn names and shapes
            without weights; every parameter of it is frozen before. Raises ModelError where the method makes no sense on this architecture
            or task.
        initial: Version 0 of a tensor that is neither of a head nor relative to an origin, float32, from its name and shape alone:
            (canonical name, shape, peft, generator of this tensor's own, the architecture's initializer_range) → tensor.
        edits: How the method changes the backbone's weights: (state without its head, tensor of the backbone → shape, linear weights as
            (out, in)) → changes. Merges and exports of every format follow from it alone. A tensor of the state that has the name of one
            of the backbone's is turned to the same layout before.
        beside: Why no weights can express the method, as the end of a sentence: then an export has the adapter beside the model.
        virtual: Learned tokens, as an edge package has them: (state, sizes of the decoder) → `prompt.embeds` (t, hidden), or `prefix.k` and
            `prefix.v` (layers, t, kv_heads, head_dim), float32. None: the method has no virtual tokens.
        factors: Of a method that does W + s·B·A and no more, so that the factors may stay apart from the weights: state → module → s,
            A (r, in) and B (out, r), which is all that the state holds but for a head. None: it does something else.
        idle: Whether a state changes no weight at all.
        targeted: peft.targets chooses its layers.
        fp32_only: The backbone must be in float32, because its own weights are trained.
    """

    attach: "Callable[[PreTrainedModel, PeftConfig, TaskConfig], Attached]"
    initial: "Callable[[str, tuple[int, ...], PeftConfig, Generator, float], Tensor]"
    edits: "Callable[[AdapterState, Mapping[str, tuple[int, ...]]], Iterable[Change]] | None" = None
    beside: str = ""
    virtual: "Callable[[AdapterState, DecoderShape], dict[str, Tensor]] | None" = None
    factors: "Callable[[AdapterState], dict[str, tuple[float, Tensor, Tensor]]] | None" = None
    idle: "Callable[[AdapterState], bool]" = lambda state: False
    targeted: bool = False
    fp32_only: bool = False


def method(name: str) -> Method:
    """What the file of a method offers; loads torch.

    Raises:
        ModelError: There is no such method, or its file does not say whether weights can express it.
    """
    dotted = f"{__name__}.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or importlib.util.find_spec(dotted) is None:
        raise ModelError(f"there is no PEFT method '{name[:60]}' here, only {', '.join(METHODS)}: update fedtune")
    module = importlib.import_module(dotted)
    found = Method(**{f.name: getattr(module, f.name) for f in dataclasses.fields(Method) if hasattr(module, f.name)})
    if (found.edits is None) == (not found.beside):
        raise ModelError(
            f"{module.__file__} must define either `edits`, how the method changes weights, or `beside`, why weights cannot express it:"
            f" it defines {'both' if found.beside else 'neither'}"
        )
    return found


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Attach the method that peft.method names; whatever goes wrong becomes a sentence.

    Raises:
        ModelError: The method, its targets or PEFT's own rules do not fit the architecture.
    """
    how = method(peft.method)
    try:
        return how.attach(model, peft, task)
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
    return method(name).edits is not None


@contextmanager
def swapped(values: "Mapping[nn.Parameter, Tensor]") -> Iterator[None]:
    """Within it, the parameters hold these values; afterward their own."""
    kept = {p: p.data for p in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value
