"""Which models train with the lean step, and how it replaces the layers of a transformers model during a forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.config.method_files import factored
from fedtune.contracts.task import task_of
from fedtune.models.adapter import LiveAdapter
from fedtune.models.backbone import dropout_rates
from fedtune.models.lean.decoder import DECODERS, DecoderLayer
from fedtune.models.lean.encoder import ENCODERS, EncoderLayer
from fedtune.models.lean.functions import ACTIVATIONS
from fedtune.models.lean.layer import Layer, Pass
from fedtune.models.lean.loss import cross_entropy
from fedtune.models.lean.places import Places
from fedtune.models.tasks._tokens import TokenTask

_steps: WeakKeyDictionary[nn.Module, "LeanStep"] = WeakKeyDictionary()


def enable(live: LiveAdapter) -> str:
    """Let `loss_sum` of the live adapter's model use the lean step. Returns why it cannot; "" if it can."""
    model: Any = live.backbone.model
    precision = "int8" if any("Linear8bitLt" in type(m).__name__ for m in model.modules()) else ""
    why = why_not(model, live.spec.method, live.parameters, precision=precision, device=live.backbone.device)
    if not why:
        _steps[live.model] = LeanStep(live)
    return why


def disable(live: LiveAdapter) -> None:
    """Return to PEFT's modules for all steps."""
    _steps.pop(live.model, None)


def step_of(model: nn.Module) -> "LeanStep | None":
    """The lean step of this model if it can compute the next forward pass: training changes only LoRA factors and a head."""
    step = _steps.get(model)
    return step if step is not None and torch.is_grad_enabled() and step.is_ready() else None


@contextmanager
def keeping(model: nn.Module, layers: int | None) -> Iterator[Callable[[], bool]]:
    """A context in which only the last `layers` layers keep intermediate tensors, and the others compute them again; None: all keep them.

    Yields a function to call when memory runs out: it makes all layers compute them again. It returns False if that saves no memory.
    """
    step = _steps.get(model)

    def keep_none() -> bool:
        return step is not None and step.keep_none()

    if step is not None and layers is not None:
        step.kept = layers
    try:
        yield keep_none
    finally:
        if step is not None:
            step.kept = step.layers


class LeanStep:
    """The lean form of a model's layers and loss.

    Args:
        live: A live adapter for which `why_not` is "".

    Attributes:
        layers: Number of layers.
        kept: Number of layers, the last ones, that keep intermediate tensors. With activation checkpointing none does.
    """

    def __init__(self, live: LiveAdapter) -> None:
        model: Any = live.backbone.model
        text = model.config.get_text_config()
        self._stack = _stack(model)
        self._layers = [_lean(m, text) for m in _modules(model)]
        self._head = model.get_output_embeddings()
        self._cap = getattr(text, "final_logit_softcapping", None)
        self.layers = self.kept = len(self._layers)
        self._frozen = [p for layer in self._layers for p in layer.frozen]
        if isinstance(self._head, nn.Linear):
            self._frozen += self._head.parameters()
        linears = [linear for layer in self._layers for linear in layer.linears]
        self._bases, self._adapted = [linear.base for linear in linears], [linear for linear in linears if linear.adapted]
        self._places: Places | None = None  # of several clients

    def is_ready(self) -> bool:
        """Whether the adapter is active and not merged, the frozen weights need no gradient, and no hook changes a layer's output.

        Shifts of quantized weights are such hooks.
        """
        if any(p.requires_grad for p in self._frozen) or any(b._forward_hooks or b._forward_pre_hooks for b in self._bases):
            return False
        return not any(linear.module.disable_adapters or linear.module.merged_adapters for linear in self._adapted)

    def keep_none(self) -> bool:
        """Let no layer keep intermediate tensors. Returns whether that saves memory."""
        saves = self.is_ready() and self.kept > 0 and not self._checkpoints()
        self.kept = 0
        return saves

    def _checkpoints(self) -> bool:
        """Whether activation checkpointing is on."""
        return self._stack.training and any(layer.module.gradient_checkpointing for layer in self._layers)

    @contextmanager
    def installed(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which a forward pass of the model on this batch uses the lean layers."""
        again = [layer.module.gradient_checkpointing for layer in self._layers]
        run = Pass(self._places or self._packed(batch, [len(batch["input_ids"])], 1))
        # the last layers keep theirs, which are freed before the first layers compute theirs again
        first = self.layers - (0 if self._checkpoints() else self.kept)
        try:
            for i, layer in enumerate(self._layers):
                layer.module.gradient_checkpointing = False  # the lean layer recomputes by itself
                layer.module.forward = partial(_forward, layer, run, self.layers - i, i >= first)
            yield
        finally:
            for layer, flag in zip(self._layers, again, strict=True):
                layer.module.gradient_checkpointing = flag
                layer.module.__dict__.pop("forward", None)  # `clients.lower_layers` may have removed it

    def _packed(self, batch: Mapping[str, Tensor], rows: Sequence[int], group: int) -> Places:
        """The positions that the layers compute, for several clients in the groups of `Places`. For `rows` see `stacked`."""
        size, real = batch["input_ids"].shape, batch.get("attention_mask")
        if real is None or any(m._forward_hooks or m._forward_pre_hooks for m in (layer.module for layer in self._layers)):
            return Places(size, None)  # rows joined by `pack`; hooks read rows
        mine = torch.arange(size[0] // len(rows)) < torch.tensor(rows)[:, None]
        return Places(size, real.bool() & mine.view(-1, 1).to(real.device), len(rows), group)

    @contextmanager
    def stacked(
        self, factors: Callable[[nn.Module], tuple[Tensor, Tensor]], batch: Mapping[str, Tensor], rows: Sequence[int]
    ) -> Iterator[None]:
        """A context in which the rows of this batch belong to several clients, with an adapter each.

        Args:
            factors: PEFT's layer → A (C, r, in) and s·B (C, out, r) of C clients.
            batch: A batch with as many rows of each client.
            rows: Number of real rows of each client, which come first; the others are padding.
        """
        given = [factors(linear.module) for linear in self._adapted]
        # a group of r positions or more, so that its copy of the factors is not larger than its hidden states
        self._places = self._packed(batch, rows, 1 << max(4, (max((a.shape[1] for a, _ in given), default=1) - 1).bit_length()))
        try:
            for linear, (a, b) in zip(self._adapted, given, strict=True):
                linear.stacked = self._places.by_group(a), self._places.by_group(b)
            yield
        finally:
            self._places = None
            for linear in self._adapted:
                linear.stacked = None

    def draws_dropout(self) -> bool:
        """Whether an adapter draws dropout in the current mode."""
        return any(linear.dropout for linear in self._adapted)

    def token_losses(self, batch: Mapping[str, Tensor], task: TaskConfig) -> Tensor | None:
        """The losses of all targets, (N,), without all logits; None for a task with another loss or without an output layer."""
        kind = task_of(task)
        own = (type(kind).logits, type(kind).loss) if isinstance(kind, TokenTask) else None
        if own != (TokenTask.logits, TokenTask.loss) or not isinstance(self._head, nn.Linear):
            return None
        counts = kind.counts(batch)
        with self.installed(batch):
            hidden = self._stack(**kind.inputs(self._stack, batch), use_cache=False).last_hidden_state[:, -counts.shape[1] - 1 : -1][counts]
        targets = kind.targets(batch)[counts]
        return cross_entropy(hidden, self._head.weight, self._head.bias, targets, self._cap)


def _forward(layer: Layer, run: Pass, left: int, keeps: bool, x: Tensor, attention_mask: Any = None, *_: Any, **more: Any) -> Tensor:
    """A layer's output. `left` is the number of layers from this one to the last; between layers, x is without padding."""
    places = run.places
    if places.packs and x.shape[:2] == places.size:
        x = places.pack(x.flatten(0, 1))[None]
    y = layer(run, x, attention_mask, more.get("position_embeddings"), keeps=left if keeps else 0)
    return places.unpack(y[0]).view(*places.size, -1) if places.packs and left == 1 else y


def _stack(model: Any) -> Any:
    """The model without its output layer."""
    return getattr(model, model.base_model_prefix, None)


def _modules(model: Any) -> Any:
    """The decoder layers, or the encoder layers, in order; None if there are none."""
    stack = _stack(model)
    inner = next((m for n in ("encoder", "transformer") if (m := getattr(stack, n, None)) is not None), None)
    found = getattr(stack, "layers", None) if inner is None else getattr(inner, "layer", None)
    return found if isinstance(found, nn.ModuleList) else None


def _lean(module: Any, text: Any) -> Layer:
    return (DecoderLayer if type(module).__name__ in DECODERS else EncoderLayer)(module, _activation(text))


def _is_known(layer: type) -> bool:
    """Whether a class of a layer is one of transformers' own; code that comes with a checkpoint may have the same names."""
    return layer.__name__ in DECODERS.keys() | ENCODERS.keys() and layer.__module__.startswith("transformers.models.")


def _activation(text: Any) -> str:
    return str(next(a for n in ("hidden_activation", "hidden_act", "activation") if (a := getattr(text, n, None))))


def why_not(model: Any, method: str, parameters: Mapping[str, Tensor], *, precision: str, device: torch.device) -> str:
    """Why a model with this adapter trains with PEFT's modules; "" if it can use the lean step.

    Args:
        model: The backbone with the adapter's layers, also on the meta device.
        method: The adapter's method.
        parameters: Canonical name → trainable parameter.
        precision, device: Of the backbone.
    """
    if precision == "int8" and device.type != "cpu":
        return "on this device, bitsandbytes rounds the inputs of model.precision=int8 to 8 bits too"
    text, layers = model.config.get_text_config(), _modules(model)
    if method not in factored(exactly=False):
        return f"peft.method={method} has no lean form"
    if layers is None or any(not _is_known(type(m)) for m in layers):
        return f"the architecture '{model.config.model_type}' has no lean form"
    if (how := text._attn_implementation) not in ("sdpa", "eager"):
        return f"attn_implementation={how} has no lean form"
    if drawn := dropout_rates(model.config):
        return f"the backbone has dropout ({', '.join(drawn)})"
    if _activation(text) not in ACTIVATIONS:
        return f"the activation '{_activation(text)}' has no lean form"
    if getattr(text, "use_bidirectional_attention", False):
        return "attention is bidirectional"
    if type(layers[0]).__name__ in ENCODERS and getattr(text, "is_decoder", False):
        return "an encoder is used as a decoder"
    linears = [x for m in layers for x in _lean(m, text).linears]
    if any(x.factors[2] is not None and x.dropout_rate for x in linears):
        return f"peft.method={method} has no lean form with peft.dropout"
    inside = {id(p) for m in layers for p in m.parameters()} - {id(f) for x in linears for f in x.factors}
    if odd := [n for n, p in parameters.items() if id(p) in inside]:
        return f"'{odd[0]}' belongs to a module that the lean layer does not know"
    return ""
