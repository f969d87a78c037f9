"""Exports a run's merged decoder as a GGUF file, for llama.cpp and programs built on it.

The `gguf` library writes it, tensor by tensor. llama.cpp's architecture `llama` rotates adjacent pairs of channels where transformers
rotates halves, so the rows of queries and keys are permuted; those of `qwen2` and `qwen3` are not.
"""

import contextlib
import json
import math
import re
import tempfile
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.export.gguf_tokens import Vocabulary, read_vocabulary
from fedtune.export.huggingface import write_tokenizer
from fedtune.export.merged import Merged, read_merged
from fedtune.export.provenance import provenance
from fedtune.inference.engine.rope import frequencies, pairs
from fedtune.inference.engine.shape import Shape
from fedtune.models.tokens import load_tokenizer
from fedtune.storage.atomic import new_file
from fedtune.storage.parsing import parse_json

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

__all__ = ["TYPES", "describe_gguf", "export_gguf"]

TYPES = ("f16", "q8_0", "q4_0")
_ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CARD = "fedtune.card"  # metadata key of the card (JSON)
_ROWS = 1 << 19  # matrix entries that are quantized at once
_FLAGGING = re.compile("(?i)(?<=phi)-?(?=3)|(?<=modern)-(?=bert)")  # names that make llama.cpp set flags of tokens that may not exist


def export_gguf(source: Path, out: Path, *, kind: str = "f16", replace: bool = False, begins: bool | None = None) -> Path:
    """Merge an adapter into its decoder tensor by tensor, and write one GGUF file.

    Norms and biases are float32. With q4_0 the output matrix (the embedding table if tied) is q8_0. A matrix whose number of columns is not
    a multiple of 32 is f16.

    Args:
        source: A run directory, an adapter folder whose adapter_config.json names the backbone, or a complete model.
        out: The file to write; it appears complete or not at all.
        kind: One of `TYPES`.
        replace: Overwrite `out`.
        begins: Whether llama.cpp puts the BOS token before a text; None: as in training on plain text.

    Returns:
        `out`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter.
        ModelError: llama.cpp does not support the architecture or tokenizer, the gguf library is missing, or `out` exists.
    """
    library = _library()
    source, out = Path(source), Path(out)
    if out.exists() and not (replace and out.is_file()):
        raise ModelError(f"{out} already exists: give another file with --out, or remove it")
    if kind not in TYPES:
        raise ModelError(f"the gguf library does not write {kind}: choose {', '.join(TYPES)}, or choose f16 and quantize it with llama.cpp")
    merged = read_merged(source)
    _check(merged)
    tokenizer = load_tokenizer(merged.folder, merged.origin.model, merged.origin.task)
    card = {**merged.origin.card, "base": merged.fingerprint, **provenance(merged.origin)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(out, durable=False) as beside, tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
            folder = Path(made)
            write_tokenizer(tokenizer, merged.folder, folder, merged.origin.task)
            vocabulary = read_vocabulary(folder, tokenizer, merged.shape.vocab)
            if vocabulary.differs:
                card["tokenizer"] = vocabulary.differs
            with contextlib.closing(library.GGUFWriter(beside, _ARCH[merged.shape.family])) as writer:
                _describe(writer, card, kind)
                _sizes(writer, merged.shape)
                _vocabulary(writer, vocabulary if begins is None else replaced(vocabulary, begins=begins))
                _tensors(writer, merged, kind)
    except OSError as bad:
        raise ModelError(f"cannot write {out}: {bad.strerror or bad}") from None
    return out


def describe_gguf(out: Path) -> str:
    """Describe a file of `export_gguf`: its notes, one sentence each; "" if there are none."""
    card = parse_json(_library().GGUFReader(out).fields[_CARD].contents())
    return "; ".join(card[name] for name in ("note", "tokenizer") if card.get(name))


def _library() -> Any:
    try:
        import gguf  # lazy: an optional dependency
    except ImportError:
        raise ModelError("writing GGUF needs the gguf library: pip install 'fedtune[gguf]'") from None
    return gguf


def _check(merged: Merged) -> None:
    """Raise ModelError if a GGUF file cannot express the model."""
    shape, source = merged.shape, merged.origin.source
    if shape.family not in _ARCH:
        raise ModelError(f"{source}: fedtune does not write GGUF files of model_type={shape.family}: use --to edge or hf")
    if merged.virtual_tokens:
        raise ModelError(
            f"{source}: a GGUF file has no place for the virtual tokens of {merged.origin.adapter.state.spec.method}: use --to edge"
        )
    if shape.family == "qwen3" and shape.qkv_bias:
        raise ModelError(f"{source}: llama.cpp's qwen3 has no attention biases: use --to edge or hf")
    if shape.rope.kind == "yarn" and any(shape.rope.get(n) is not None for n in ("attention_factor", "mscale", "mscale_all_dim")):
        raise ModelError(f"{source}: llama.cpp computes YaRN's attention factor itself, but the model sets its own: use --to edge or hf")
    if shape.rope.kind == "yarn" and not shape.rope.get("truncate", True):
        raise ModelError(f"{source}: llama.cpp rounds the range of YaRN's ramp, this model (truncate=false) does not: use --to edge or hf")


def _describe(writer: "GGUFWriter", card: dict[str, Any], kind: str) -> None:
    from gguf import LlamaFileType

    came, types = card["provenance"], {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_name(_FLAGGING.sub(" ", str(came.get("name") or came.get("model") or "adapter")))
    writer.add_description("exported by fedtune" + (f": {came['method']}, round {came['round']}" if "method" in came else ""))
    writer.add_file_type(LlamaFileType[types[kind]])
    writer.add_quantization_version(2)  # the version of ggml's block formats
    writer.add_string(_CARD, json.dumps(card))


def _sizes(writer: "GGUFWriter", shape: Shape) -> None:
    from gguf import RopeScalingType

    # llama.cpp ignores sliding windows in these architectures: within the smallest window all layers attend to everything
    writer.add_context_length(min([shape.context, *(w for w in shape.windows if w)]))
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope.theta)
    # dynamic scaling starts beyond the context, and llama3's scaling is a tensor
    if shape.rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if shape.rope.kind == "linear" else RopeScalingType.YARN)
        factor = shape.rope.get("factor") or shape.context / shape.rope.get("original_max_position_embeddings")  # optional for YaRN
        writer.add_rope_scaling_factor(float(factor))
    if shape.rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(shape.rope.get("original_max_position_embeddings")))
        writer.add_rope_scaling_yarn_beta_fast(float(shape.rope.get("beta_fast", 32.0)))
        writer.add_rope_scaling_yarn_beta_slow(float(shape.rope.get("beta_slow", 1.0)))


def _vocabulary(writer: "GGUFWriter", own: Vocabulary) -> None:
    writer.add_tokenizer_model(own.model)
    writer.add_token_list(own.tokens)
    writer.add_token_types(own.types)
    if own.model == "llama":
        writer.add_token_scores(own.scores)
        writer.add_add_space_prefix(own.space)
    else:
        writer.add_tokenizer_pre(own.pre)
        writer.add_token_merges(own.merges)
    writer.add_add_bos_token(own.begins)
    writer.add_add_eos_token(False)
    for name, i in own.ids.items():
        getattr(writer, f"add_{name}_token_id")(i)
    if own.template:
        writer.add_chat_template(own.template)


def _tensors(writer: "GGUFWriter", merged: Merged, kind: str) -> None:
    """Declare every tensor, then write them one by one."""
    import gguf

    shape, arch = merged.shape, gguf.MODEL_ARCH[_ARCH[merged.shape.family].upper()]
    names = gguf.get_tensor_name_map(arch, shape.layers)
    if shape.rope.kind == "llama3":
        writer.add_tensor_info("rope_freqs.weight", (shape.head_dim // 2,), np.dtype(np.float32), shape.head_dim // 2 * 4)
    types = {}
    for name, tensor in merged.tensors.items():
        types[name] = _type(name, tensor.shape, shape, kind)
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        size, dtype = _stored(tensor.shape, types[name])
        raw = types[name] if dtype == np.uint8 else None
        writer.add_tensor_info(own, size, np.dtype(dtype), math.prod(size) * np.dtype(dtype).itemsize, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if shape.rope.kind == "llama3":
        plain = shape.rope.theta ** -(np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
        writer.write_tensor_data((plain / frequencies(shape.rope, shape.head_dim)[0]).astype(np.float32))
    for name, tensor in merged.tensors.items():
        order = _order(name, shape)
        if order is not None:  # queries and keys: small enough to read as a whole
            whole = gguf.quants.quantize(tensor.read(torch.float32).numpy()[order], types[name])
        else:
            whole = np.empty(*_stored(tensor.shape, types[name]))
            step = max(_ROWS // math.prod(tensor.shape[1:]), 1)
            for first in range(0, tensor.shape[0], step):
                values = tensor.rows(first, min(first + step, tensor.shape[0]), torch.float32).numpy()
                whole[first : first + len(values)] = gguf.quants.quantize(values, types[name])
        if whole.dtype == np.float16 and not np.isfinite(whole).all():
            raise ModelError(f"{merged.folder}: '{name}' has values beyond float16's maximum of 65504: use --to edge or hf")
        writer.write_tensor_data(whole)


def _stored(size: tuple[int, ...], kind: "GGMLQuantizationType") -> tuple[tuple[int, ...], type]:
    """Shape and dtype of a tensor's array; bytes if it is quantized."""
    import gguf

    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    return (size, plain[kind]) if kind in plain else (gguf.quant_shape_to_byte_shape(size, kind), np.uint8)


def _type(name: str, size: tuple[int, ...], shape: Shape, kind: str) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType as Type

    if len(size) == 1:
        return Type.F32
    if kind == "f16" or size[1] % 32:
        return Type.F16
    output = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    return Type.Q8_0 if kind == "q8_0" or name == output else Type.Q4_0


def _order(name: str, shape: Shape) -> NDArray[np.int64] | None:
    """The row order that puts channels rotated together side by side, for queries and keys of llama.cpp's `llama`; else None."""
    part = name.rpartition("self_attn.")[2].partition("_proj.")[0]
    if _ARCH[shape.family] != "llama" or part not in ("q", "k"):
        return None
    return pairs(shape.heads if part == "q" else shape.kv_heads, shape.head_dim)
