import dataclasses
from typing import Any

import pytest
from transformers import AutoConfig

from fedtune.errors import ModelError
from fedtune.inference.engine.shape import DEFAULTS, Unsupported, read_shape
from tests.inference.engine.tiny import SHAPES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 101,
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_tiny_shape_is_read(name: str) -> None:
    whole = SHAPES[name]()
    config = whole.get_text_config()
    shape = read_shape(whole.to_dict())
    assert (shape.hidden, shape.layers, shape.heads) == (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert shape.kv_heads == config.num_key_value_heads and shape.tied == config.tie_word_embeddings
    assert len(shape.windows) == shape.layers and shape.eos == (1,) and shape.bos == 0


def test_an_old_llama_config_gets_the_defaults() -> None:
    shape = read_shape(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500.0, "eos_token_id": [3, 5]})
    assert (shape.kv_heads, shape.head_dim, shape.context, shape.eps) == (6, 8, 2048, 1e-6)
    assert (shape.rope.kind, shape.rope.theta, shape.rope.get("factor")) == ("linear", 500.0, 2)
    assert shape.eos == (3, 5) and shape.bos is None and not shape.tied and not shape.qkv_bias


def test_the_windows_of_the_layers_are_read() -> None:
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 4}
    assert read_shape(qwen).windows == (None,) * 3  # Qwen2's config has a window that it does not use
    assert read_shape(qwen | {"use_sliding_window": True, "max_window_layers": 2}).windows == (None, None, 4)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read_shape(qwen | {"use_sliding_window": True, "layer_types": kinds}).windows == (4, None, 4)
    mistral = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
    assert read_shape(mistral).windows == (4096,) * 3 and read_shape(mistral | {"sliding_window": None}).windows == (None,) * 3
    assert read_shape(LLAMA | {"sliding_window": 4}).windows == (None,) * 3


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_the_defaults_are_those_of_transformers(kind: str) -> None:
    """A config.json of the hub often lists only what differs from its class's defaults."""
    sizes = {**LLAMA, "model_type": kind, "num_attention_heads": 8}
    if kind in ("mistral", "qwen2", "qwen3"):  # their checkpoints always state it, because no default fits all sizes
        sizes["num_key_value_heads"] = 2
    least, config = sizes, AutoConfig.for_model(**sizes)
    shape, want = read_shape(least), read_shape(config.to_dict())
    assert dataclasses.replace(shape, bos=want.bos, eos=want.eos) == dataclasses.replace(
        want, rope=dataclasses.replace(want.rope, numbers=shape.rope.numbers),
        layer_ropes=tuple(dataclasses.replace(r, numbers=()) for r in want.layer_ropes),
    )  # fmt: skip


def test_gemma_3_configs_of_the_hub_are_read() -> None:
    """google/gemma-3-4b-it nests a text config of few entries; google/gemma-3-1b-it has the rotary bases of transformers 4."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    shape = read_shape(
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    )
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab, shape.tied, shape.eos) == (8, 4, 256, 262_208, True, (1, 106))
    assert shape.windows == tuple(None if (i + 1) % 6 == 0 else 1024 for i in range(34))
    assert (shape.rope.theta, shape.rope.kind, shape.rope_of(0).theta, shape.rope_of(0).kind) == (1e6, "linear", 1e4, "default")
    assert shape.rope_of(5) is shape.rope and shape.query_scale == 1 and shape.attention_cap is None
    one = read_shape({**text, "rope_scaling": None, "rope_theta": 2e6, "rope_local_base_freq": 3e4, "sliding_window_pattern": 2})
    assert (one.rope_of(1).theta, one.rope_of(0).theta, one.windows[:2]) == (2e6, 3e4, (1024, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "qwen3", "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["mamba"] * 3}, "mamba"),
    ],
)
def test_unsupported_models_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        read_shape(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_key_value_heads": 4}, "4 key heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 3}}, "4 positive numbers as short_factor"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "attn_logit_softcapping=-1"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must have 3 entries"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, "objects for full_attention"),
        ({"model_type": "gemma3"}, "no text_config"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must have 3 entries"),
        ({"model_type": "phi3", "partial_rotary_factor": 2}, "partial_rotary_factor=2"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1.0}}, "beta_fast=-1.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}}, "factor=inf"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "x"}}, "original_max_position"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}}, "below"),
    ],
)
def test_an_impossible_size_gives_a_one_sentence_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_shape(LLAMA | {"num_key_value_heads": 2} | changes)


def test_longrope_s_context_is_that_of_its_short_factors() -> None:
    assert read_shape(SHAPES["phi4_mini"]().to_dict()).context == 64  # not max_position_embeddings=256
