"""LoRA: low-rank factors parallel to the frozen linear layers. `rslora.py` and `dora.py` are variants.

W = W0 + s·B·A with s = alpha / r.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import SLOT, Attached, Change, Edit

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

inits = ("default", "loftq")
experts = True
product = "whole"
targeted = True

_OVER = "quantised.json"  # in the folder of a LoftQ adapter: the quantized weights that it requires
_COMPUTE = {"bfloat16": "bf16", "float32": "fp32"}
_RENAMED = {
    f".lora_A.{SLOT}.weight": ".lora_A",
    f".lora_B.{SLOT}.weight": ".lora_B",
    f".lora_magnitude_vector.{SLOT}.weight": ".lora_magnitude",
}


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Factors at peft.targets, with the ranks of peft.rank and peft.rank_pattern."""
    return attach_factors(model, peft, task)


def attach_factors(
    model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig, *, stabilized: bool = False, magnitudes: bool = False
) -> Attached:
    """LoRA or one of its variants.

    Args:
        model: The model, changed in place.
        peft: The settings.
        task: The run's task.
        stabilized: Whether s = alpha / √r.
        magnitudes: Whether each row of W has DoRA's magnitude.
    """
    from peft import LoraConfig  # imported late, because they load PEFT

    from fedtune.models.methods._wrapped import named, stacked_weights, task_settings, transposed, without, wrap

    ranks, stacked = _ranks(model, peft), stacked_weights(model, peft.target_parameters)
    config = LoraConfig(
        **task_settings(model, task),
        r=peft.rank,
        lora_alpha=cast(int, peft.alpha),  # annotated as int, but PEFT only uses it in a division
        lora_dropout=peft.dropout,
        target_modules=list(ranks),
        target_parameters=list(stacked) or None,
        rank_pattern={m: r for m, r in ranks.items() if r != peft.rank},
        use_rslora=stabilized,
        use_dora=magnitudes,
        fan_in_fan_out=transposed(model),
    )
    wrapped = wrap(model, config, [*ranks, *stacked])
    config.target_modules = sorted(config.target_modules or [])  # PEFT turns it into a set, so its order in the file would vary
    config.target_parameters = sorted(stacked) or None
    if model.dtype != torch.float32 and not config.use_dora:
        _multiply_narrow(wrapped)
    parameters, names = named(wrapped, _RENAMED)
    scaling = {m: peft.alpha / (math.sqrt(r) if stabilized else r) for m, r in ({**ranks, **dict.fromkeys(stacked, peft.rank)}).items()}
    ranks |= {name: peft.rank * experts for name, experts in stacked.items()}  # rows of A: each expert has its own
    return Attached(
        model=wrapped,
        parameters=parameters,
        names=names,
        disabled=partial(without, wrapped),
        save=partial(_save, wrapped, _OVER if peft.init == "loftq" else ""),
        origin={n: p.detach().clone() for n, p in parameters.items() if n.endswith(".lora_magnitude")},
        ranks=ranks,
        scaling=scaling,
        keeps_inputs=ranks,
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """A ~ kaiming_uniform(a=√5) and B = 0, which change nothing."""
    if name.endswith(".lora_B"):
        return torch.zeros(shape)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def edits(state: "AdapterState", sizes: Mapping[str, tuple[int, ...]]) -> Iterator[Change]:
    """W ← W + s·B·A; with a magnitude, the rows are then rescaled to the norms ‖W‖ + magnitude. Stacked experts: W_e ← W_e + s·B_e·A_e."""
    if odd := [n for n in state.tensors if not n.endswith((".lora_A", ".lora_B", ".lora_magnitude"))]:
        raise ModelError(f"the adapter's '{odd[0]}' is neither a LoRA factor nor in the backbone: the adapter belongs to another backbone")
    for module in [n.removesuffix(".lora_A") for n in state.tensors if n.endswith(".lora_A")]:
        a, b = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
        if f"{module}.weight" not in sizes and len(size := sizes.get(module, ())) == 3:
            yield Change(name=module, shape=(size[0], len(b), a.shape[1]), edit=_experts(module, a, b, state.spec.scaling[module], size[0]))
            continue
        edit = _low_rank(a, b, state.spec.scaling[module], state.tensors.get(f"{module}.lora_magnitude"))
        yield Change(name=f"{module}.weight", shape=(len(b), a.shape[1]), edit=edit, linear=True)


def factors(state: "AdapterState") -> dict[str, tuple[float, Tensor, Tensor]]:
    """s, A and B of each module."""
    return {m: (s, state[f"{m}.lora_A"], state[f"{m}.lora_B"]) for m, s in state.spec.scaling.items()}


def is_noop(state: "AdapterState") -> bool:
    """Whether every product B·A is zero."""
    return bool(state.spec.ranks) and all(not state[f"{m}.lora_A"].any() or not state[f"{m}.lora_B"].any() for m in state.spec.ranks)


def _low_rank(a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None) -> Edit:
    def edit(rows: Tensor, first: int, last: int) -> Tensor:
        changed = rows + scaling * (b[first:last].double() @ a.double())
        if magnitude is None:
            return changed
        return changed * ((rows.norm(dim=1) + magnitude[first:last].double()) / changed.norm(dim=1))[:, None]

    return edit


def _experts(name: str, a: Tensor, b: Tensor, scaling: float, experts: int) -> Edit:
    """The factors of E experts in PEFT's layout: A (E·r, in) has one expert after the other, B (out, r·E) one rank after the other."""
    if len(a) % experts or b.shape[1] != len(a):
        raise ModelError(
            f"the adapter's factors of '{name}' are {tuple(a.shape)} and {tuple(b.shape)}, which do not divide among the backbone's"
            f" {experts} experts: it belongs to another backbone"
        )
    rank = len(a) // experts
    each_a, each_b = a.view(experts, rank, -1), b.view(len(b), rank, experts).permute(2, 0, 1)

    def edit(rows: Tensor, first: int, last: int) -> Tensor:  # rows [last - first, out, in]
        return rows + scaling * (each_b[first:last].double() @ each_a[first:last].double())

    return edit


def _multiply_narrow(wrapped: "PeftModel") -> None:
    """Multiply by A and B, which stay float32, in the dtype of the layer's input, as QLoRA does (arXiv:2305.14314, section 3).

    PEFT casts the input to float32 instead, and each layer stores its own copy for the backward pass. Here, layers share their inputs.
    """
    for layer in (cast(Any, m) for m in wrapped.modules() if hasattr(m, "lora_A")):
        layer.cast_input_dtype_enabled = False
        for factor in (layer.lora_A[SLOT], layer.lora_B[SLOT]):
            factor.forward = partial(_product, factor)  # not a subclass, because Opacus recognizes layers by their class


def _product(factor: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, factor.weight.to(x.dtype))


def _ranks(model: "PreTrainedModel", peft: PeftConfig) -> dict[str, int]:
    """Module → rank; if several names in peft.rank_pattern match, the longest one applies."""
    from fedtune.models.methods._wrapped import matches, require, targets

    modules = targets(model, peft.targets)
    for name, rank in peft.rank_pattern.items():
        require("peft.rank_pattern", name, modules)
        if rank < 1:
            raise ModelError(f"peft.rank_pattern: the rank of '{name}' is {rank}, but must be at least 1")
    out = {}
    for module in modules:
        mine = [n for n in peft.rank_pattern if matches(module, n)]
        out[module] = peft.rank_pattern[max(mine, key=len)] if mine else peft.rank
    return out


def _save(wrapped: "PeftModel", over: str, folder: Path) -> None:
    """Write PEFT's folder. The live scaling may differ from the config's; PEFT's config stores it as one alpha per module.

    A LoftQ adapter compensates the error of its quantized weights and works only with them; the file `over` names these weights.
    """
    from fedtune.models.methods._wrapped import write

    if over:
        quantized = cast(Any, wrapped.base_model.model).config.quantization_config.to_dict()
        weights = {"precision": "nf4" if quantized["load_in_4bit"] else "int8", "compute": _COMPUTE[quantized["bnb_4bit_compute_dtype"]]}
        (folder / over).write_text(json.dumps(weights) + "\n", encoding="utf-8")
    config = cast(Any, wrapped.peft_config[SLOT])
    config.alpha_pattern = {}
    for name, layer in ((n.removeprefix("base_model.model."), cast(Any, m)) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")):
        rank = layer.r[SLOT]
        alpha = layer.scaling[SLOT] * (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(alpha, config.lora_alpha, rel_tol=1e-9):
            config.alpha_pattern[name] = alpha
    write(wrapped, folder)
