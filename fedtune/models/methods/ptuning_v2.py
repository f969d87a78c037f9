"""P-tuning v2: every layer has its own prompt: learned keys and values before those of the tokens.

    attention_l(Q, [P_l⁰; K], [P_l¹; V])          P_l (2, n, kv_heads · head_dim), n = peft.tokens, visible to every token

Each layer's prompt is one tensor, `layers.<l>.prompt` (T5: `encoder.layers.<l>.prompt`, `decoder.…`), so that a strategy can train or send
some layers by name; the other prompts stay active. A layer that is applied several times (ALBERT) has a prompt for each application.

The prompts are added in the attention function, through transformers' attention interface, after the key/value cache. Encoders, training
and generation therefore share one code path, and prompts are never cached. A decoder's token positions start at n, as after a cached
prefix, so that PEFT can load the prompts as prefix tuning with the same logits. An encoder's tokens keep their positions.

Source: Liu et al. 2022, P-Tuning v2, arXiv:2110.07602; Li and Liang 2021, Prefix-Tuning, arXiv:2101.00190.
"""

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.models.methods import Attached, DecoderShape
from fedtune.models.methods._own import Switch, fill, untouched
from fedtune.models.methods.prompt import require_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

why_unmergeable = "its keys and values come before those of the text"
_DECODER, _ENCODER = (r"\.self_attn$", r"rotary_emb$"), (r"\.attention\.self$", "")
# architecture → its self-attention modules, and a decoder's module whose input includes the tokens' positions
_PLACES = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gpt2": (r"\.attn$", r"\.wpe$"),
    "opt": (r"\.self_attn$", r"\.embed_positions$"),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "distilbert": (r"\.attention$", ""),
    "albert": (r"\.attention$", ""),
    "t5": (r"\.SelfAttention$", ""),  # positions are relative biases between tokens; prompts have no bias
}
_NAME = "fedtune_layer_prompts"  # our name in transformers' attention interface


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """A prompt for each application of each self-attention module, float32 for every precision of the backbone.

    Raises:
        ModelError: The architecture is not in the table, or the context has no room for the prompt.
    """
    from transformers import AttentionInterface  # imported late, because it loads transformers

    from fedtune.models.backbone import initializer_range
    from fedtune.models.methods._heads import train_head

    AttentionInterface.register(_NAME, _attend)
    kind = model.config.model_type
    if kind not in _PLACES:
        raise ModelError(f"peft.method=ptuning_v2 does not support the architecture '{kind}', only {', '.join(_PLACES)}: take peft=prefix")
    attention, positions = _PLACES[kind]
    switch, parameters, names = Switch(), dict[str, nn.Parameter](), dict[str, str]()
    if positions:
        require_room(model, peft, task)
        for name, module in model.named_modules():
            if re.search(positions, name):
                module.register_forward_pre_hook(_Shift(switch, peft.tokens), with_kwargs=True)
    found = [(n, m) for n, m in model.named_modules() if re.search(attention, n)]
    for side in ("encoder.", "decoder.") if kind == "t5" else ("",):
        layer_of = _applications(model, [n for n, _ in found if not side or f".{side}" in f".{n}"])
        for name, layers in layer_of.items():
            module = model.get_submodule(name)
            module.prompts = _LayerPrompts(module, layers, peft.tokens, switch)  # pyright: ignore[reportArgumentType]
            for layer in layers:
                canonical, own = f"{side}layers.{layer}.prompt", f"layer_{layer}"
                parameters[canonical], names[canonical] = module.prompts.get_parameter(own), f"{name}.prompts.{own}"
    if kind == "albert":
        model.base_model.register_forward_pre_hook(_restart)
    parameters = {n: parameters[n] for n in sorted(parameters, key=_order)}
    fill(parameters, initial, peft, initializer_range(model.config))
    heads = train_head(model, task)

    def save(folder: Path) -> None:
        _save_prefix(folder, model, task, parameters, heads)

    return Attached(
        model=model,
        parameters=parameters | heads,
        names=names | {n: n for n in heads},
        disabled=untouched({p: p.detach().clone() for p in heads.values()}, switch),
        save=save if positions else None,
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: torch.Generator, std: float) -> Tensor:
    """normal(0, std) for keys and values, like the backbone's embeddings."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def virtual_tokens(state: "AdapterState", shape: DecoderShape) -> dict[str, Tensor]:
    """Keys and values of each layer."""
    prompts = [state[f"layers.{i}.prompt"].float().unflatten(2, (shape.kv_heads, shape.head_dim)) for i in range(shape.layers)]
    both = torch.stack(prompts, 1)  # (2, layers, t, kv_heads, head_dim)
    return {"prefix.k": both[0].contiguous(), "prefix.v": both[1].contiguous()}


def _order(name: str) -> tuple[bool, int]:
    return name.startswith("decoder."), int(name.split(".")[-2])


def _applications(model: "PreTrainedModel", attentions: list[str]) -> dict[str, list[int]]:
    """Attention module → the depths at which it is applied: one depth, except in ALBERT, where groups repeat."""
    if model.config.model_type != "albert":
        return {name: [depth] for depth, name in enumerate(attentions)}
    depth, groups, inner = model.config.num_hidden_layers, model.config.num_hidden_groups, model.config.inner_group_num
    out: dict[str, list[int]] = {name: [] for name in attentions}
    for i in range(depth):
        group = int(i / (depth / groups))  # as in AlbertTransformer.forward
        for j in range(inner):
            out[attentions[group * inner + j]].append(i * inner + j)
    return out


class _LayerPrompts(nn.Module):
    """The prompts of one attention module, in the order of its applications."""

    def __init__(self, attention: nn.Module, layers: list[int], tokens: int, switch: Switch) -> None:
        super().__init__()
        config: Any = attention.config
        self.config, self.layers, self.tokens, self.switch, self.turn = config, layers, tokens, switch, 0
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = self.heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        device = next(attention.parameters()).device
        for layer in layers:
            self.register_parameter(f"layer_{layer}", nn.Parameter(torch.empty(2, tokens, width, device=device, dtype=torch.float32)))
        # Only the attention module selects our function; masks are still built for the model's own implementation
        attention.config = copy.copy(config)  # pyright: ignore[reportArgumentType]
        attention.config._attn_implementation_internal = _NAME

    def next(self) -> tuple[Tensor, Tensor]:
        """Keys and values of this application, (heads, tokens, head_dim), read from the module for `torch.func.functional_call`."""
        layer = self.layers[self.turn % len(self.layers)]
        self.turn += 1
        keys, values = getattr(self, f"layer_{layer}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return keys, values


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, heads, T, head_dim) with the module's prompt before the keys and values.

    Raises:
        ModelError: The model's attention implementation does not support an explicit mask.
    """
    from transformers import AttentionInterface

    prompts: _LayerPrompts = module.prompts
    real = prompts.config._attn_implementation
    if real not in ("sdpa", "eager"):
        raise ModelError(f"peft.method=ptuning_v2 works with sdpa or eager attention, but the model has '{real}': take peft=prefix")
    inner = AttentionInterface().get_interface(real, sys.modules[type(module).__module__].eager_attention_forward)
    if not prompts.switch.on:
        return inner(module, query, key, value, attention_mask, **kwargs)
    n = prompts.tokens
    if attention_mask is None and real == "sdpa" and query.shape[2] > 1 and (kwargs.get("is_causal") or module.is_causal):
        # transformers relies on SDPA's causal flag here, but its triangular mask would hide the prompt
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (n, 0), value=True if attention_mask.dtype is torch.bool else 0.0)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (n, 0))
    before = [p.to(key.dtype).expand(len(key), -1, -1, -1) for p in prompts.next()]
    key, value = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
    return inner(module, query, key, value, attention_mask, **kwargs)


class _Shift:
    """Shifts positions by the length of the prompt."""

    def __init__(self, switch: Switch, tokens: int) -> None:
        self.switch, self.tokens = switch, tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.switch.on:
            return args, kwargs
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": kwargs["position_ids"] + self.tokens}
        return (*args[:-1], args[-1] + self.tokens), kwargs  # positions are the last argument: wpe(positions), rotary_emb(x, positions)


def _restart(model: nn.Module, args: Any) -> None:
    """Reset the application count of ALBERT's shared layers before each forward pass, because the last one may have failed midway."""
    for module in model.modules():
        if isinstance(module, _LayerPrompts):
            module.turn = 0


def _save_prefix(
    folder: Path, model: "PreTrainedModel", task: TaskConfig, prompts: Mapping[str, Tensor], heads: Mapping[str, Tensor]
) -> None:
    """Write PEFT's prefix tuning: one (tokens, layers · 2 · width) matrix; each row alternates the keys and values of the layers."""
    from peft import PrefixTuningConfig, TaskType

    config: Any = model.config
    folder.mkdir(parents=True, exist_ok=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = next(iter(prompts.values())).shape[-1]
    PrefixTuningConfig(
        task_type=TaskType[task_of(task).peft_type(False)],
        base_model_name_or_path=config._name_or_path or None,
        num_virtual_tokens=next(iter(prompts.values())).shape[1],
        num_layers=len(prompts),
        token_dim=width,
        num_attention_heads=kv_heads,
        num_transformer_submodules=1,
        encoder_hidden_size=width,
        inference_mode=True,
    ).save_pretrained(str(folder))
    rows = torch.cat([p.detach().cpu() for prompt in prompts.values() for p in prompt], dim=-1)
    tensors = {"prompt_embeddings": rows} | {f"base_model.{n}": t.detach().cpu().contiguous() for n, t in heads.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
