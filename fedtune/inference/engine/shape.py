"""The shape of a Llama-like decoder, read from its config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.errors import ModelError

_GEMMA: dict[str, Any] = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # model_type → values that transformers uses where config.json has none
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128},
    "gemma2": _GEMMA | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                        "vocab_size": 256_000},
    "gemma3_text": _GEMMA | {"max_position_embeddings": 131_072, "vocab_size": 262_208},
    "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    "smollm3": {"max_position_embeddings": 32_768, "num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": True,
                "rope_theta": 2_000_000.0},
    "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}  # fmt: skip
FAMILIES = tuple(DEFAULTS)
COMPOSITES = {"gemma3": "gemma3_text"}  # model_type → that of its text_config
CLASSES = {"gemma3_text": "Gemma3ForCausalLM"}  # model_type → transformers' class, if it is not <Model_type>ForCausalLM
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
LARGEST = {"num_hidden_layers": 4096}  # a damaged config must not allocate huge tables


class Unsupported(ModelError):
    """The engine does not support this model; transformers may."""


@dataclass(frozen=True, kw_only=True)
class RopeShape:
    """Rotary embedding: base, kind of scaling (`none`: no rotation), and the scaling's numbers under their config.json names."""

    theta: float = 10_000.0
    kind: str = "default"
    numbers: tuple[tuple[str, float | bool | tuple[float, ...] | None], ...] = ()

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
        context: Longest text in tokens: max_position_embeddings, or what longrope's short factors are for.
        tied: Whether the output head is the embedding table.
        qkv_bias, o_bias, mlp_bias: Which linears have biases.
        qk_norm: RMS norms over each head's query and key (Qwen3, Gemma 3).
        windows: Each layer's sliding window in tokens, including the query; None is unlimited.
        rope: Rotary embedding of the layers.

    Other arguments:
        layer_ropes: Each layer's rotary embedding, if they differ (Gemma 3, SmolLM3).
        rotary: Channels of a head that are rotated, the first ones; 0 is all.
        qk_norm_whole: With `qk_norm`, norms over all heads at once (OLMo 2).
        norm_offset: Number that is added to each norm's weight (Gemma: 1).
        pre_norms, post_norms: Whether attention and MLP have norms before and after them.
        activation: silu, or gelu_tanh.
        embed_scale: Factor on the embeddings of tokens.
        query_scale: Factor on queries, beside head_dim^-0.5.
        attention_cap, logit_cap: c of the soft cap c · tanh(x / c) on attention scores and on logits; None is no cap.
        fused: Whether the checkpoint has one linear for query, key and value, and one for gate and up (Phi-3).
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
    layer_ropes: tuple[RopeShape, ...] = ()
    rotary: int = 0
    qk_norm_whole: bool = False
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    query_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    fused: bool = False

    def rope_of(self, layer: int) -> RopeShape:
        """The rotary embedding of a layer."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    @property
    def norms(self) -> dict[str, str]:
        """A layer's norms: place → name in the checkpoint. The places are the fields of the decoder's `Layer`."""
        if not self.post_norms:
            return {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        before = {"norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"} if self.pre_norms else {}
        return before | {"o_norm": "post_attention_layernorm", "down_norm": "post_feedforward_layernorm"}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the text decoder: the config itself, or the text part of a composite model's.

    Raises:
        ModelError: A composite config has no text part.
    """
    kind = COMPOSITES.get(str(config.get("model_type")))
    if kind is None:
        return config
    own = config.get("text_config")
    if not isinstance(own, dict):
        raise ModelError(f"config.json of model_type={config['model_type']!r} has no text_config: it is incomplete")
    shared = {n: config[n] for n in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config") if n in config}
    uncapped = {"final_logit_softcapping": None}  # transformers' class of the composite model does not cap logits
    return {**own, **shared, **uncapped, "model_type": kind, "architectures": [CLASSES[kind]]}


def canonical(name: str) -> str:
    """The decoder's name of a checkpoint's tensor: that of a composite model without the name of its text part.

    >>> canonical("model.language_model.norm.weight"), canonical("language_model.lm_head.weight"), canonical("model.norm.weight")
    ('model.norm.weight', 'lm_head.weight', 'model.norm.weight')
    """
    for prefix, own in (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def read_shape(config: dict[str, Any]) -> Shape:
    """Read the shape from a config.json.

    Raises:
        Unsupported: The engine does not support the architecture or a feature.
        ModelError: A size is missing or impossible.
    """
    given = text_config(config)
    family = given.get("model_type")
    if family not in FAMILIES:
        raise Unsupported(f"the engine does not support model_type={family!r}: it supports {', '.join((*FAMILIES, *COMPOSITES))}")
    config = {**DEFAULTS[family], **given}
    names = config.get("architectures")
    if isinstance(names, list) and names and not any(str(a).endswith("ForCausalLM") for a in names):
        raise Unsupported(f"{names[0]} does not generate text: give a causal language model")
    if config.get("quantization_config"):
        raise Unsupported("the engine does not support quantization_config: give the merged model in 16 or 32 bits")
    if config.get("use_bidirectional_attention"):
        raise Unsupported("the engine does not support use_bidirectional_attention: its attention is causal")
    gemma = family in ("gemma2", "gemma3_text")
    act = config.get("hidden_activation" if gemma else "hidden_act") or "silu"
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise Unsupported(f"the engine does not support hidden_act={act!r}: it supports {', '.join(ACTIVATIONS)}")
    hidden, layers, heads = (_size(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = _size(config, "num_key_value_heads", None if family in ("mistral", "qwen3") else heads)
    head_dim = _size(config, "head_dim", hidden // heads)
    context = _size(config, "max_position_embeddings", DEFAULTS[family]["max_position_embeddings"])
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
    rotary = _rotary(config, family, head_dim)
    rope, layer_ropes = _ropes(config, family, layers, rotary, context)
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
        context=min(context, rope.get("original_max_position_embeddings")) if rope.kind == "longrope" else context,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family not in ("mistral", "phi3") and bias),
        o_bias=family not in ("mistral", "qwen2", "phi3") and bias,
        mlp_bias=family in ("llama", "smollm3") and bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text", "olmo2"),
        windows=_windows(config, family, layers),
        rope=rope,
        bos=_token(config.get("bos_token_id")),
        eos=tuple(t for t in map(_token, ends) if t is not None),
        layer_ropes=layer_ropes,
        rotary=rotary,
        qk_norm_whole=family == "olmo2",
        norm_offset=1.0 if gemma else 0.0,
        pre_norms=family != "olmo2",
        post_norms=gemma or family == "olmo2",
        activation=ACTIVATIONS[act],
        embed_scale=hidden**0.5 if gemma else 1.0,
        query_scale=(head_dim / _positive(config, "query_pre_attn_scalar")) ** 0.5 if gemma else 1.0,
        attention_cap=_cap(config, "attn_logit_softcapping") if gemma else None,
        logit_cap=_cap(config, "final_logit_softcapping") if gemma else None,
        fused=family == "phi3",
    )


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST.get(name, 2**31):
        raise ModelError(f"config.json has {name}={value!r}: it must be a positive integer of a plausible size")
    return value


def _token(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _positive(config: dict[str, Any], name: str) -> float:
    value = config.get(name)
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json has {name}={value!r}: it must be a positive number")
    return float(value)


def _cap(config: dict[str, Any], name: str) -> float | None:
    return None if config.get(name) is None else _positive(config, name)


def _kinds(config: dict[str, Any], family: str, layers: int) -> list[str]:
    """Each layer's entry of layer_types: sliding_attention or full_attention."""
    kinds = config.get("layer_types")
    if kinds is None:
        begin, period = config.get("max_window_layers", 28), config.get("sliding_window_pattern", 6)
        if not isinstance(begin, int) or not isinstance(period, int) or period < 1:
            name = "sliding_window_pattern" if isinstance(begin, int) else "max_window_layers"
            raise ModelError(f"config.json has {name}={config[name]!r}: it must be a positive integer")
        slides = {
            "mistral": lambda i: True,
            "phi3": lambda i: True,
            "qwen2": lambda i: i >= begin,
            "qwen3": lambda i: i >= begin,
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % period != 0,
            "smollm3": lambda i: not rotates[i],
        }.get(family, lambda i: False)
        rotates = _rotates(config, layers) if family == "smollm3" else []
        return ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ModelError(f"config.json's layer_types must have {layers} entries, one per layer")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported(f"the engine does not support layers of type {kind!r}: it supports full_attention, sliding_attention")
    return kinds


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    optional = family in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window", False)
    if family in ("llama", "olmo2") or optional or config.get("sliding_window") is None:
        return (None,) * layers
    window = _size(config, "sliding_window")
    kinds = _kinds({**config, "layer_types": None} if family in ("mistral", "phi3") else config, family, layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rotates(config: dict[str, Any], layers: int) -> list[bool]:
    """Whether each layer of SmolLM3 rotates queries and keys by position."""
    listed, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if listed is None and isinstance(interval, int) and interval > 0:
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers:
        raise ModelError(f"config.json's no_rope_layers must have {layers} entries, one per layer")
    return [bool(entry) for entry in listed]


def _ropes(config: dict[str, Any], family: str, layers: int, width: int, context: int) -> tuple[RopeShape, tuple[RopeShape, ...]]:
    """The rotary embedding, and each layer's if they differ; `width`: rotated channels."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelError("config.json's rope_parameters must be an object")
    if family != "gemma3_text":
        rope = _rope(config, found, config.get("rope_theta", 10_000.0), width, context)
        rotates = _rotates(config, layers) if family == "smollm3" else [True] * layers
        return rope, () if all(rotates) else tuple(rope if own else RopeShape(kind="none") for own in rotates)
    nested = any(kind in found for kind in ("full_attention", "sliding_attention"))
    whole = (found.get("full_attention") or {}) if nested else found  # before transformers 5, rope_scaling was that of the full layers
    near = (found.get("sliding_attention") or {}) if nested else {}
    if not isinstance(whole, dict) or not isinstance(near, dict):
        raise ModelError("config.json's rope_parameters must have objects for full_attention and sliding_attention")
    rope = _rope(config, whole, config.get("rope_theta", 1_000_000.0), width, context)
    local = _rope(config, near, config.get("rope_local_base_freq", 10_000.0), width, context)
    return rope, tuple(local if kind == "sliding_attention" else rope for kind in _kinds(config, family, layers))


def _rotary(config: dict[str, Any], family: str, head_dim: int) -> int:
    """Rotated channels of a head."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = found.get("partial_rotary_factor") if isinstance(found, dict) else None
    share = config.get("partial_rotary_factor", 1.0) if share is None else share
    share = 1.0 if share is None else share
    if not isinstance(share, float | int) or isinstance(share, bool) or not 0 < share <= 1:
        raise ModelError(f"config.json has partial_rotary_factor={share!r}: it must be above 0 and at most 1")
    if share != 1 and family != "phi3":
        raise Unsupported(f"the engine does not support partial_rotary_factor={share} of model_type={family!r}: it must be 1")
    if int(head_dim * share) % 2 or not int(head_dim * share):
        raise Unsupported(f"the engine does not support partial_rotary_factor={share} of head_dim={head_dim}: it must rotate pairs")
    return int(head_dim * share)


def _rope(config: dict[str, Any], found: dict[str, Any], theta: Any, width: int, context: int) -> RopeShape:
    kind = found.get("rope_type", found.get("type", "default"))
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):  # as transformers reads older checkpoints
        kind = "longrope"
    if any(isinstance(value, dict) for value in found.values()):
        raise Unsupported("the engine needs the same rope_parameters for all layers, and config.json's differ")
    if kind not in SCALINGS:
        raise Unsupported(f"the engine does not support rope_type={kind!r}: it supports {', '.join(SCALINGS)}")
    theta = found.get("rope_theta", theta)
    numbers: dict[str, Any] = {k: v for k, v in found.items() if v is None or isinstance(v, float | int)}
    if kind == "longrope":
        numbers |= {name: _factors(found.get(name), name, width // 2) for name in NEEDED["longrope"]}
    for name in NEEDED.get(kind, ()):
        if not numbers.get(name):
            raise ModelError(f"config.json's rope_parameters of rope_type={kind!r} need {name}")
    for name, value in numbers.items():
        if not isinstance(value, bool | tuple) and value is not None and not 0 < value < math.inf:
            raise ModelError(f"config.json's rope_parameters have {name}={value}: it must be a positive number")
    if kind == "llama3" and not float(numbers["low_freq_factor"] or 0) < float(numbers["high_freq_factor"] or 0):
        raise ModelError("config.json's rope_parameters must have a low_freq_factor below their high_freq_factor")
    if not isinstance(theta, float | int) or isinstance(theta, bool) or not 1 < theta < math.inf:
        raise ModelError(f"config.json says rope_theta={theta!r}: it must be a number above 1")
    if kind in ("llama3", "yarn", "longrope"):
        own = config if config.get("original_max_position_embeddings") else found
        numbers["original_max_position_embeddings"] = _size(own, "original_max_position_embeddings", context)
    if kind in ("dynamic", "yarn", "longrope"):
        numbers["max_position_embeddings"] = context
    return RopeShape(theta=float(theta), kind=kind, numbers=tuple(sorted(numbers.items())))


def _factors(value: Any, name: str, count: int) -> tuple[float, ...]:
    """longrope's factor of each pair of rotated channels."""
    if not isinstance(value, list) or len(value) != count or not all(isinstance(v, float | int) and 0 < v < math.inf for v in value):
        raise ModelError(f"config.json's rope_parameters of rope_type='longrope' need {count} positive numbers as {name}")
    return tuple(float(v) for v in value)
