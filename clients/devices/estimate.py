"""Memory and seconds of a turn, estimated from the shapes of the model and its adapter before anything is loaded.

    memory    stored weights + 16 bytes per trained entry (value, gradient, AdamW's two moments, float32)
              + activations of a micro-batch stored for the backward pass + the gradient of the largest activation
    seconds   (4·P operations per token, 6·P with activation checkpointing) / speed + bytes / bandwidth

A layer's activations are counted term by term as in Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models,
arXiv:2205.05198, eq. 1 (s·b·h·(34 + 5·a·s/h) bytes per layer in 16 bits), in the compute dtype. A frozen layer does not store its input,
because only the gradient of its weight needs it. A LoRA factor A stores its input. This is what PEFT's modules store. The lean step
(`fedtune.models.lean`) stores less, and layers that recompute store only their input: see `_lean_bytes`.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.config import Config, DeviceClass
from fedtune.contracts.task import task_of
from fedtune.models import lean
from fedtune.models.backbone import build_config, empty_model, head_names, pick_device
from fedtune.models.checkpoint import find_folder
from fedtune.models.lean.functions import SCORES
from fedtune.models.lean.loss import PIECE, ROWS
from fedtune.models.methods import attach
from fedtune.models.parts import is_linear

STATE = 16  # bytes per trained float32 entry: value, gradient, two moments
QUANTIZED = ("nf4", "int8")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of a model with its adapter.

    Args:
        linear: Name of each quantizable linear layer → (out, in).
        whole: Names of the linear layers that nf4 does not quantize.
        rest: Entries of all other weights: embeddings, norms, biases.
        heads: Entries of the task heads, which are float32 in every precision.
        tables: Bytes of the buffers, such as positions and rotary frequencies.
        layers: Number of layers, L.
        hidden: Hidden width, h.
        inner: Feed-forward width.
        attention_heads: Attention heads per layer.
        query: Total width of a layer's queries.
        keys: Total width of a layer's keys; the values have the same.
        logits: Width of the logits.
        gated: Whether the feed-forward block is gated (multiplies two branches).
        classifies: Whether only one position per row has logits.
        entries: Entries of the adapter at the config's rank, heads included.
        per_rank: Entries of the adapter per unit of rank.
        rank: The largest rank of the config; 0 for a method without ranks.
        inputs: Sum of the input widths of the modules with LoRA factors.
        modules: Number of modules with LoRA factors.
        bases: Entries of the frozen tensors that the method adds, in the compute dtype.
        widths: Numbers per token that the method itself stores, besides LoRA's.
        checkpointing: Whether the forward pass stores only each layer's input (activation checkpointing).
        lean: Precisions in which the lean step trains the model.
        compute: Precision → compute dtype.
    """

    linear: Mapping[str, tuple[int, int]] = field(repr=False)
    whole: frozenset[str] = frozenset()
    rest: int = 0
    heads: int = 0
    tables: int = 0
    layers: int
    hidden: int
    inner: int
    attention_heads: int
    query: int
    keys: int = 0
    logits: int
    gated: bool = True
    classifies: bool = False
    entries: int = 0
    per_rank: int = 0
    rank: int = 0
    inputs: int = 0
    modules: int = 0
    bases: int = 0
    widths: int = 0
    checkpointing: bool = False
    lean: frozenset[str] = frozenset()
    compute: Mapping[str, torch.dtype] = field(default_factory=dict)

    def adapter(self, rank: int | None) -> int:
        """Entries of the adapter at this rank."""
        return self.entries - self.per_rank * (self.rank - min(rank or self.rank, self.rank))

    def width_of(self, precision: str) -> int:
        """Bytes per number in the compute dtype."""
        return self.compute[precision].itemsize


def weights_bytes(shapes: Shapes, precision: str) -> int:
    """Bytes of the stored frozen weights.

    nf4: half a byte per entry, a one-byte scale per block of 64, a float32 scale per 256 blocks, two tables. int8: one byte per entry, a
    float32 scale per row. All other weights are in the compute dtype.
    """
    size, total = shapes.width_of(precision), 4 * shapes.heads + shapes.tables
    for name, (out, width) in shapes.linear.items():
        entries = out * width
        if precision == "int8":
            total += entries + 4 * out
        elif precision == "nf4" and name not in shapes.whole:
            blocks = -(-entries // 64)
            total += -(-entries // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256)
        else:
            total += size * entries
    return total + size * (shapes.rest + shapes.bases)


def dequantized_bytes(shapes: Shapes, precision: str) -> int:
    """Bytes of the largest quantized layer after dequantization, which its multiplication needs."""
    if precision not in QUANTIZED:
        return 0
    packed = [o * i for n, (o, i) in shapes.linear.items() if precision == "int8" or n not in shapes.whole]
    return shapes.width_of(precision) * max(packed, default=0)


def kept_bytes(shapes: Shapes, precision: str, rows: int, width: int, counted: int, kept_layers: int | None = None) -> int:
    """Bytes that a micro-batch needs at its peak: the activations stored for the backward pass, and temporary tensors.

    Args:
        shapes, precision: The model.
        rows: Rows of the micro-batch.
        width: Tokens of each row.
        counted: Target tokens of each row.
        kept_layers: Layers that keep intermediate tensors in a lean step; None: all.
    """
    if precision in shapes.lean:
        kept = 0 if shapes.checkpointing else shapes.layers if kept_layers is None else kept_layers
        return _lean_bytes(shapes, precision, rows, width, counted, kept)
    s, size = shapes, shapes.width_of(precision)
    tokens = rows * width
    eager = size == 2  # fedtune.models uses eager attention in bf16, which stores the probabilities in float32 and in bf16
    scores = s.attention_heads * width * 6 if eager else 0
    norms = 2 * 4 * s.hidden
    attention = size * (4 * s.query)  # queries, keys, values and output of all heads
    feed = size * s.inner * (3 if s.gated else 4)
    factors = size * min(s.inputs, s.layers * (2 * s.hidden + s.inner))  # A stores its input once for all modules with the same input
    small = size * (s.modules * min(s.rank, s.hidden) + s.widths)
    layer = norms + attention + feed + scores + (factors + small) / max(1, s.layers)
    logits = 4 * s.logits * (rows if s.classifies else rows * counted)
    body = tokens * (size * s.hidden * s.layers + layer if s.checkpointing else s.layers * layer)
    largest = max(logits, tokens * max(size * s.inner, 4 * s.hidden))
    return int(body + tokens * 4 * s.hidden + logits + largest)


def _lean_bytes(shapes: Shapes, precision: str, rows: int, width: int, counted: int, kept_layers: int) -> int:
    """`kept_bytes` of a lean step: the stored tensors, plus the larger of what the loss and what the backward pass of a layer needs.

    Every layer stores its input x. The `kept_layers` also store x2, the input of o, and the outputs of q, k, v, gate and up
    (`fedtune.models.lean.decoder` explains the names; an encoder stores the inputs of its two norms instead of x2 and gate).
    """
    s, size, tokens = shapes, shapes.width_of(precision), rows * width
    mlp = 2 * s.inner if s.gated else s.inner + s.hidden
    inside = tokens * size * (s.hidden + 2 * s.query + 2 * s.keys + mlp)
    stored = tokens * (size * s.hidden * (s.layers + 1) + 4 * s.hidden) + kept_layers * inside  # the last norm stores its input too
    table = 0 if s.classifies else s.logits * s.hidden  # the output layer: on a CPU, oneDNN copies a weight before a product
    loss = size * (2 * rows * counted * s.hidden + min(rows * counted * s.logits, max(PIECE, ROWS * s.logits)) + table)
    fused = s.query // s.keys * width**2 > SCORES
    scores = 0 if fused else min(rows * s.attention_heads * width**2, SCORES)
    feed = tokens * (3 * s.inner + 4 * s.hidden)
    attention = tokens * (3 * s.query + 4 * s.keys + 2 * s.hidden) + 4 * scores
    largest = max((out * into for out, into in s.linear.values()), default=0)
    layer = size * (max(feed, attention) + largest) + (0 if kept_layers else inside)
    return int(stored + max(loss, layer))


def memory_bytes(
    shapes: Shapes, precision: str, entries: int, rows: int, width: int, counted: int, kept_layers: int | None = None
) -> tuple[int, int]:
    """(weights, rest) in bytes, for a turn with `entries` trained entries. For the other arguments see `kept_bytes`."""
    rest = STATE * entries + dequantized_bytes(shapes, precision) + kept_bytes(shapes, precision, rows, width, counted, kept_layers)
    return weights_bytes(shapes, precision), rest


def flops(shapes: Shapes, tokens: float) -> float:
    """Operations of a forward and a backward pass over frozen weights: 4·P per token, 6·P with checkpointing."""
    parameters = sum(out * width for out, width in shapes.linear.values()) + shapes.bases
    return (6 if shapes.checkpointing else 4) * parameters * tokens


def speed(device: DeviceClass) -> float:
    """Operations per second, averaged over the duty cycle; 0 means unlimited."""
    gflops = device.accelerator_gflops if device.accelerator != "none" else device.cores * device.gflops_per_core
    return gflops * 1e9 * device.duty


def seconds(device: DeviceClass, operations: float, nbytes: float) -> float:
    """Seconds of computation and transfer."""
    fast = speed(device)
    network = nbytes * 8 / (device.mbit_per_second * 1e6) if device.mbit_per_second else 0.0
    return (operations / fast if fast else 0.0) + network


def shapes_of(config: Config, num_labels: int = 0) -> Shapes:
    """The shapes of the config's model and adapter, from config.json alone.

    Raises:
        ModelError: The errors of `load_backbone` and `LiveAdapter` that follow from config.json.
    """
    folder = find_folder(config.model, weights=False)
    whole_config = build_config(config.model, config.task, num_labels=num_labels, folder=folder)
    hf = whole_config.get_text_config()
    bare = empty_model(whole_config, config.task, trust_remote_code=config.model.trust_remote_code)
    output, classifies = bare.get_output_embeddings(), task_of(config.task).head
    heads = head_names(bare) if classifies else []
    linear, rest, head = dict[str, tuple[int, int]](), 0, 0
    for name, module in bare.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name.split(".")[0] not in head_names(bare):
            shape = cast(Any, module).weight.shape
            linear[name] = (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
    for name, parameter in bare.named_parameters():  # yields tied weights once
        if name.split(".")[0] in heads:
            head += parameter.numel()
        elif name.removesuffix(".weight") not in linear:
            rest += parameter.numel()
    whole = frozenset(_whole(bare))
    bare.requires_grad_(False)
    tables = sum(b.numel() * b.itemsize for b in bare.buffers())
    attached = attach(bare, config.peft, config.task)
    lean_in = frozenset[str]()  # PEFT's modules compute the gradients of single rows
    if config.client.lean == "auto" and config.privacy.kind != "record":
        device, found = pick_device(config.model.device), (bare, config.peft.method, attached.parameters)
        lean_in = frozenset(p for p in ("fp32", "bf16", *QUANTIZED) if not lean.why_not(*found, precision=p, device=device))
    sizes = {n: p.numel() for n, p in attached.parameters.items()}
    factors = {m: sum(sizes.get(f"{m}.lora_{x}", 0) for x in "AB") for m in attached.ranks}
    top = max(attached.ranks.values(), default=0)
    hidden, count = int(hf.hidden_size), int(hf.num_attention_heads)
    width = int(getattr(hf, "head_dim", None) or getattr(hf, "d_kv", None) or hidden // count)
    inner = next((int(v) for n in _INNER if (v := getattr(hf, n, None))), 4 * hidden)
    layers = int(hf.num_hidden_layers) + int(getattr(hf, "num_decoder_layers", None) or 0)
    return Shapes(
        linear=linear,
        whole=whole,
        rest=rest,
        heads=head,
        tables=tables,
        layers=layers,
        hidden=hidden,
        inner=inner,
        attention_heads=count,
        query=count * width,
        keys=int(getattr(hf, "num_key_value_heads", None) or count) * width,
        logits=num_labels if classifies else int(hf.vocab_size),
        gated=any(n.endswith(("gate_proj", "gate_up_proj")) for n in linear),
        classifies=classifies,
        entries=sum(sizes.values()),
        per_rank=sum(n // attached.ranks[m] for m, n in factors.items()),
        rank=top,
        inputs=sum(linear[m][1] for m in attached.keeps_inputs if m in linear),
        modules=len(attached.ranks),
        bases=attached.drawn,
        widths=attached.keeps_width,
        checkpointing=config.model.checkpointing,
        lean=lean_in,
        compute=_dtypes(config),
    )


_INNER = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff")


def _dtypes(config: Config) -> dict[str, torch.dtype]:
    """Precision → compute dtype; without bitsandbytes the quantized precisions are missing."""
    out = {"fp32": torch.float32, "bf16": torch.bfloat16}
    with contextlib.suppress(ImportError):
        from fedtune.models.quantize import compute_dtype  # slow to import (1 s), and few runs need it

        out |= dict.fromkeys(QUANTIZED, compute_dtype(config.model.compute, pick_device(config.model.device)))
    return out


def _whole(bare: Any) -> list[str]:
    """The layers that nf4 does not quantize; the same rule as `fedtune.models.quantize.left_whole`."""
    heads = head_names(bare)
    return [
        n
        for n, m in bare.named_modules()
        if isinstance(m, (nn.Linear, Conv1D))
        and n.split(".")[0] not in heads
        and (not is_linear(m) or (m.weight.shape[0] if isinstance(m, Conv1D) else m.in_features) % 64)
    ]
