"""(IA)³: a learned factor for each output of the key and value layers, and for each input of the feed-forward block's last layer.

Source: Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning, arXiv:2205.05638.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import SLOT, Attached, Change, Edit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

targeted = True

# Module names in architectures without an entry in PEFT
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin")
_LAST = ("down_proj", "fc2", "lin2", "output.dense", "ffn_output", "dense_4h_to_h", "wo", "w2", "mlp.c_proj", "fc_out")


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """`<module>.ia3` is (out, 1), or (1, in) for the last layer of a feed-forward block; initialized to one.

    targets=all-linear selects PEFT's modules for the architecture, or else keys, values and last feed-forward layers by their usual names.
    """
    from peft import IA3Config  # imported late, because they load PEFT
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

    from fedtune.models.methods._wrapped import matches, named, targets, task_settings, transposed, without, wrap, write
    from fedtune.models.parts import linear_layers

    keeps = linear_layers(model)
    chosen = _defaults(model) if peft.targets == "all-linear" else targets(model, peft.targets)
    last = [m for m in chosen if any(matches(m, n) for n in (*FEEDFORWARD.get(model.config.model_type, ()), *_LAST))]
    config = IA3Config(**task_settings(model, task), target_modules=chosen, feedforward_modules=last, fan_in_fan_out=transposed(model))
    wrapped = wrap(model, config, chosen)
    # PEFT turns the lists into sets, so their order in the file would vary
    config.target_modules, config.feedforward_modules = sorted(chosen), sorted(last)
    parameters, names = named(wrapped, {f".ia3_l.{SLOT}": ".ia3"})
    return Attached(
        model=wrapped,
        parameters=parameters,
        names=names,
        disabled=partial(without, wrapped),
        save=partial(write, wrapped),
        keeps_inputs=keeps,
    )


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: Generator, std: float) -> Tensor:
    """Ones, which change nothing."""
    return torch.ones(shape)


def edits(state: "AdapterState", sizes: Mapping[str, tuple[int, ...]]) -> Iterator[Change]:
    """A (1, in) factor scales columns of W; an (out, 1) factor scales rows of W and the bias."""
    for name, factor in state.tensors.items():
        weight, bias = f"{name.removesuffix('.ia3')}.weight", f"{name.removesuffix('.ia3')}.bias"
        size = sizes.get(weight, (0, 0))  # for a missing weight, the caller rejects the change below
        if weight in sizes and (len(size) != 2 or tuple(factor.shape) not in ((size[0], 1), (1, size[1]))):
            found = tuple(factor.shape)
            raise ModelError(f"the adapter's '{name}' is {found}, the backbone's layer {size}: the adapter belongs to another backbone")
        yield Change(name=weight, shape=size, edit=_scaled(factor), linear=True)
        if bias in sizes and factor.shape[1] == 1:
            yield Change(name=bias, shape=sizes[bias], edit=_scaled(factor[:, 0]))


def _scaled(factor: Tensor) -> Edit:
    """Scale rows by a factor (out, 1) or (out,), or columns by a factor (1, in)."""
    by_row = factor.shape[1:] in ((), (1,))
    return lambda rows, first, last: rows * (factor[first:last] if by_row else factor).double()


def _defaults(model: "PreTrainedModel") -> list[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    from fedtune.models.methods._wrapped import linear_modules, matches

    kind, known = model.config.model_type, linear_modules(model)
    wanted = TARGETS.get(kind, (*_KEYS_VALUES, *_LAST))
    found = [m for m in known if any(matches(m, n) for n in wanted)]
    if not found:
        raise ModelError(
            f"peft.method=ia3: the layers of the architecture '{kind}' have no known names: set peft.targets to a list of them"
        )
    return found
