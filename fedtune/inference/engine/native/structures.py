"""The structures of kernels.h, which describes their fields. They point to memory that others own."""

import ctypes

__all__ = [
    "DecoderStructure",
    "DraftStructure",
    "LayerStructure",
    "LoraPiece",
    "LoraStructure",
    "PassStructure",
    "SpanStructure",
    "Weights",
]

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Weights(ctypes.Structure):
    """`struct fedtune_weights`."""

    _fields_ = [
        ("kind", _INT), ("n_in", _INT), ("n_out", _INT),
        ("codes", _POINTER), ("codes_bytes", _INT),
        ("scales", _POINTER), ("scales_bytes", _INT),
        ("base", _POINTER), ("base_bytes", _INT),
        ("bias", _POINTER), ("bias_bytes", _INT),
    ]  # fmt: skip


class LayerStructure(ctypes.Structure):
    """`struct fedtune_layer`."""

    _fields_ = [
        ("qkv", Weights), ("o", Weights), ("gate_up", Weights), ("down", Weights),
        ("norm", _POINTER), ("q_norm", _POINTER), ("k_norm", _POINTER),
        ("o_norm", _POINTER), ("mlp_norm", _POINTER), ("down_norm", _POINTER),
        ("window", _INT), ("turns", _INT),
    ]  # fmt: skip


class DecoderStructure(ctypes.Structure):
    """`struct fedtune_decoder`."""

    _fields_ = [
        ("hidden", _INT), ("heads", _INT), ("kv_heads", _INT), ("head_dim", _INT), ("intermediate", _INT), ("layers", _INT),
        ("whole_norms", _INT), ("gelu", _INT),
        ("eps", _FLOAT), ("query_scale", _FLOAT), ("attention_cap", _FLOAT), ("logit_cap", _FLOAT),
        ("layer", ctypes.POINTER(LayerStructure)),
        ("norm", _POINTER),
        ("head", Weights),
    ]  # fmt: skip


class LoraPiece(ctypes.Structure):
    """`struct fedtune_lora_piece`."""

    _fields_ = [
        ("linear", _INT), ("rank", _INT), ("n_in", _INT), ("first", _INT), ("n", _INT),
        ("a", _POINTER), ("b", _POINTER),
    ]  # fmt: skip


class LoraStructure(ctypes.Structure):
    """`struct fedtune_lora`."""

    _fields_ = [
        ("layers", _INT), ("count", _INT),
        ("starts", ctypes.POINTER(_INT)), ("pieces", ctypes.POINTER(LoraPiece)),
    ]  # fmt: skip


class SpanStructure(ctypes.Structure):
    """`struct fedtune_span`."""

    _fields_ = [
        ("rows", _INT), ("length", _INT),
        ("keys", _POINTER), ("values", _POINTER),
        ("entries", _INT), ("token_stride", _INT), ("head_stride", _INT), ("halves", _INT),
        ("blocks", _POINTER), ("block_count", _INT), ("block", _INT),
        ("first", _INT), ("window", _INT), ("sinks", _INT), ("ring", _INT),
        ("codes", _POINTER), ("bits", _INT), ("group", _INT), ("values_together", _INT), ("residual", _INT), ("groups", _INT),
        ("lora", ctypes.POINTER(LoraStructure)),
        ("fork_count", _INT), ("forks", ctypes.POINTER(_INT)),
    ]  # fmt: skip


class PassStructure(ctypes.Structure):
    """`struct fedtune_pass`."""

    _fields_ = [
        ("rows", _INT), ("first", _INT), ("last", _INT),
        ("hidden", _POINTER),
        ("span_count", _INT), ("spans", ctypes.POINTER(SpanStructure)),
        ("turns_count", _INT), ("turns", ctypes.POINTER(_POINTER)),
        ("place_count", _INT), ("places", ctypes.POINTER(_POINTER)),
        ("kept_count", _INT), ("kept", ctypes.POINTER(_INT)),
        ("logits", _POINTER),
    ]  # fmt: skip


class DraftStructure(ctypes.Structure):
    """`struct fedtune_draft`."""

    _fields_ = [
        ("embedding", _POINTER), ("kind", _INT), ("vocabulary", _INT), ("most", _INT),
        ("embed_scale", _FLOAT), ("least", _FLOAT), ("trust", _FLOAT), ("sharpness", _FLOAT), ("penalty", _FLOAT),
        ("seen", _POINTER), ("tokens", _POINTER), ("chances", _POINTER), ("made", _INT),
    ]  # fmt: skip
