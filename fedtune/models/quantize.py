"""Frozen backbones in 4 and 8 bits: NF4 with double quantization, and LLM.int8, using bitsandbytes, on CPU and CUDA.

The checkpoint is read and quantized one tensor at a time, so that the full-precision model is never in memory. The result is cached on disk
as a pre-quantized checkpoint. The model is always loaded from this cache, memory-mapped, so that later starts are fast and processes on one
machine share it.

All linear layers are quantized except classifier heads and the output layer. Norms and embeddings are stored in the compute dtype. They are
frozen, and norms compute in float32 internally, so PEFT's float32 copies would only double the activations.

Sources: Dettmers et al. 2023, QLoRA, arXiv:2305.14314 (NF4, double quantization); Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339.
"""

import copy
import gc
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import bitsandbytes.functional
import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ModelError
from fedtune.models.backbone import head_names
from fedtune.models.checkpoint import digest, fingerprint, first_line
from fedtune.models.parts import is_linear, other_weights
from fedtune.storage.atomic import new_folder
from fedtune.storage.heap import give_back, own_pages
from fedtune.storage.parsing import parse_json, read_text

__all__ = [
    "KINDS", "Recipe", "cache_root", "compute_dtype", "is_quantized", "left_whole", "load_quantized", "quantized", "recipe",
    "require_kernel", "unique_tensors", "weight_of",
]  # fmt: skip

KINDS = ("nf4", "int8")
_BLOCK = 64  # entries of a matrix that share a scale in NF4
_MARK = "fedtune.json"  # written last into a cache entry: the fingerprint of the other files
bnb: Any = bitsandbytes  # it has no type annotations for its public names
_LOG = logging.getLogger(__name__)

Check = Callable[[PreTrainedModel, dict[str, Any]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint is quantized.

    Args:
        precision: `nf4` or `int8`.
        compute: Dtype of a quantized layer's products and of all unquantized weights.
        skip: Modules that are not quantized: heads, the output layer.
        base: The checkpoint's fingerprint.
        model: The model's class and other properties that distinguish cache entries, such as the number of labels.
    """

    precision: str
    compute: torch.dtype
    skip: tuple[str, ...]
    base: str
    model: str

    def config(self) -> BitsAndBytesConfig:
        """The settings for transformers."""
        return BitsAndBytesConfig(
            load_in_4bit=self.precision == "nf4",
            load_in_8bit=self.precision == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            llm_int8_skip_modules=list(self.skip),
        )

    def folder(self) -> Path:
        """The folder in the cache, separate for each version of bitsandbytes and transformers."""
        parts = (self.base, self.precision, str(self.compute), *self.skip, self.model, bnb.__version__, transformers.__version__)
        return cache_root() / f"{self.base}-{self.precision}-{digest({}, [(p, b'') for p in parts])}"


def recipe(bare: PreTrainedModel, precision: str, compute: torch.dtype, base: str) -> Recipe:
    """The recipe for a checkpoint with the fingerprint `base`, from its model on the meta device.

    Raises:
        ModelError: No layer can be quantized.
    """
    output = [n for n, m in bare.named_modules() if m is cast(Any, bare.get_output_embeddings())]
    return Recipe(
        precision=precision,
        compute=compute,
        skip=tuple(dict.fromkeys([*head_names(bare), *output[:1], *left_whole(bare, precision)])),
        base=base,
        model=f"{type(bare).__name__} {getattr(bare.config, 'num_labels', 0)}",
    )


def cache_root() -> Path:
    """The folder of quantized backbones."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtune" / "quantised"


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `bf16`, `fp32` or `auto`; `auto` is bf16 if the machine has bf16 instructions, else fp32."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def require_kernel(precision: str, compute: torch.dtype, device: torch.device) -> None:
    """Raises ModelError if bitsandbytes cannot train through a quantized layer on this machine. Runs one, the only reliable test."""
    if why := _why_not(precision, compute, device):
        works = [p for p in KINDS if p != precision and not _why_not(p, compute, device)]
        raise ModelError(
            f"model.precision={precision}: bitsandbytes has no working kernel for this machine's {device.type} ({why});"
            f" take model.precision={' or '.join([*works, 'bf16'])}"
        )


def left_whole(bare: PreTrainedModel, precision: str) -> list[str]:
    """Linear layers of the backbone that cannot be quantized correctly and stay unquantized; logs a warning.

    bitsandbytes' CPU kernel (0.50) starts a new block of 64 at each row, but its quantization does not. If the row length is not a multiple
    of 64, the kernel would dequantize most of the matrix with a neighboring block's scale.

    Raises:
        ModelError: No layer can be quantized.
    """
    heads = head_names(bare)
    rows = {
        n: m.weight.shape[0] if isinstance(m, Conv1D) else m.in_features
        for n, m in bare.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and n.split(".")[0] not in heads
    }
    special = [n for n in rows if not is_linear(bare.get_submodule(n))]  # bitsandbytes would replace a router, which returns a tuple
    odd = [n for n, size in rows.items() if size % _BLOCK and n not in special] if precision == "nf4" else []
    share, stacked = other_weights(bare)
    if stacked:
        _LOG.warning("model.precision=%s: %.0f %% of the weights, such as '%s', are not linear layers and are not quantized", precision,
                     100 * share, stacked)  # fmt: skip
    if odd and len(odd) == len(rows):
        raise ModelError(
            f"model.precision=nf4: no layer of this backbone has a row length that is a multiple of {_BLOCK} ('{odd[0]}':"
            f" {rows[odd[0]]}): take int8 or bf16"
        )
    if odd:
        what = f"{len(odd)} of {len(rows)} linear layers are not quantized, such as '{odd[0]}'"
        _LOG.warning("model.precision=nf4: %s: its row length of %d is not a multiple of %d", what, rows[odd[0]], _BLOCK)
    return [*special, *odd]


def load_quantized(
    kind: type[PreTrainedModel],
    hf_config: Any,
    tensors: Callable[[], Mapping[str, Any]],
    check: Check,
    recipe: Recipe,
    device: torch.device,
) -> tuple[PreTrainedModel, list[str]]:
    """The quantized model, not yet frozen, from the cache; a missing or damaged entry is created.

    Args:
        kind: Class of the model.
        hf_config: Config of the model, with its attention implementation.
        tensors: Returns the checkpoint's tensors, such as `lazy_tensors`; called only if they are needed.
        check: (model, loading info) → names of the weights that the checkpoint lacks; raises ModelError if they are required.
        recipe: The quantization.
        device: The model's device.

    Returns:
        The model, and the names of the weights that the caller must initialize.

    Raises:
        ModelError: The machine has no kernel, or `check` fails.
    """
    require_kernel(recipe.precision, recipe.compute, device)
    place, built, fresh = recipe.folder(), None, list[str]()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):  # if several workers start at once, only one quantizes
            if (model := _cached(kind, hf_config, recipe, device, place)) is not None:
                return model[0], check(*model)
            built, fresh = _build(kind, hf_config, tensors(), check, recipe)
            _write(built, place, fresh)
    except OSError as bad:
        _LOG.warning("cannot cache the quantized backbone in %s (%s): every start quantizes it again", place, bad.strerror or bad)
        if built is None:
            built, fresh = _build(kind, hf_config, tensors(), check, recipe)
        return cast(PreTrainedModel, nn.Module.to(built, device)), fresh
    del built
    gc.collect()  # the model refers to itself
    give_back()  # before the file is mapped
    try:
        model = _read(kind, hf_config, recipe, device, place)
    except Exception as bad:  # some architectures' own code fails on quantized weights
        raise ModelError(
            f"the quantized backbone was written to {place} but cannot be read back ({first_line(bad)}): take model.precision=bf16 or fp32,"
            " or check the disk"
        ) from None
    return model[0], check(*model)


def quantized(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """A quantized copy of a float32 model, on the CPU.

    Raises:
        ModelError: The machine has no kernel.
    """
    require_kernel(recipe.precision, recipe.compute, torch.device("cpu"))
    hf_config = copy.deepcopy(model.config)
    hf_config.dtype = recipe.compute
    return _build(type(model), hf_config, model.state_dict(), lambda built, info: [], recipe)[0]


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is stored in 4 or 8 bits."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def weight_of(module: nn.Module) -> Tensor:
    """A quantized layer's dequantized weight, (out, in) float32."""
    weight = cast(Any, module.weight)
    if getattr(weight, "quant_state", None) is not None:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    return weight.data.float() * (scales.float() / 127.0)[:, None]


def dequantized(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A quantized layer's weight, (out, in), in the dtype of its products, as bitsandbytes' layers compute it."""
    weight = cast(Any, module.weight)
    if getattr(weight, "quant_state", None) is not None:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    scales = weight.SCB if weight.SCB is not None else cast(Any, module).state.SCB
    return weight.data.to(dtype).mul_((scales * (1.0 / 127.0))[:, None])


@lru_cache
def _why_not(precision: str, compute: torch.dtype, device: torch.device) -> str:
    """The reason why a quantized layer does not train on this machine; "" if it does."""
    try:
        wide: Any
        if precision == "nf4":
            wide = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=compute, compress_statistics=True, quant_type="nf4")
        else:
            wide = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
        drawn = torch.Generator().manual_seed(0)
        with torch.no_grad():
            wide.weight.data = torch.randn(32, 64, generator=drawn)
            first = wide.weight.data.double().to(device)
        layer = nn.Sequential(wide.to(device))
        _steady(layer)
        x = torch.randn(8, 64, generator=drawn).to(device, compute).requires_grad_()
        (layer(x).float().square().sum() / 2).backward()
        weight = weight_of(wide).double()
        y = x.detach().double() @ weight.T
        if (lost := (weight - first).norm() / first.norm()) > 0.2:
            return f"its weights are off by {lost:.0%}"
        off = (cast(Tensor, x.grad).double() - y @ weight).norm() / (y @ weight).norm()
        return "" if off < 0.05 else f"its gradient is off by {off:.0%}"
    except Exception as bad:  # such as RuntimeError, NotImplementedError, or AttributeError of a missing library
        return first_line(bad)


class _Linear8bit(bnb.nn.Linear8bitLt):
    """Uses the same products in evaluation as in training: on a CPU, bitsandbytes would also round the inputs to 8 bits in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if self.weight.CB is not None:
            scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB  # PEFT's DoRA returns the weight without its scales
            self.init_8bit_state()
            self.state.SCB = scales
        self.state.is_training = True
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bnb.matmul(x, self.weight, bias=bias, state=self.state)


def _steady(model: nn.Module) -> None:
    """Prevent evaluation from changing the layers: in eval mode on a CPU, a 4-bit layer would permanently repack its weights for a kernel
    that does not support gradients."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            cast(Any, module).support_avx512bf16_for_cpu = False
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.__class__ = _Linear8bit


def _build(
    kind: type[PreTrainedModel], hf_config: Any, tensors: Mapping[str, Any], check: Check, recipe: Recipe
) -> tuple[PreTrainedModel, list[str]]:
    """The model quantized from the checkpoint's tensors, always on the CPU, so that every machine gets the same values."""
    with own_pages():  # quantized weights, which stay, are allocated between whole ones
        model, info = cast(Any, kind).from_pretrained(
            None,
            output_loading_info=True,
            config=copy.deepcopy(hf_config),
            state_dict=dict(tensors),
            ignore_mismatched_sizes=True,  # `check` detects mismatches
            device_map={"": "cpu"},
            quantization_config=recipe.config(),
            dtype=recipe.compute,
        )
    _steady(model)
    return model, check(model, info)


def _cached(
    kind: type[PreTrainedModel], hf_config: Any, recipe: Recipe, device: torch.device, place: Path
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """The model from the cache, memory-mapped on a CPU; None if the entry is missing or damaged."""
    if not place.is_dir():
        return None
    try:
        return _read(kind, hf_config, recipe, device, place)
    except Exception as bad:  # transformers and bitsandbytes may raise any type for a damaged file
        _LOG.warning("the quantized backbone in %s cannot be used (%s): it is quantized again", place, first_line(bad))
        return None


def _read(
    kind: type[PreTrainedModel], hf_config: Any, recipe: Recipe, device: torch.device, place: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = copy.deepcopy(hf_config)
    config.quantization_config = recipe.config().to_dict()
    if parse_json(read_text(place / _MARK))["mark"] != fingerprint(place):
        raise ModelError("its fingerprint does not match")
    model, info = cast(Any, kind).from_pretrained(
        place, output_loading_info=True, config=config, use_safetensors=True, device_map={"": device}, dtype=recipe.compute
    )
    _steady(model)
    return model, info


def unique_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model's pre-quantized checkpoint; tied weights are listed once, under their first name."""
    tensors: dict[str, Tensor] = {}
    seen = set[int]()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def _write(model: PreTrainedModel, place: Path, fresh: Collection[str]) -> None:
    """Atomically write a pre-quantized checkpoint, without the weights that are initialized at each start.

    transformers' save_pretrained raises NotImplementedError for such a model.
    """
    tensors = {n: t for n, t in unique_tensors(model).items() if n not in fresh}
    with new_folder(place, mode=0o700, replace=True, durable=False) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": model.config.model_type}) + "\n", encoding="utf-8")
        (folder / _MARK).write_text(json.dumps({"mark": fingerprint(folder)}) + "\n", encoding="utf-8")
