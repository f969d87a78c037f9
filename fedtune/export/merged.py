"""Reads a merged decoder tensor by tensor: checkpoint and adapter stay on disk, and the model is never complete in memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtune.contracts.task import task_of
from fedtune.errors import ModelError
from fedtune.export.merged_tensor import DTYPES, MergedTensor
from fedtune.export.origin import Origin, check_base, read_origin
from fedtune.export.whole import in_memory_note, merge_adapter, put_heads, why_in_memory
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.shape import Shape, canonical, read_shape
from fedtune.inference.text_part import of_text_part
from fedtune.models.backbone import load_backbone
from fedtune.models.checkpoint import find_folder, fingerprint, read_config, stored_tensors
from fedtune.models.combined import combined_factors
from fedtune.models.edits import edits_of
from fedtune.models.methods import Edit, method

if TYPE_CHECKING:
    from fedtune.contracts.adapter_state import AdapterState

__all__ = ["Merged", "read_merged"]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A decoder with its adapter merged.

    Args:
        origin: The source of the export.
        folder: The backbone's folder: tokenizer, generation_config.json.
        config: The backbone's config.json.
        shape: Parsed from `config`.
        fingerprint: The backbone's fingerprint.
        tensors: The merged tensors, with the names and in the order of `tensor_shapes`.
        dtype: The dtype of the checkpoint's matrices.
        virtual_tokens: `prompt.embeds` [t, d], or `prefix.k` and `prefix.v` [L, t, Hkv, D], float32; empty if there are none.
        apart: With `separate`, module → A [r, K] and B [N, r], float32, the scaling in B.
        whole: Why the model was merged in memory; "" if it is read tensor by tensor.
    """

    origin: Origin
    folder: Path
    config: dict[str, Any]
    shape: Shape
    fingerprint: str
    tensors: Mapping[str, MergedTensor]
    dtype: torch.dtype
    virtual_tokens: Mapping[str, Tensor] = field(default_factory=dict)
    apart: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: str = ""


def read_merged(source: Path, *, separate: bool = False) -> Merged:
    """Open a run or adapter folder of a decoder that the engine supports, or the decoder itself.

    Args:
        source: As in `read_origin`.
        separate: Do not merge a LoRA adapter; return it in `separate_adapter`.

    Raises:
        CheckpointError: `source` is missing or is a run without an adapter.
        ModelError: The engine does not support the task, architecture or method, or the files do not match.
    """
    origin = read_origin(Path(source))
    adapter = origin.adapter
    state, shifts = of_text_part(adapter.state), [of_text_part(shift) for shift in adapter.shifts]
    if not (task := task_of(origin.task)).gives_text:
        raise ModelError(f"{source} is {task.noun}, which generates no text: export it with --to hf")
    folder = find_folder(origin.model)
    config = read_config(folder)
    shape = read_shape(config)
    whole = why_in_memory(origin)
    how = method(state.spec.method)
    if separate and (how.factors is None or whole):
        raise ModelError(f"{source}: only a plain LoRA adapter over the checkpoint's own weights can stay separate: leave out --separate")
    if how.edits is None and how.virtual_tokens is None:
        raise ModelError(f"{source}: the engine cannot run peft.method={state.spec.method}: {how.why_unmergeable}; use --to hf")
    virtual = _virtual(state, shape)
    if whole:
        mark, tensors, dtype = _in_memory(origin, shape)
    else:
        mark = fingerprint(folder)
        states = (*shifts, *([state] if how.edits else []))  # other methods contribute their virtual tokens
        edits = {} if separate else edits_of(states, adapter.heads, dict(tensor_shapes(shape)))
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
        virtual_tokens=virtual,
        apart=_apart(origin, (state, *shifts), shape) if separate else {},
        whole=in_memory_note(whole) if whole else "",
    )


def _stored(folder: Path, shape: Shape, edits: Mapping[str, list[Edit]]) -> tuple[dict[str, MergedTensor], torch.dtype]:
    known = {canonical(t.name): t for t in stored_tensors(folder)}
    prefix = "" if "model.embed_tokens.weight" in known else "model."  # saved without the wrapper of its head
    out, sizes = {}, dict[str, int]()
    for name, size in tensor_shapes(shape):
        stored = known.get(name if name == "lm_head.weight" else name.removeprefix(prefix))
        if stored is None or stored.shape != size:
            what = "is missing from" if stored is None else "has another shape in"
            raise ModelError(f"the weight '{name}' {what} {folder}: config.json does not match the weights")
        if stored.dtype not in DTYPES or stored.size != math.prod(size) * DTYPES[stored.dtype].itemsize:
            raise ModelError(
                f"the weight '{name}' in {folder} is {stored.dtype}, wanted 16-bit or 32-bit floats: the checkpoint is damaged"
            )
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + math.prod(size)
        out[name] = MergedTensor(stored, edits.get(name, ()))
    return out, DTYPES[max(sizes, key=lambda d: sizes[d])]


def _in_memory(origin: Origin, shape: Shape) -> tuple[str, dict[str, MergedTensor], torch.dtype]:
    backbone = load_backbone(origin.model, origin.task, **origin.settings)
    put_heads(backbone.model, origin.adapter, origin.task)
    merge_adapter(backbone.model, origin)
    own = {canonical(n): t for n, t in backbone.model.state_dict().items()}
    return backbone.fingerprint, {n: MergedTensor(own[n]) for n, _ in tensor_shapes(shape)}, torch.float32


def _virtual(state: "AdapterState", shape: Shape) -> dict[str, Tensor]:
    """The learned virtual tokens, if the method has any."""
    how, kind = method(state.spec.method), state.spec.method
    try:
        return how.virtual_tokens(state, shape) if how.virtual_tokens else {}
    except (KeyError, RuntimeError):
        raise ModelError(f"the adapter's virtual tokens (peft.method={kind}) do not fit the backbone: they belong to another one") from None


def _apart(origin: Origin, states: "Sequence[AdapterState]", shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    """Combine the adapter and the shifts of each module into one pair of factors."""
    if origin.adapter.heads:
        raise ModelError(f"{origin.source}: the adapter trains '{next(iter(origin.adapter.heads))}' too: leave out --separate")
    return combined_factors(states, dict(tensor_shapes(shape)), f"the adapter in {origin.source}")
