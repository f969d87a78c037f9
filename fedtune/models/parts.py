"""The parts of a backbone that an adapter can change: its text part and its linear layers."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["is_linear", "linear_layers", "other_weights", "text_prefix"]

_LARGE = 0.05  # smallest share of the weights that causes a warning


def text_prefix(model: nn.Module) -> str:
    """Prefix of the names in a composite model's language model, such as `model.language_model.`; "" for a text-only model.

    The other parts, such as a vision tower, get no gradient from text.
    """
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return ""
    decoder = cast(PreTrainedModel, model).get_decoder()
    return next((f"{n}." for n, m in model.named_modules() if m is decoder and n), "")


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes only W·x + b. False for a router that subclasses nn.Linear and returns a tuple."""
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or not module.weight.is_floating_point()  # a quantized layer has its own kernel


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers in all parts."""
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


def other_weights(model: nn.Module) -> tuple[float, str]:
    """The share of the text part's weights in matrices other than linear layers and embeddings, such as stacked experts, and the name of
    one of them.

    (0, "") if the share is small.
    """
    prefix = text_prefix(model)
    known = {id(p) for m in model.modules() if is_linear(m) or isinstance(m, nn.Embedding) for p in cast(Any, m).parameters(recurse=False)}
    output = cast(PreTrainedModel, model).get_output_embeddings()
    known |= {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    own = [(n, p) for n, p in model.named_parameters() if n.startswith(prefix)]
    rest: list[tuple[str, Tensor]] = [(n, p) for n, p in own if p.ndim >= 2 and id(p) not in known]
    share = sum(p.numel() for _, p in rest) / max(1, sum(p.numel() for _, p in own))
    return (share, max(rest, key=lambda each: each[1].numel())[0]) if share >= _LARGE else (0.0, "")
