"""Prefix tuning: learned keys and values before those of the sequence, in every layer.

Source: Li & Liang 2021, Prefix-Tuning, arXiv:2101.00190, without the reparametrization (which training needs only at large learning rates).
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import SLOT, Attached, DecoderShape
from fedtune.models.methods.prompt import heads_of, refuse_encoder_decoder, require_room, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

why_unmergeable = "its keys and values come before those of the text"


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """`prefix` is (tokens, layers · 2 · width of the keys)."""
    from peft import PrefixTuningConfig  # imported late, because they load PEFT and transformers
    from transformers import AutoModelForMaskedLM

    from fedtune.models.methods._wrapped import named, task_settings, wrap, write

    kind = model.config.model_type
    if type(model.config) in AutoModelForMaskedLM._model_mapping and not getattr(model.config, "is_decoder", False):  # type: ignore
        raise ModelError(f"peft.method=prefix: '{kind}' is an encoder, which takes no past keys and values: choose prompt or ptuning_v2")
    refuse_encoder_decoder(model, peft, task)
    require_room(model, peft, task)
    before = heads_of(model, task)
    config = PrefixTuningConfig(**task_settings(model, task), num_virtual_tokens=peft.tokens)
    if hasattr(model.config, "d_kv"):
        config.token_dim = model.config.num_heads * model.config.d_kv  # PEFT uses the layer width, but T5's keys may be narrower
    wrapped = wrap(model, config)
    parameters, names = named(wrapped, {f"prompt_encoder.{SLOT}.embedding.weight": "prefix"})
    return Attached(
        model=wrapped,
        parameters=parameters,
        names=names,
        disabled=partial(untouched, wrapped, parameters, before),
        save=partial(write, wrapped),
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """normal(0, the architecture's initializer_range)."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def virtual_tokens(state: "AdapterState", shape: DecoderShape) -> dict[str, Tensor]:
    """Keys and values of each layer; PEFT's prefix is (t, layers · 2 (key, value) · kv_heads · head_dim)."""
    both = state["prefix"].float().view(-1, shape.layers, 2, shape.kv_heads, shape.head_dim).permute(2, 1, 0, 3, 4)
    return {"prefix.k": both[0].contiguous(), "prefix.v": both[1].contiguous()}
