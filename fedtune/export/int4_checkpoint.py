"""Exports a run as a GPTQ or AWQ checkpoint in Hugging Face's formats, quantized by fedtune's own GPTQ or AWQ.

The linears of the layers are 4-bit, in groups of 128, 64 or 32 columns; embeddings, norms, biases and the output head are float16. GPTQ is
symmetric (zero point 8), without reordering of columns. AWQ has zero points; its scales are folded into the norms and linears before.
"""

import json
from collections.abc import Sequence
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedtune.errors import ConfigError, ModelError
from fedtune.export.calibrate import privacy_disclosure
from fedtune.export.edge import error_figures, lasting_config, origin_card, texts
from fedtune.export.huggingface import CARD, check_out, export_folder, write_tokenizer
from fedtune.export.measured import streamed_score
from fedtune.export.merged import Merged, read_merged
from fedtune.export.merged_tensor import MergedTensor
from fedtune.inference.engine.gptq_awq import pack_codes, packed_tensors, unpack_weight
from fedtune.inference.engine.gptq_config import Format, Packing
from fedtune.inference.engine.package import is_linear, tensor_shapes
from fedtune.inference.engine.package_writer import TensorFile
from fedtune.inference.engine.text import read_text
from fedtune.inference.quantize.model import QuantizeSettings, quantize_model
from fedtune.inference.quantize.rtn import QuantizedLinear, unpack_int4
from fedtune.models.tokens import load_tokenizer
from fedtune.version import __version__

__all__ = ["export_int4_checkpoint"]

_GROUPS = (128, 64, 32)


def export_int4_checkpoint(source: Path, out: Path, *, to: Format, calibrate: Path | None, replace: bool = False) -> Path:
    """Merge an adapter into its decoder tensor by tensor, quantize it, and write the checkpoint.

    The perplexity before and after is measured on text held out from `calibrate`.

    Args:
        source: A run directory, an adapter folder whose adapter_config.json names the backbone, or a complete model.
        out: The folder to write; it appears complete or not at all.
        to: `gptq` or `awq`.
        calibrate: Calibration text: a file, a folder of files, or a run (its training rows).
        replace: Overwrite `out` if it is an export of fedtune.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter.
        ConfigError: There is no calibration text.
        DataError: The calibration text cannot be read.
        ModelError: The format or the quantizer does not support the model, or `out` exists.
    """
    source, out = Path(source), Path(out)
    check_out(out, replace)
    if calibrate is None:
        raise ConfigError(f"--to {to} needs text: give --calibrate RUN, a .txt file or rows of JSON")
    merged = read_merged(source)
    packing = _packing(merged, to)
    tokenizer = load_tokenizer(merged.folder, merged.origin.model, merged.origin.task)
    recipe = QuantizeSettings(kind="int4s" if to == "gptq" else "int4z", group=packing.group, method=to, head=None)
    with export_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(_config(merged, packing), indent=2) + "\n", encoding="utf-8")
        write_tokenizer(tokenizer, merged.folder, folder, merged.origin.task)
        text = read_text(folder, saved=True)
        seen, held = texts(merged, text, tokenizer, calibrate)
        before = streamed_score(merged, held, folder)
        figures = _write_weights(folder, merged, packing, recipe, seen)
        with safe_open(folder / "model.safetensors", "pt") as handle:
            after = streamed_score(_written(merged, packing, handle), held, folder)
        found = {"before": before.perplexity, "after": after.perplexity, "tokens": after.tokens, "text": "calibrate"}
        card = origin_card(merged)
        card |= {"beyond_privacy": beyond} if (beyond := privacy_disclosure(calibrate)) else {}
        (folder / CARD).write_text(json.dumps({**card, "quantised": {**figures, "perplexity": found}}, indent=1) + "\n", encoding="utf-8")
    return out


def _packing(merged: Merged, to: Format) -> Packing:
    """The format with the largest group that divides all linears.

    Raises:
        ModelError: The format cannot hold the model.
    """
    source = merged.origin.source
    if merged.virtual_tokens:
        method = merged.origin.adapter.state.spec.method
        raise ModelError(f"{source}: a {to.upper()} checkpoint has no place for the virtual tokens of {method}: use --to edge")
    sizes = {name: tensor.shape for name, tensor in merged.tensors.items() if _is_packed(name)}
    for name, (rows, columns) in sizes.items():
        if rows % 8 or columns % _GROUPS[-1]:
            raise ModelError(
                f"{source}: '{name}' is {(rows, columns)}, but {to.upper()} needs multiples of 8 and {_GROUPS[-1]}: use --to edge"
            )
    group = next(g for g in _GROUPS if all(columns % g == 0 for _, columns in sizes.values()))
    return Packing(format=to, group=group, offset=1 if to == "gptq" else 0)


def _is_packed(name: str) -> bool:
    return is_linear(name) and name != "lm_head.weight"


def _write_weights(folder: Path, merged: Merged, packing: Packing, recipe: QuantizeSettings, seen: Sequence[Tensor]) -> dict[str, Any]:
    """Write model.safetensors. Returns the card's figures."""
    specs, errors = dict[str, tuple[torch.dtype, tuple[int, ...]]](), dict[str, float]()
    for name, tensor in merged.tensors.items():
        stem = name.removesuffix(".weight")
        if _is_packed(name):
            rows, columns = tensor.shape
            specs |= {f"{stem}.{part}": spec for part, spec in packed_tensors(packing, rows, columns).items()}
        else:
            specs[name] = (torch.float16, tensor.shape)
    file = TensorFile(folder / "model.safetensors", specs)

    def read(name: str, first: int, last: int) -> Tensor:
        return merged.tensors[name].rows(first, last, torch.float32)

    for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if not merged.shape.tied else [])):
        file.put(name, _half(merged, name, merged.tensors[name].read(torch.float32)))
    for name, made in quantize_model(merged.shape, read, recipe, seen, scratch=folder):
        if not isinstance(made, QuantizedLinear):
            file.put(name, _half(merged, name, made))
            continue
        stem = name.removesuffix(".weight")
        errors[stem] = made.error
        codes = unpack_int4(made.tensors["packed"], made.columns)
        for part, tensor in pack_codes(packing, codes, made.tensors["scale"], made.tensors["zero"]).items():
            file.put(f"{stem}.{part}", tensor)
    file.close()
    return {"kind": "int4", "method": packing.format, "group": packing.group, **error_figures(errors)}


def _half(merged: Merged, name: str, values: Tensor) -> Tensor:
    half = values.half()
    if not torch.isfinite(half).all():
        raise ModelError(f"{merged.folder}: '{name}' has values beyond float16's maximum of 65504: use --to edge or hf")
    return half


def _config(merged: Merged, packing: Packing) -> dict[str, Any]:
    """The backbone's config.json, with the quantization and the dtype of the other tensors."""
    config = lasting_config(merged)
    config["tie_word_embeddings"] = merged.shape.tied
    config["dtype"] = config["torch_dtype"] = "float16"
    own: dict[str, Any] = {"quant_method": packing.format, "bits": 4, "group_size": packing.group}
    if packing.format == "gptq":
        own |= {"desc_act": False, "sym": True, "checkpoint_format": "gptq", "damp_percent": 0.01, "true_sequential": False}
        own |= {"lm_head": False, "meta": {"quantizer": [f"fedtune:{__version__}"]}}
    else:
        own |= {"zero_point": True, "version": "gemm"}
    return {**config, "quantization_config": own}


class _Dequantized(MergedTensor):
    """A 4-bit weight of the written file."""

    def __init__(self, packing: Packing, handle: Any, stem: str, size: tuple[int, int]) -> None:
        super().__init__(torch.empty(size, device="meta"))
        self._read = partial(unpack_weight, packing, lambda part: handle.get_tensor(f"{stem}.{part}"), size, stem)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self._read()[first:last].to(dtype)


def _written(merged: Merged, packing: Packing, handle: Any) -> Merged:
    """The model as its file has it; a 4-bit weight is dequantized when it is read."""
    tensors = dict[str, MergedTensor]()
    for name, size in tensor_shapes(merged.shape):
        packs = _is_packed(name)
        stem = name.removesuffix(".weight")
        tensors[name] = _Dequantized(packing, handle, stem, (size[0], size[1])) if packs else MergedTensor(handle.get_tensor(name))
    return replaced(merged, tensors=tensors)
