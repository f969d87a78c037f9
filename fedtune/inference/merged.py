"""A merged decoder read tensor by tensor: checkpoint and adapter lie on the disk, and never a whole model in memory.

The arithmetic is that of `fedtune.models.methods.*.merge`, on some rows of a weight at a time: sums in float64, rounded once, straight to
the dtype that is asked for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.combined import stack
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.shape import Shape, read_shape
from fedtune.inference.export import Origin, check_base, put_adapter, put_heads, read_origin
from fedtune.models.backbone import load_backbone
from fedtune.models.checkpoint import StoredTensor, find_folder, fingerprint, read_config, stored_tensors

__all__ = ["Merged", "MergedTensor", "read_merged"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STRETCH = 1 << 19  # entries that are summed in float64 at once
_LORA = ("lora", "rslora", "dora")
Edit = Callable[[Tensor, int, int], Tensor]  # rows a..b of a tensor, float64 → the same rows, changed


class MergedTensor:
    """One tensor of the merged model.

    Args:
        kept: Where the checkpoint has it, or the tensor itself.
        edits: What the adapter and the shifts do to it, in order.
    """

    def __init__(self, kept: StoredTensor | Tensor, edits: tuple[Edit, ...] = ()) -> None:
        self._kept, self._edits = kept, edits
        self.shape = tuple(kept.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Its merged values, in memory of their own."""
        return self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `last` of them (of a vector, entries)."""
        out = torch.empty(last - first, *self.shape[1:], dtype=dtype)
        step = max(_STRETCH // math.prod(self.shape[1:]), 1)
        for a in range(first, last, step):
            b = min(a + step, last)
            part = self._kept[a:b] if isinstance(self._kept, Tensor) else _read(self._kept, a, b)
            if self._edits:
                part = part.double()
                for edit in self._edits:
                    part = edit(part, a, b)
            out[a - first : b - first] = part
        return out


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
    """Open a run or adapter folder of a Llama-family decoder.

    Args:
        source: As `export_hf` takes it.
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
    drawn = origin.model.init == "random"
    whole = ""
    if drawn or adapter.over:
        why = "was drawn at random (model.init=random)" if drawn else "is a quantised one, dequantised (peft.init=loftq)"
        whole = f"the backbone {why}, so the model was merged as a whole in memory"
    if separate and (state.spec.method not in ("lora", "rslora") or whole):
        raise ModelError(f"{source}: only a plain LoRA adapter over the checkpoint's own weights can stay separate: leave out --separate")
    virtual = _virtual(state.tensors, state.spec.method, shape)
    if not virtual and state.spec.method not in (*_LORA, "ia3", "bitfit", "full"):
        raise ModelError(f"{source}: the engine cannot run peft.method={state.spec.method}, which is no change of weights: use --to hf")
    if whole:
        mark, tensors, dtype = _in_memory(origin, shape)
    else:
        mark = fingerprint(folder)
        tensors, dtype = _stored(folder, shape, {} if separate else _edits(origin, shape, config))
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
        whole=whole,
    )


def _read(stored: StoredTensor, first: int, last: int) -> Tensor:
    """Rows of a tensor, read and not mapped: pages of a mapped file would count as memory too."""
    out = torch.empty(last - first, *stored.shape[1:], dtype=_DTYPES[stored.dtype])
    row = stored.size // stored.shape[0]
    with open(stored.file, "rb", buffering=0) as f:
        f.seek(stored.start + first * row)
        view = memoryview(cast(Any, out.flatten().view(torch.uint8).numpy()))
        while view and (got := f.readinto(view)):
            view = view[got:]
    if view:
        raise ModelError(f"{stored.file} ends within '{stored.name}': it is truncated, fetch it again")
    return out


def _stored(folder: Path, shape: Shape, edits: Mapping[str, list[Edit]]) -> tuple[dict[str, MergedTensor], torch.dtype]:
    known = {t.name: t for t in stored_tensors(folder)}
    prefix = "" if "model.embed_tokens.weight" in known else "model."  # saved without its head's wrapper
    out, sizes = {}, dict[str, int]()
    for name, size in tensor_shapes(shape):
        stored = known.get(name if name == "lm_head.weight" else name.removeprefix(prefix))
        if stored is None or stored.shape != size:
            what = "is missing from" if stored is None else "has another shape in"
            raise ModelError(f"the weight '{name}' {what} {folder}: config.json and the weights do not belong together")
        if stored.dtype not in _DTYPES or stored.size != math.prod(size) * _DTYPES[stored.dtype].itemsize:
            raise ModelError(
                f"the weight '{name}' in {folder} is {stored.dtype}, wanted numbers of 16 or 32 bits: the checkpoint is damaged"
            )
        sizes[stored.dtype] = sizes.get(stored.dtype, 0) + math.prod(size)
        out[name] = MergedTensor(stored, tuple(edits.get(name, ())))
    if odd := [n for n in edits if n not in out]:
        raise ModelError(f"the adapter changes '{odd[0]}', which the backbone in {folder} has not: it belongs to another one")
    return out, _DTYPES[max(sizes, key=lambda d: sizes[d])]


def _in_memory(origin: Origin, shape: Shape) -> tuple[str, dict[str, MergedTensor], torch.dtype]:
    backbone = load_backbone(origin.model, origin.task, **origin.settings)
    put_heads(backbone.model, origin.adapter, origin.task)
    put_adapter(backbone.model, origin)
    own = backbone.model.state_dict()
    return backbone.fingerprint, {n: MergedTensor(own[n]) for n, _ in tensor_shapes(shape)}, torch.float32


def _edits(origin: Origin, shape: Shape, config: dict[str, Any]) -> dict[str, list[Edit]]:
    """Tensor → what is done to it, in the order in which `put_heads` and `merge` do it.

    Raises:
        ModelError: The adapter's tensors do not fit.
    """
    sizes, out = dict(tensor_shapes(shape)), dict[str, list[Edit]]()

    def add(name: str, found: tuple[int, ...] | None, edit: Edit) -> None:
        if name not in sizes:
            raise ModelError(f"the adapter changes '{name}', which the backbone has not: it belongs to another one")
        if found not in (None, sizes[name]):
            raise ModelError(f"the adapter's '{name}' is {found}, the backbone's {sizes[name]}: it belongs to another backbone")
        out.setdefault(name, []).append(edit)

    for name, tensor in origin.adapter.heads.items():
        add(name, tuple(tensor.shape), _replaced(tensor))
    state = origin.adapter.state
    for some in (*origin.adapter.shifts, *([state] if state.spec.method in _LORA else [])):
        for module in [n.removesuffix(".lora_A") for n in some.tensors if n.endswith(".lora_A")]:
            a, b = some[f"{module}.lora_A"], some[f"{module}.lora_B"]
            magnitude = some.tensors.get(f"{module}.lora_magnitude")
            add(f"{module}.weight", (len(b), a.shape[1]), _low_rank(a, b, some.spec.scaling[module], magnitude))
        odd = [n for n in some.tensors if not n.endswith((".lora_A", ".lora_B", ".lora_magnitude"))]
        if odd:
            raise ModelError(f"the adapter's '{odd[0]}' is neither a LoRA factor nor in the backbone: it belongs to another one")
    if state.spec.method == "ia3":
        for name, factor in state.tensors.items():
            weight, bias = f"{name.removesuffix('.ia3')}.weight", f"{name.removesuffix('.ia3')}.bias"
            rows, columns = (sizes.get(weight) or (0, 0))[:2]
            if tuple(factor.shape) not in ((rows, 1), (1, columns)):
                raise ModelError(
                    f"the adapter's '{name}' is {tuple(factor.shape)}, the backbone's layer {(rows, columns)}: it belongs to another"
                )
            add(weight, None, _scaled(factor))
            if factor.shape[1] == 1 and bias in sizes:
                add(bias, None, _scaled(factor[:, 0]))
    if state.spec.method in ("bitfit", "full"):
        for name, delta in state.tensors.items():
            add(name, tuple(delta.shape), _added(delta))
    return out


def _replaced(tensor: Tensor) -> Edit:
    return lambda rows, first, last: tensor[first:last].double()


def _added(delta: Tensor) -> Edit:
    return lambda rows, first, last: rows + delta[first:last].double()


def _scaled(factor: Tensor) -> Edit:
    """A factor a row, (out, 1) or (out,), or a factor a column, (1, in)."""
    by_row = factor.dim() == 1 or factor.shape[1] == 1
    return lambda rows, first, last: rows * (factor[first:last] if by_row else factor).double()


def _low_rank(a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None) -> Edit:
    """W + s·B·A; with a magnitude (DoRA), its rows rescaled to ‖W‖ + magnitude."""

    def edit(rows: Tensor, first: int, last: int) -> Tensor:
        changed = rows + scaling * (b[first:last].double() @ a.double())
        if magnitude is None:
            return changed
        return changed * ((rows.norm(dim=1) + magnitude[first:last].double()) / changed.norm(dim=1))[:, None]

    return edit


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
