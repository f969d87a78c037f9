"""Bottleneck adapters: two small layers with a non-linearity, added to the output of a block's feed-forward (and attention) projection.

    y = Linear(x)  →  y + up(gelu(down(y)))       down (b, H), up (H, b), b = peft.bottleneck

`up` starts at zero, so that the initial model equals the backbone. PEFT does not have this method.

Sources: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751 (after attention and feed-forward); Pfeiffer
et al. 2020, AdapterFusion, arXiv:2005.00247 (after the feed-forward only).
"""

import math
import re
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached
from fedtune.models.methods._own import Switch, fill, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

why_unmergeable = "there is a non-linearity between its two layers"

_LLAMA = (r"\.mlp\.down_proj$", r"\.self_attn\.o_proj$")
_BERT = (r"(?<!attention)\.output\.dense$", r"\.attention\.output\.dense$")
# architecture → the modules of a block's feed-forward and attention (self and cross) whose output goes to the residual stream
_OUTPUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": (r"\.mlp\.c_proj$", r"\.attn\.c_proj$"),
    "opt": (r"\.fc2$", r"\.self_attn\.out_proj$"),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": (r"\.ffn\.lin2$", r"\.attention\.out_lin$"),
    "albert": (r"\.ffn_output$", r"\.attention\.dense$"),  # one layer and its adapter are applied many times
    "t5": (r"\.DenseReluDense\.wo$", r"\.(SelfAttention|EncDecAttention)\.o$"),
}


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Adapters as `<module>.adapter_down.*` and `<module>.adapter_up.*`, float32 for every precision of the backbone.

    Raises:
        ModelError: The architecture is not in the table.
    """
    from transformers.pytorch_utils import Conv1D  # imported late, because it loads transformers

    from fedtune.models.methods._heads import train_head

    kind = model.config.model_type
    if kind not in _OUTPUTS:
        known = ", ".join(_OUTPUTS)
        raise ModelError(f"peft.method=adapter does not support the architecture '{kind}', only {known}: take peft=lora")
    places = _OUTPUTS[kind] if peft.placement == "houlsby" else _OUTPUTS[kind][:1]
    switch, parameters = Switch(), {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or not any(re.search(p, name) for p in places):
            continue
        width = module.nf if isinstance(module, Conv1D) else module.out_features
        for part, shape in (("adapter_down", (peft.bottleneck, width)), ("adapter_up", (width, peft.bottleneck))):
            small = nn.Module()
            small.weight = nn.Parameter(torch.empty(shape, device=module.weight.device, dtype=torch.float32))
            small.bias = nn.Parameter(torch.empty(shape[0], device=module.weight.device, dtype=torch.float32))
            module.add_module(part, small)
            parameters |= {f"{name}.{part}.{n}": p for n, p in small.named_parameters()}
        module.register_forward_hook(_Adapt(switch))
    fill(parameters, initial, peft, 0.0)
    heads = train_head(model, task)
    return Attached(
        model=model,
        parameters=parameters | heads,
        names={n: n for n in parameters | heads},
        disabled=untouched({p: p.detach().clone() for p in heads.values()}, switch),
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: torch.Generator, std: float) -> Tensor:
    """`down` ~ kaiming_uniform(a=√5), like LoRA's A; `up` and the biases are zero."""
    if name.endswith(".adapter_down.weight"):
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
    return torch.zeros(shape)


class _Adapt:
    """The forward hook. It reads the parameters from the module at each call, so that `torch.func.functional_call` can replace them."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __call__(self, module: Any, args: Any, y: Tensor) -> Tensor:
        if not self.switch.on:
            return y
        down, up = module.adapter_down, module.adapter_up
        return y + F.linear(F.gelu(F.linear(y.float(), down.weight, down.bias)), up.weight, up.bias).to(y.dtype)
