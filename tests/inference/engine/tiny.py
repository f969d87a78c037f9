"""Random decoders of every supported shape, a few thousand parameters each, saved as Hugging Face folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden / heads
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **numbers}}


def _make(of: Callable[..., PreTrainedConfig], **changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: of(**{**SIZES, **changes})


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _make(LlamaConfig),
    "llama_one_kv": _make(LlamaConfig, num_key_value_heads=1, tie_word_embeddings=True),
    "llama_mha": _make(LlamaConfig, num_key_value_heads=6, head_dim=8, rms_norm_eps=1e-5),
    "llama_biases": _make(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama3": _make(
        LlamaConfig, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    ),
    "llama_linear": _make(LlamaConfig, **_rope("linear", factor=2.5)),
    "llama_dynamic": _make(LlamaConfig, max_position_embeddings=16, **_rope("dynamic", factor=3.0)),
    "llama_yarn": _make(LlamaConfig, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama_yarn_mscale": _make(
        LlamaConfig,
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0, truncate=False),
    ),
    "smollm": _make(LlamaConfig, num_attention_heads=9, num_key_value_heads=3, hidden_size=54, head_dim=6, tie_word_embeddings=True),
    "tinyllama": _make(LlamaConfig, num_attention_heads=8, num_key_value_heads=1, head_dim=None),
    "qwen2": _make(Qwen2Config, head_dim=8, tie_word_embeddings=True),
    "qwen2_window": _make(Qwen2Config, head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2_layer_types": _make(
        Qwen2Config,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": _make(Qwen3Config, tie_word_embeddings=True),
    "qwen3_biases": _make(Qwen3Config, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "mistral": _make(MistralConfig, sliding_window=6),
    "mistral_whole": _make(MistralConfig, sliding_window=None),
    # soft caps low enough to change scores and logits; a query scale other than head_dim; windows shorter than the tests' texts
    "gemma2": _make(
        Gemma2Config,
        num_hidden_layers=4,
        query_pre_attn_scalar=20,
        sliding_window=6,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
    ),
    "gemma2_biases": _make(
        Gemma2Config,
        query_pre_attn_scalar=12,
        attention_bias=True,
        tie_word_embeddings=False,
        final_logit_softcapping=None,
        attn_logit_softcapping=1.0,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
        sliding_window=5,
    ),
    "gemma3": _make(
        Gemma3TextConfig,
        num_hidden_layers=4,
        query_pre_attn_scalar=20,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    ),
    "gemma3_composite": lambda: Gemma3Config(
        text_config={**SIZES, "query_pre_attn_scalar": 12, "sliding_window": 6, "final_logit_softcapping": 2.0},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "phi3": _make(Phi3Config, head_dim=8, sliding_window=7),
    "phi4_mini": _make(
        Phi3Config,
        head_dim=8,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.5, 3.0],
            "long_factor": [1.0, 5.0, 20.0],
        },
    ),
    "smollm3": _make(SmolLM3Config, num_hidden_layers=4, head_dim=8, no_rope_layer_interval=2, tie_word_embeddings=True),
    "smollm3_window": _make(
        SmolLM3Config,
        head_dim=8,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "olmo2": _make(Olmo2Config, head_dim=8),
    "olmo2_biases": _make(Olmo2Config, head_dim=8, attention_bias=True, tie_word_embeddings=True),
}


def tiny_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = VOCAB) -> Any:
    """A random model of a shape, saved in the folder and returned for comparison; biases and norms are random too."""
    torch.manual_seed(seed)
    config = SHAPES[name]()
    config.vocab_size = vocab
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if key.endswith("bias") else 0.15))
    model.save_pretrained(folder)
    return model
