"""Prompt tuning: virtual tokens with learned embeddings before the sequence.

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.models.methods import SLOT, Attached, DecoderShape, swapped

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

why_unmergeable = "its virtual tokens come before the text"


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """`prompt` is (tokens, embedding width)."""
    from peft import PromptTuningConfig  # imported late, because they load PEFT

    from fedtune.models.methods._wrapped import named, task_settings, wrap, write

    refuse_encoder_decoder(model, peft, task)
    require_room(model, peft, task)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    config = PromptTuningConfig(
        **task_settings(model, task),
        num_virtual_tokens=peft.tokens,
        token_dim=embedding.weight.shape[1],  # PEFT's default is the layers' width
        num_layers=model.config.get_text_config().num_hidden_layers,  # PEFT infers these two only for some architectures
        num_attention_heads=model.config.get_text_config().num_attention_heads,
        num_transformer_submodules=1,  # the encoder of an encoder-decoder
    )
    before = heads_of(model, task)
    wrapped = wrap(model, config)
    wrapped.word_embeddings = embedding  # PEFT guesses it from the shapes of the weights
    if any(n.startswith("score.") for n in before):
        _pool_by_mask(model)
    if not task_of(task).head and "position_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_count_positions, with_kwargs=True)
    parameters, names = named(wrapped, {f"prompt_encoder.{SLOT}.embedding.weight": "prompt"})
    return Attached(
        model=wrapped,
        parameters=parameters,
        names=names,
        disabled=partial(untouched, wrapped, parameters, before),
        save=partial(write, wrapped),
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """normal(0, the architecture's initializer_range), as for embeddings."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def virtual_tokens(state: "AdapterState", shape: DecoderShape) -> dict[str, Tensor]:
    """The embeddings of the virtual tokens."""
    return {"prompt.embeds": state["prompt"].float().view(-1, shape.hidden)}


def refuse_encoder_decoder(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> None:
    """Raises ModelError for an encoder-decoder's classifier, which supports neither embeddings nor past keys and values as inputs."""
    kind = model.config.model_type
    if task_of(task).head and getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"peft.method={peft.method}: the classifier of the encoder-decoder '{kind}' takes token ids only: choose ptuning_v2 or lora"
        )


def require_room(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> None:
    """Raises ModelError if virtual tokens and an example do not fit the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        return
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            context -= module.padding_idx + 1  # RoBERTa counts positions from its padding index
    kind = task_of(task)
    answer = kind.answer_tokens
    if peft.tokens + kind.longest_sequence + answer > context:
        more = f" and task.max_new_tokens={answer}" if answer else ""
        raise ModelError(
            f"peft.tokens={peft.tokens} with {kind.length_text}{more} is more than the model's context of {context} tokens:"
            " make one of them smaller"
        )


def heads_of(model: "PreTrainedModel", task: TaskConfig) -> dict[str, Tensor]:
    """A copy of a classifier's loaded head."""
    from fedtune.models.methods._heads import trained_heads

    heads = trained_heads(model, task)
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[0] in heads}


@contextmanager
def untouched(wrapped: "PeftModel", parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> Iterator[None]:
    """A context without virtual tokens and with the loaded head. PEFT's own context keeps the trained head and fails on classifiers."""
    base = cast(Any, wrapped.base_model)
    with swapped({parameters[n]: t.float() for n, t in before.items()}):
        cast(Any, wrapped).forward, cast(Any, wrapped).generate = base.forward, getattr(base, "generate", None)
        try:
            yield
        finally:
            del wrapped.forward, wrapped.generate  # restores the methods of the class


def _count_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Number positions without padding, as in training. In generation, padding follows the virtual tokens, and PEFT would count it."""
    mask = kwargs.get("attention_mask")
    given = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
    if kwargs.get("position_ids") is not None or given is None or mask is None or mask.ndim != 2:
        return None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
    return args, {**kwargs, "position_ids": positions}


class _Known(logging.Filter):
    """Drops transformers' warning about the problem that `_pool_by_mask` fixes."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "will not detect padding tokens in `inputs_embeds`" not in record.getMessage()


def _pool_by_mask(model: "PreTrainedModel") -> None:
    """Make a decoder's classifier read the last token that is not padding.

    The classifier searches for this token in input_ids. PEFT passes only embeddings, so it would read the last position, often padding.
    """
    seen: dict[str, Tensor | None] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["mask"] = kwargs.get("attention_mask") if kwargs.get("inputs_embeds") is not None else None

    def pick(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        mask, hidden = seen.pop("mask", None), args[0]  # (B, V + T), (B, V + T, width)
        if mask is None:
            return None
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        return (hidden[torch.arange(len(hidden), device=hidden.device), last][:, None],)

    for logger in ("transformers.modeling_layers", type(model).__module__):
        if not any(isinstance(f, _Known) for f in logging.getLogger(logger).filters):
            logging.getLogger(logger).addFilter(_Known())
    model.register_forward_pre_hook(note, with_kwargs=True)
    model.get_submodule("score").register_forward_pre_hook(pick)
