"""A larger Llama with the same function as a small one, at the cost of the larger one.

The small model's residual stream is the first d of D channels. The other channels, heads, intermediate units and layers add zero to it. So
text and acceptance rate are those of the small model, but every weight is read and every product is computed.

- The input of an RMS norm is d numbers and D - d zeros: weight' = weight sqrt(d / D), eps' = eps d / D.
- Heads grow from h to k h channels. RoPE rotates channel pair i of a small head by theta^(-2i / h), the frequency of pair k i of a large
  head, so pair i is copied to pair k i. Scores are divided by sqrt(k h) instead of sqrt(h), so queries are multiplied by sqrt(k).
- A key head is copied to as many key heads as its query heads need.
- New tokens must never be sampled. One extra channel holds a constant for all tokens, too small to affect a norm. The last norm scales it
  up, and the new tokens' head rows multiply it by a negative number, so that their logits are about -64.

New layers come last, so an early exit after the small model's own layers is exact.

Source of the idea: Chen et al. 2016, Net2Net, arXiv:1511.05641 (function-preserving growth).
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine, read_json
from fedtune.inference.engine.shape import Shape, read_shape

SILENT = -64.0  # approximate logit of a new token
FAINT = 2.0**-20  # constant channel / root mean square of the others


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of the larger model; its heads have hidden / heads channels.

    Args:
        kv_heads: Minimum number of key-value heads; more if the small model's do not fit.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int


def widen(source: Path, out: Path, size: Size) -> Path:
    """Write the larger model as a float32 Hugging Face folder, unless it exists.

    Args:
        source: Hugging Face folder of a Llama without biases, with its weights in one file.

    Raises:
        ModelError: `source` is not such a model, or does not fit into `size`.
    """
    if (out / "model.safetensors").is_file():
        return out
    config = read_json(source / "config.json")
    shape = read_shape(config)
    kv_heads = _check(shape, size, source)
    old = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    new = _tensors(old, shape, size, kv_heads, _final_rms(source) if size.vocabulary > shape.vocab else 1.0)
    config |= {
        "hidden_size": size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": kv_heads,
        "head_dim": size.hidden // size.heads, "intermediate_size": size.inner, "vocab_size": size.vocabulary, "dtype": "float32",
        "rms_norm_eps": shape.eps * shape.hidden / size.hidden,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*token*"):
        shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _check(shape: Shape, size: Size, source: Path) -> int:
    """Return the smallest number of key heads that divides the heads and has room for the small model's."""
    if shape.family != "llama" or shape.qkv_bias or shape.o_bias or shape.mlp_bias or shape.rope.kind in ("dynamic", "yarn"):
        raise ModelError(f"{source} cannot be widened: it must be a Llama without biases, and without dynamic or YaRN scaling")
    width = size.hidden // size.heads
    if size.hidden % size.heads or width % shape.head_dim:
        raise ModelError(f"heads of {size.hidden} / {size.heads} channels are not a multiple of the {shape.head_dim} in {source}")
    needed = {
        "hidden": (size.hidden, shape.hidden + (size.vocabulary > shape.vocab)),
        "layers": (size.layers, shape.layers),
        "inner": (size.inner, shape.intermediate),
        "vocabulary": (size.vocabulary, shape.vocab),
    }
    for name, (given, least) in needed.items():
        if given < least:
            raise ModelError(f"{name}={given} is too small for {source}, which needs at least {least}")
    for kv_heads in range(size.kv_heads, size.heads + 1):
        if size.heads % kv_heads == 0 and shape.kv_heads * _copies(shape, size.heads // kv_heads) <= kv_heads:
            return kv_heads
    raise ModelError(f"{size.heads} heads are too few for the {shape.heads} of {source}: take more")


def _copies(shape: Shape, group: int) -> int:
    """Number of copies of each small key head, if each large one serves `group` query heads."""
    return math.ceil(shape.heads // shape.kv_heads / group)


def _tensors(old: dict[str, Tensor], shape: Shape, size: Size, kv_heads: int, rms: float) -> dict[str, Tensor]:
    d, inner, ratio = shape.hidden, shape.intermediate, math.sqrt(shape.hidden / size.hidden)
    q_rows, kv_rows, kv_from = _head_rows(shape, size, kv_heads)
    width, wide = shape.head_dim, size.hidden // size.heads

    def norm(name: str | None) -> Tensor:
        weight = torch.ones(size.hidden)
        if name is not None:
            weight[:] = 0
            weight[:d] = old[name] * ratio
        return weight

    new: dict[str, Tensor] = {}
    for i in range(size.layers):
        at, own = f"model.layers.{i}.", i < shape.layers
        q, o = torch.zeros(size.heads * wide, size.hidden), torch.zeros(size.hidden, size.heads * wide)
        k, v = torch.zeros(kv_heads * wide, size.hidden), torch.zeros(kv_heads * wide, size.hidden)
        gate, up, down = (torch.zeros(s) for s in ((size.inner, size.hidden), (size.inner, size.hidden), (size.hidden, size.inner)))
        if own:
            q[q_rows, :d] = old[f"{at}self_attn.q_proj.weight"] * math.sqrt(wide / width)
            k[kv_rows, :d] = old[f"{at}self_attn.k_proj.weight"][kv_from]
            v[kv_rows, :d] = old[f"{at}self_attn.v_proj.weight"][kv_from]
            o[:d, q_rows] = old[f"{at}self_attn.o_proj.weight"]
            gate[:inner, :d] = old[f"{at}mlp.gate_proj.weight"]
            up[:inner, :d] = old[f"{at}mlp.up_proj.weight"]
            down[:d, :inner] = old[f"{at}mlp.down_proj.weight"]
        parts = {"q": q, "k": k, "v": v, "o": o}
        new |= {f"{at}self_attn.{name}_proj.weight": part for name, part in parts.items()}
        new |= {f"{at}mlp.{name}_proj.weight": part for name, part in {"gate": gate, "up": up, "down": down}.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            new[f"{at}{name}.weight"] = norm(f"{at}{name}.weight" if own else None)
    new["model.norm.weight"] = norm("model.norm.weight")
    tables = ["model.embed_tokens.weight"] + ([] if shape.tied else ["lm_head.weight"])
    for name in tables:
        new[name] = torch.zeros(size.vocabulary, size.hidden)
        new[name][: shape.vocab, :d] = old[name]
    if size.vocabulary > shape.vocab:
        faint = 2.0 ** round(math.log2(rms * FAINT))  # a power of two, exact in bfloat16 too
        seen = old["model.norm.weight"].square().mean().sqrt().item()  # approximate value after the last norm: no larger than the others
        new["model.embed_tokens.weight"][: shape.vocab, d] = faint
        new["model.norm.weight"][d] = seen * ratio * rms / faint
        new[tables[-1]][shape.vocab :, d] = SILENT / seen
    return new


def _head_rows(shape: Shape, size: Size, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return target rows of the small query rows, target rows of keys and values, and the small model's rows of the latter."""
    width, wide, few, group = shape.head_dim, size.hidden // size.heads, shape.heads // shape.kv_heads, size.heads // kv_heads
    copies, half = _copies(shape, group), width // 2
    pair = torch.arange(half) * (wide // width)
    channels = torch.cat([pair, pair + wide // 2])
    q = [((j * copies + t // group) * group + t % group) * wide + channels for j in range(shape.kv_heads) for t in range(few)]
    kv = torch.arange(shape.kv_heads * copies).unsqueeze(1) * wide + channels
    kept = torch.arange(shape.kv_heads).repeat_interleave(copies).unsqueeze(1) * width + torch.arange(width)
    return torch.cat(q), kv.flatten(), kept.flatten()


@torch.inference_mode()
def _final_rms(source: Path) -> float:
    """Root mean square of the last norm's input: the median over random tokens."""
    engine = load_engine(source, "fp32")
    ids = np.random.default_rng(0).integers(engine.shape.vocab, size=min(64, engine.shape.context))
    hidden = engine.decoder.run(engine.decoder.embed(ids), [Span(engine.cache(), len(ids))])
    return float(np.median(np.sqrt(np.square(hidden).mean(1))))
