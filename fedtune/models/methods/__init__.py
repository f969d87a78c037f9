"""PEFT methods: `peft.method=NAME` is the file NAME.py of this folder.

A method's file attaches the method to a model and declares its properties for the rest of fedtune.

To add a method, add its file and `conf/peft/NAME.yaml`; nothing else lists methods. Files of shared code begin with `_`. A method's file
imports neither PEFT nor transformers before `attach` is called, so that inference can apply its `edits` without them.
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

SLOT = "default"  # PEFT's name for the only adapter


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A model with an attached method, ready to train.

    Args:
        model: The model to call instead of the original model, with the same inputs.
        parameters: Canonical name → live parameter (float32, requires a gradient), including a classifier's head.
        names: Canonical name → the parameter's name in `model`.
        disabled: A context in which the model is the original backbone; a classifier has the head that it was loaded with.
        save: Writes the live adapter as a folder that `PeftModel.from_pretrained` opens; None if PEFT does not have the method.
        origin: Canonical name → frozen value of the backbone's own tensors (biases, all weights, DoRA's magnitudes). Their state is
            parameter − origin, so that a server, which has no backbone, starts from zeros. A head's tensors have no origin.
        ranks: LoRA family: module → rank.
        scaling: LoRA family: module → factor s.
        keeps_inputs: Modules of the backbone whose inputs a training step stores for the backward pass; for memory estimates.
        keeps_width: Numbers per token that the method itself stores for the backward pass, besides LoRA's; for memory estimates.
        draw: Fills the frozen tensors that the method adds to the model, its buffers, from a seed (`AdapterSpec.basis`). They are not part
            of the state, so they are never sent. None for a method without such tensors.
        drawn: Entries of these tensors.
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
    keeps_width: int = 0
    draw: Callable[[str], None] | None = None
    drawn: int = 0


# Rows [first, last) of a tensor, float64 → the edited rows. Rows of a linear layer's weight are outputs, even if it is stored as (in, out)
Edit = Callable[["Tensor", int, int], "Tensor"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """An adapter's change of one tensor of its backbone.

    Args:
        name: Name of the tensor.
        shape: Shape that the adapter expects; (out, in) for a linear layer's weight, (experts, out, in) for stacked ones.
        edit: The arithmetic, on a block of rows.
        linear: Whether the tensor must be the weight of a linear layer that is not tied to the embedding.
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
    """The names that a method's file defines. Names with a default are optional, but one of `edits` and `why_unmergeable` is required.

    A file may also have constants that `fedtune.config.method_files` reads: `inits`, a tuple of the supported values of peft.init;
    `experts`, whether the method adapts stacked experts; `product`, for LoRA's factors `MODULE.lora_A` and `MODULE.lora_B`: "whole" if
    s·B·A is the whole change of a weight, "part" if it has other terms; `rank_power`, the p of s = alpha / r^p, by default 1.

    Args:
        attach: Attaches the method to a model in place: (model, peft, task) → `Attached`. All parameters of the model are frozen before the
            call. The model may be on the meta device, to list names and shapes without weights. Raises ModelError if the method does not
            support this architecture or task.
        initial: Initial value, float32, of a tensor that is not a head's and has no origin, from its name and shape alone: (canonical name,
            shape, peft, a generator for this tensor, the architecture's initializer_range) → tensor.
        edits: The method's changes of the backbone's weights: (state without its head, tensor of the backbone → shape, with linear weights
            as (out, in)) → changes. Merges and exports in all formats use it. If a state's tensor has the name of a backbone's tensor, both
            have the same layout.
        why_unmergeable: Reason why the method cannot be merged into weights, as the end of a sentence. An export then stores the adapter
            separately.
        virtual_tokens: Virtual tokens for an edge package: (state, sizes of the decoder) → `prompt.embeds` (t, hidden), or `prefix.k` and
            `prefix.v` (layers, t, kv_heads, head_dim), float32. None for a method without virtual tokens.
        factors: For a method that computes exactly W + s·B·A, so that the factors can stay separate from the weights: state → {module: (s,
            A (r, in), B (out, r))}. They include all tensors of the state except a head's. None for other methods.
        is_noop: Whether a state changes no weight.
        targeted: Whether peft.targets selects the method's layers.
        fp32_only: Whether the backbone must be in float32, because its own weights are trained.
    """

    attach: "Callable[[PreTrainedModel, PeftConfig, TaskConfig], Attached]"
    initial: "Callable[[str, tuple[int, ...], PeftConfig, Generator, float], Tensor]"
    edits: "Callable[[AdapterState, Mapping[str, tuple[int, ...]]], Iterable[Change]] | None" = None
    why_unmergeable: str = ""
    virtual_tokens: "Callable[[AdapterState, DecoderShape], dict[str, Tensor]] | None" = None
    factors: "Callable[[AdapterState], dict[str, tuple[float, Tensor, Tensor]]] | None" = None
    is_noop: "Callable[[AdapterState], bool]" = lambda state: False
    targeted: bool = False
    fp32_only: bool = False


def method(name: str) -> Method:
    """The definitions in a method's file; loads torch.

    Raises:
        ModelError: The method does not exist, or its file does not define exactly one of `edits` and `why_unmergeable`.
    """
    dotted = f"{__name__}.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or importlib.util.find_spec(dotted) is None:
        raise ModelError(f"unknown PEFT method '{name[:60]}', this version has {', '.join(METHODS)}: update fedtune")
    module = importlib.import_module(dotted)
    found = Method(**{f.name: getattr(module, f.name) for f in dataclasses.fields(Method) if hasattr(module, f.name)})
    if (found.edits is None) == (not found.why_unmergeable):
        raise ModelError(
            f"{module.__file__} must define either `edits`, how the method changes weights, or `why_unmergeable`, why weights cannot"
            f" express it: it defines {'both' if found.why_unmergeable else 'neither'}"
        )
    return found


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Attach the method `peft.method`; every error becomes a ModelError.

    Raises:
        ModelError: The method, its targets or PEFT does not support the architecture.
    """
    how = method(peft.method)
    try:
        return how.attach(model, peft, task)
    except FedtuneError:
        raise
    except Exception as bad:  # PEFT and the model's own code may raise any type
        reason = (str(bad).strip().splitlines() or [type(bad).__name__])[0]
        raise ModelError(
            f"peft.method={peft.method} with peft.targets={peft.targets} does not fit the architecture '{model.config.model_type}':"
            f" {reason.rstrip('.')}: name other layers in peft.targets, or take another peft.method"
        ) from None


def mergeable(name: str) -> bool:
    """Whether the method can be merged into weights."""
    return method(name).edits is not None


@contextmanager
def swapped(values: "Mapping[nn.Parameter, Tensor]") -> Iterator[None]:
    """A context in which the parameters have these values; afterward, their own values are restored."""
    kept = {p: p.data for p in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value
