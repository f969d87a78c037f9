"""The shape of a Llama-family decoder, read from its config.json."""

import math
from dataclasses import dataclass
from typing import Any

from fedtune.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
LARGEST = {"num_hidden_layers": 4096}  # a damaged config must not allocate huge tables


class Unsupported(ModelError):
    """The engine does not support this model; transformers may."""


@dataclass(frozen=True, kw_only=True)
class RopeShape:
    """Rotary embedding: base, kind of scaling, and the scaling's numbers under their config.json names."""

    theta: float = 10_000.0
    kind: str = "default"
    numbers: tuple[tuple[str, float | bool | None], ...] = ()

    def get(self, name: str, default: Any = None) -> Any:
        value = dict(self.numbers).get(name)
        return default if value is None else value


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and switches of a decoder.

    Args:
        family: model_type of the config.
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocab: Sizes.
        eps: Epsilon of the RMS norms.
        context: max_position_embeddings.
        tied: Whether the output head is the embedding table.
        qkv_bias, o_bias, mlp_bias: Which linears have biases.
        qk_norm: RMS norms over each head's query and key (Qwen3).
        windows: Each layer's sliding window in tokens, including the query; None is unlimited.
        bos, eos: Special tokens; a model may have several end tokens.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    context: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: RopeShape
    bos: int | None
    eos: tuple[int, ...]


def read_shape(config: dict[str, Any]) -> Shape:
    """Read the shape from a config.json.

    Raises:
        Unsupported: The engine does not support the architecture or a feature.
        ModelError: A size is missing or impossible.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise Unsupported(f"the engine does not support model_type={family!r}: it supports {', '.join(FAMILIES)}")
    names = config.get("architectures")
    if isinstance(names, list) and names and not any(str(a).endswith("ForCausalLM") for a in names):
        raise Unsupported(f"{names[0]} does not generate text: give a causal language model")
    if config.get("quantization_config"):
        raise Unsupported("the engine does not support quantization_config: give the merged model in 16 or 32 bits")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise Unsupported(f"the engine does not support hidden_act={act!r}: it supports silu")
    hidden, layers, heads = (_size(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = _size(config, "num_key_value_heads", heads if family in ("llama", "qwen2") else None)
    head_dim = _size(config, "head_dim", 128 if family == "qwen3" and "head_dim" not in config else hidden // heads)
    context = _size(config, "max_position_embeddings", {"llama": 2048, "mistral": 131_072}.get(family, 32_768))
    if heads % kv_heads:
        raise ModelError(f"config.json has {heads} attention heads and {kv_heads} key heads: the first must be a multiple of the second")
    if head_dim % 2 or head_dim < 4:
        raise Unsupported(f"the engine does not support head_dim={head_dim}: it must be even and at least 4")
    eps = config.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise ModelError(f"config.json has rms_norm_eps={eps!r}: it must be a small positive number")
    eos = config.get("eos_token_id")
    ends = [eos] if not isinstance(eos, list) else eos
    bias = bool(config.get("attention_bias", False))
    return Shape(
        family=family,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size(config, "intermediate_size"),
        vocab=_size(config, "vocab_size"),
        eps=float(eps),
        context=context,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family != "mistral" and bias),
        o_bias=family in ("llama", "qwen3") and bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(config, family, layers),
        rope=_rope(config, context),
        bos=_token(config.get("bos_token_id")),
        eos=tuple(t for t in map(_token, ends) if t is not None),
    )


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST.get(name, 2**31):
        raise ModelError(f"config.json has {name}={value!r}: it must be a positive integer of a plausible size")
    return value


def _token(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    default = 4096
    if config.get("sliding_window", default) is None or (family != "mistral" and not config.get("use_sliding_window", False)):
        return (None,) * layers
    window = _size(config, "sliding_window", default)
    if family == "mistral":
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        begin = config.get("max_window_layers", 28)
        if not isinstance(begin, int):
            raise ModelError(f"config.json has max_window_layers={begin!r}: it must be an integer")
        return tuple(window if i >= begin else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"config.json's layer_types must have {layers} entries, one per layer")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise Unsupported(f"the engine does not support layers of type {kind!r}: it supports {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def _rope(config: dict[str, Any], context: int) -> RopeShape:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelError("config.json's rope_parameters must be an object")
    kind = found.get("rope_type", found.get("type", "default"))
    if any(isinstance(value, dict) for value in found.values()):
        raise Unsupported("the engine needs the same rope_parameters for all layers, and config.json's differ")
    if kind not in SCALINGS:
        raise Unsupported(f"the engine does not support rope_type={kind!r}: it supports {', '.join(SCALINGS)}")
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise Unsupported("the engine does not support partial rotary embeddings: partial_rotary_factor must be 1")
    theta = found.get("rope_theta", config.get("rope_theta", 10_000.0))
    numbers = {k: v for k, v in found.items() if v is None or isinstance(v, float | int)}
    for name in {"linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ()):
        if not numbers.get(name):
            raise ModelError(f"config.json's rope_parameters of rope_type={kind!r} need {name}")
    for name, value in numbers.items():
        if not isinstance(value, bool) and value is not None and not 0 < value < math.inf:
            raise ModelError(f"config.json's rope_parameters have {name}={value}: it must be a positive number")
    if kind == "llama3" and not float(numbers["low_freq_factor"] or 0) < float(numbers["high_freq_factor"] or 0):
        raise ModelError("config.json's rope_parameters must have a low_freq_factor below their high_freq_factor")
    if not isinstance(theta, float | int) or isinstance(theta, bool) or not 1 < theta < math.inf:
        raise ModelError(f"config.json says rope_theta={theta!r}: it must be a number above 1")
    if kind in ("llama3", "yarn"):
        own = config if config.get("original_max_position_embeddings") else found
        numbers["original_max_position_embeddings"] = _size(own, "original_max_position_embeddings", context)
    if kind in ("dynamic", "yarn"):
        numbers["max_position_embeddings"] = context
    return RopeShape(theta=float(theta), kind=kind, numbers=tuple(sorted(numbers.items())))
