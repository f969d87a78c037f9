"""A merged decoder read tensor by tensor: checkpoint and adapter lie on the disk, and never a whole model in memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.combined import stack
from fedtune.inference.edits import LORA, edits_of
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.shape import Shape, read_shape
from fedtune.inference.export import Origin, check_base, read_origin
from fedtune.inference.merged_tensor import DTYPES, Edit, MergedTensor
from fedtune.inference.whole import in_memory, put_adapter, put_heads, why_whole
from fedtune.models.backbone import load_backbone
from fedtune.models.checkpoint import find_folder, fingerprint, read_config, stored_tensors

__all__ = ["Merged", "read_merged"]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A decoder with its adapter in it.

    Args:
        origin: Where it comes from.
        folder: The backbone's files: tokenizer, generation_config.json.
        config: Its config.json.
        shape: What that says.
        fingerprint: Of the backbone.
        tensors: As `tensor_shapes` names them, in that order.
        dtype: What the checkpoint keeps its matrices in.
        virtual: `prompt.embeds` [t, d], or `prefix.k` and `prefix.v` [L, t, Hkv, D], float32; empty where there are none.
        apart: With `separate`, module → A [r, K] and B [N, r], float32, the scaling in B.
        whole: Why the model was merged as a whole in memory; "" where it is read tensor by tensor.
    """

    origin: Origin
    folder: Path
    config: dict[str, Any]
    shape: Shape
    fingerprint: str
    tensors: Mapping[str, MergedTensor]
    dtype: torch.dtype
    virtual: Mapping[str, Tensor] = field(default_factory=dict)
    apart: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: str = ""


def read_merged(source: Path, *, separate: bool = False) -> Merged:
    """Open a run or adapter folder of a Llama-family decoder, or the decoder itself.

    Args:
        source: As `read_origin` takes it.
        separate: Leave a LoRA adapter out of the weights, in `apart`.

    Raises:
        CheckpointError: `source` is missing, or is a run that has no adapter yet.
        ModelError: It is a classifier, an architecture or a method that the engine does not run, or the files do not belong together.
    """
    origin = read_origin(Path(source))
    state, adapter = origin.adapter.state, origin.adapter
    if origin.task.kind == "classification":
        raise ModelError(f"{source} is a classifier, which generates no text: export it with --to hf")
    folder = find_folder(origin.model)
    config = read_config(folder)
    shape = read_shape(config)
    whole = why_whole(origin)
    if separate and (state.spec.method not in ("lora", "rslora") or whole):
        raise ModelError(f"{source}: only a plain LoRA adapter over the checkpoint's own weights can stay separate: leave out --separate")
    virtual = _virtual(state.tensors, state.spec.method, shape)
    if not virtual and state.spec.method not in (*LORA, "ia3", "bitfit", "full"):
        raise ModelError(f"{source}: the engine cannot run peft.method={state.spec.method}, which is no change of weights: use --to hf")
    if whole:
        mark, tensors, dtype = _in_memory(origin, shape)
    else:
        mark = fingerprint(folder)
        edits = {} if separate else edits_of(state, adapter.shifts, adapter.heads, dict(tensor_shapes(shape)))
        tensors, dtype = _stored(folder, shape, edits)
    check_base(origin, mark, str(folder))
    return Merged(
        origin=origin,
        folder=folder,
        config=config,
        shape=shape,
        fingerprint=mark,
        tensors=tensors,
        dtype=dtype,
        virtual=virtual,
        apart=_apart(origin, shape) if separate else {},
        whole=in_memory(whole) if whole else "",
    )


def _stored(folder: Path, shape: Shape, edits: Mapping[str, list[Edit]]) -> tuple[dict[str, MergedTensor], torch.dtype]:
    known = {t.name: t for t in stored_tensors(folder)}
    prefix = "" if "model.embed_tokens.weight" in known else "model."  # saved without its head's wrapper
    out, sizes = {}, dict[str, int]()
    for name, size in tensor_shapes(shape):
        stored = known.get(name if name == "lm_head.weight" else name.removeprefix(prefix))
        if stored is None or stored.shape != size:
            what = "is missing from" if stored is None else "has another shape in"
            raise ModelError(f"the weight '{name}' {what} {folder}: config.json and the weights do not belong together")
        if stored.dtype not in DTYPES or stored.size != math.prod(size) * DTYPES[stored.dtype].itemsize:
            raise ModelError(
                f"the weight '{name}' in {folder} is {stored.dtype}, wanted numbers of 16 or 32 bits: the checkpoint is damaged"
            )
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + math.prod(size)
        out[name] = MergedTensor(stored, edits.get(name, ()))
    return out, DTYPES[max(sizes, key=lambda d: sizes[d])]


def _in_memory(origin: Origin, shape: Shape) -> tuple[str, dict[str, MergedTensor], torch.dtype]:
    backbone = load_backbone(origin.model, origin.task, **origin.settings)
    put_heads(backbone.model, origin.adapter, origin.task)
    put_adapter(backbone.model, origin)
    own = backbone.model.state_dict()
    return backbone.fingerprint, {n: MergedTensor(own[n]) for n, _ in tensor_shapes(shape)}, torch.float32


def _virtual(tensors: Mapping[str, Tensor], kind: str, shape: Shape) -> dict[str, Tensor]:
    """What a method of virtual tokens has learnt, as a package holds it; PEFT's prefix is (t, layers · key and value · Hkv · D)."""
    layers, heads, width = shape.layers, shape.kv_heads, shape.head_dim
    try:
        if kind == "prompt":
            return {"prompt.embeds": tensors["prompt"].float().view(-1, shape.hidden)}
        if kind == "prefix":
            both = tensors["prefix"].float().view(-1, layers, 2, heads, width).permute(2, 1, 0, 3, 4)
        elif kind == "ptuning_v2":
            both = torch.stack([tensors[f"layers.{i}.prompt"].float().unflatten(2, (heads, width)) for i in range(layers)], 1)
        else:
            return {}
    except (KeyError, RuntimeError):
        raise ModelError(f"the adapter's virtual tokens (peft.method={kind}) do not fit the backbone: they belong to another one") from None
    return {"prefix.k": both[0].contiguous(), "prefix.v": both[1].contiguous()}


def _apart(origin: Origin, shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter and the shifts of each module as one pair of factors."""
    states, sizes, out = (origin.adapter.state, *origin.adapter.shifts), dict(tensor_shapes(shape)), {}
    if origin.adapter.heads:
        raise ModelError(f"{origin.source}: the adapter trains '{next(iter(origin.adapter.heads))}' too: leave out --separate")
    for module in dict.fromkeys(m for s in states for m in s.spec.scaling):
        mine = [s for s in states if module in s.spec.scaling]
        a, b = stack([(s.spec.scaling[module], s[f"{module}.lora_A"].double(), s[f"{module}.lora_B"].double()) for s in mine])
        if sizes.get(f"{module}.weight") != (len(b), a.shape[1]):
            raise ModelError(
                f"the adapter changes '{module}' by {(len(b), a.shape[1])}, which does not fit: it belongs to another backbone"
            )
        out[module] = (a.float(), b.float())
    return out
