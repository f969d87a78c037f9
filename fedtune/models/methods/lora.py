"""LoRA, rank-stabilised LoRA and DoRA: low-rank factors beside the frozen linear layers.

W = W0 + s·B·A with s = alpha / r (rslora: alpha / √r); DoRA: W = m · (W0 + s·B·A) / ‖W0 + s·B·A‖, m and the norm a number a row of W.

Sources: Hu et al. 2021, LoRA, arXiv:2106.09685; Kalajdzievski 2023, rsLoRA, arXiv:2312.03732; Liu et al. 2024, DoRA, arXiv:2402.09353.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached
from fedtune.models.methods.wrapped import SLOT, matches, named, require, targets, task_settings, transposed, without, wrap, write
from fedtune.state import AdapterState

_OVER = "quantised.json"  # beside an adapter of LoftQ's: which quantised weights it counts on
_COMPUTE = {"bfloat16": "bf16", "float32": "fp32"}
_RENAMED = {
    f".lora_A.{SLOT}.weight": ".lora_A",
    f".lora_B.{SLOT}.weight": ".lora_B",
    f".lora_magnitude_vector.{SLOT}.weight": ".lora_magnitude",
}


def attach(model: PreTrainedModel, peft: PeftConfig, task: TaskConfig) -> Attached:
    """Factors of the rank that peft.rank and peft.rank_pattern say, at peft.targets."""
    ranks = _ranks(model, peft)
    config = LoraConfig(
        **task_settings(model, task),
        r=peft.rank,
        lora_alpha=cast(int, peft.alpha),  # PEFT's annotation says int; it only divides
        lora_dropout=peft.dropout,
        target_modules=list(ranks),
        rank_pattern={m: r for m, r in ranks.items() if r != peft.rank},
        use_rslora=peft.method == "rslora",
        use_dora=peft.method == "dora",
        fan_in_fan_out=transposed(model),
    )
    wrapped = wrap(model, config, ranks)
    config.target_modules = sorted(config.target_modules or [])  # PEFT makes it a set, whose order in the file would vary
    if model.dtype != torch.float32 and not config.use_dora:
        _multiply_narrow(wrapped)
    parameters, names = named(wrapped, _RENAMED)
    magnitudes = {n: p.detach().clone() for n, p in parameters.items() if n.endswith(".lora_magnitude")}
    scaling = {m: peft.alpha / (math.sqrt(r) if peft.method == "rslora" else r) for m, r in ranks.items()}
    return Attached(
        model=wrapped,
        parameters=parameters,
        names=names,
        disabled=partial(without, wrapped),
        save=partial(_save, wrapped, _OVER if peft.init == "loftq" else ""),
        origin=magnitudes,
        ranks=ranks,
        scaling=scaling,
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """A ~ kaiming_uniform(a=√5), B = 0, so that it changes nothing yet."""
    if name.endswith(".lora_B"):
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def merge(model: PreTrainedModel, state: AdapterState) -> None:
    """W ← W + s·B·A; DoRA: the rows of that rescaled to ‖W‖ + the state's magnitude."""
    if odd := [n for n in state.tensors if not n.endswith((".lora_A", ".lora_B", ".lora_magnitude"))]:
        raise ModelError(f"the adapter's '{odd[0]}' is neither a LoRA factor nor in the backbone: it belongs to another one")
    modules = dict(model.named_modules())
    for name in [n.removesuffix(".lora_A") for n in state.tensors if n.endswith(".lora_A")]:
        layer = linear(modules, name)
        delta = state.spec.scaling[name] * (state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double())
        weight = layer.weight.detach().double()
        weight = weight.T if isinstance(layer, Conv1D) else weight
        if delta.shape != weight.shape:
            raise ModelError(f"the adapter's '{name}' is {_said(delta)}, the backbone's {_said(weight)}: it belongs to another backbone")
        changed = weight + delta.to(weight.device)
        if (magnitude := state.tensors.get(f"{name}.lora_magnitude")) is not None:
            changed *= ((weight.norm(dim=1) + magnitude.to(weight)) / changed.norm(dim=1))[:, None]
        with torch.no_grad():
            layer.weight.copy_(changed.T if isinstance(layer, Conv1D) else changed)


def linear(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The linear layer of that name, whose weight is its own.

    Raises:
        ModelError: There is none, or its weight is tied to the embedding.
    """
    layer = modules.get(name)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ModelError(f"the adapter changes '{name}', which is no linear layer of the backbone: it belongs to another one")
    if any(layer.weight is m.weight for m in modules.values() if isinstance(m, nn.Embedding)):
        raise ModelError(f"the adapter changes '{name}', whose weight is tied to the embedding: it cannot be merged")
    return layer


def _multiply_narrow(wrapped: PeftModel) -> None:
    """Let A and B, which stay float32, be multiplied in the dtype of the layer's input, as QLoRA does (arXiv:2305.14314, section 3).

    PEFT casts the input up instead, and each layer keeps its own float32 copy for the backward pass; here, layers share what they read.
    """
    for layer in (cast(Any, m) for m in wrapped.modules() if hasattr(m, "lora_A")):
        layer.cast_input_dtype_enabled = False
        for factor in (layer.lora_A[SLOT], layer.lora_B[SLOT]):
            factor.forward = partial(_product, factor)  # not a subclass: Opacus knows layers by their class


def _product(factor: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, factor.weight.to(x.dtype))


def _ranks(model: PreTrainedModel, peft: PeftConfig) -> dict[str, int]:
    """Module → rank; of the names in peft.rank_pattern that match a module, the longest counts."""
    modules = targets(model, peft.targets)
    for name, rank in peft.rank_pattern.items():
        require("peft.rank_pattern", name, modules)
        if rank < 1:
            raise ModelError(f"peft.rank_pattern: the rank of '{name}' is {rank}, it must be at least 1")
    out = {}
    for module in modules:
        mine = [n for n in peft.rank_pattern if matches(module, n)]
        out[module] = peft.rank_pattern[max(mine, key=len)] if mine else peft.rank
    return out


def _save(wrapped: PeftModel, over: str, folder: Path) -> None:
    """The live scaling may be a client's own, which PEFT's config says as an alpha a module.

    An adapter that began as what quantisation took means nothing over other weights: the file named `over` says which it counts on.
    """
    if over:
        quantised = cast(Any, wrapped.base_model.model).config.quantization_config.to_dict()
        said = {"precision": "nf4" if quantised["load_in_4bit"] else "int8", "compute": _COMPUTE[quantised["bnb_4bit_compute_dtype"]]}
        (folder / over).write_text(json.dumps(said) + "\n", encoding="utf-8")
    config = cast(LoraConfig, wrapped.peft_config[SLOT])
    config.alpha_pattern = {}
    for name, layer in ((n.removeprefix("base_model.model."), cast(Any, m)) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")):
        rank = layer.r[SLOT]
        alpha = layer.scaling[SLOT] * (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(alpha, config.lora_alpha, rel_tol=1e-9):
            config.alpha_pattern[name] = alpha
    write(wrapped, folder)


def _said(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
