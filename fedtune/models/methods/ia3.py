"""(IA)³: a learnt factor for each output of keys and values, and for each input of the feed-forward block's last layer.

Source: Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning, arXiv:2205.05638.
"""

from functools import partial

import torch
from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
)
from torch import Generator, Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached
from fedtune.models.methods.lora import linear
from fedtune.models.methods.wrapped import SLOT, linear_modules, matches, named, targets, task_settings, transposed, without, wrap, write
from fedtune.state import AdapterState

# Names of architectures that PEFT has no entry for
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin")
_LAST = ("down_proj", "fc2", "lin2", "output.dense", "ffn_output", "dense_4h_to_h", "wo", "w2", "mlp.c_proj", "fc_out")


def attach(model: PreTrainedModel, peft: PeftConfig, task: TaskConfig) -> Attached:
    """`<module>.ia3` is (out, 1), or (1, in) for the last layer of a feed-forward block; it starts at one.

    targets=all-linear takes PEFT's modules for the architecture, else keys, values and the last feed-forward layers by their usual names.
    """
    chosen = _defaults(model) if peft.targets == "all-linear" else targets(model, peft.targets)
    last = [m for m in chosen if any(matches(m, n) for n in (*FEEDFORWARD.get(model.config.model_type, ()), *_LAST))]
    config = IA3Config(**task_settings(model, task), target_modules=chosen, feedforward_modules=last, fan_in_fan_out=transposed(model))
    wrapped = wrap(model, config, chosen)
    # PEFT makes them sets, whose order in the file would vary
    config.target_modules, config.feedforward_modules = sorted(chosen), sorted(last)
    parameters, names = named(wrapped, {f".ia3_l.{SLOT}": ".ia3"})
    return Attached(model=wrapped, parameters=parameters, names=names, disabled=partial(without, wrapped), save=partial(write, wrapped))


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """One, so that it changes nothing yet."""
    return torch.ones(shape)


def merge(model: PreTrainedModel, state: AdapterState) -> None:
    """Columns of W scaled by a (1, in) factor; rows of W and the bias by an (out, 1) one."""
    modules = dict(model.named_modules())
    for name, factor in state.tensors.items():
        layer = linear(modules, name.removesuffix(".ia3"))
        weight = layer.weight.detach().double()
        weight, factor = weight.T if isinstance(layer, Conv1D) else weight, factor.double().to(weight.device)
        if factor.shape not in ((weight.shape[0], 1), (1, weight.shape[1])):
            shapes = f"{tuple(factor.shape)}, the backbone's layer {tuple(weight.shape)}"
            raise ModelError(f"the adapter's '{name}' is {shapes}: it belongs to another backbone")
        changed = weight * factor
        with torch.no_grad():
            layer.weight.copy_(changed.T if isinstance(layer, Conv1D) else changed)
            if factor.shape[1] == 1 and layer.bias is not None:
                layer.bias.copy_(layer.bias.double() * factor[:, 0])


def _defaults(model: PreTrainedModel) -> list[str]:
    kind, known = model.config.model_type, linear_modules(model)
    wanted = TARGETS.get(kind, (*_KEYS_VALUES, *_LAST))
    found = [m for m in known if any(matches(m, n) for n in wanted)]
    if not found:
        raise ModelError(
            f"peft.method=ia3: the layers of the architecture '{kind}' have no known names: set peft.targets to a list of them"
        )
    return found
