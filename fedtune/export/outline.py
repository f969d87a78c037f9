"""Maps a backbone's parameters to their tensors in the checkpoint, for any architecture, and writes the merged model tensor by tensor.

transformers decides on names, ties and renamings. So the model is loaded from one meta-device tensor per checkpoint tensor; a parameter
comes from the tensor whose storage it shares. It is saved with a number in place of each tensor, which shows the name that each parameter
is saved under.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.config import ModelConfig, TaskConfig
from fedtune.contracts.task import task_of
from fedtune.export.merged_tensor import DTYPES, MergedTensor
from fedtune.inference.engine.package_writer import TensorFile
from fedtune.models.backbone import Backbone, draw, head_names, initializer_range, load_backbone, quiet
from fedtune.models.checkpoint import find_folder, stored_tensors
from fedtune.models.edits import edits_of
from fedtune.models.merge import linear, transposed_weights
from fedtune.storage.tensor_files import StoredTensor

if TYPE_CHECKING:
    from fedtune.contracts.adapter_state import AdapterState

__all__ = ["Outline", "merged_tensors", "read_outline", "write_merged"]

_SHARD = "50GB"  # transformers' default


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A pretrained backbone on the meta device.

    Args:
        backbone: The backbone; its model has no weights.
        kept: Parameter → its location in the checkpoint, or random values for a missing head; tied ones once, under their first name.
        odd: Why the weights cannot be read tensor by tensor; "" if they can.
    """

    backbone: Backbone
    kept: Mapping[str, StoredTensor | Tensor]
    odd: str


def read_outline(model: ModelConfig, task: TaskConfig, *, num_labels: int, seed: int) -> Outline:
    """Load a backbone's outline. Raises ModelError like `load_backbone`."""
    stored = {t.name: t for t in stored_tensors(find_folder(model))}
    stand_ins = {n: torch.empty(t.shape, dtype=torch.float32, device="meta") for n, t in stored.items()}
    backbone = load_backbone(model, task, num_labels=num_labels, seed=seed, outline=stand_ins)
    made_of = {_storage(t): (t, stored[n]) for n, t in stand_ins.items()}
    bare, kept, lost = backbone.model, dict[str, StoredTensor | Tensor](), list[str]()

    def find(parameter: Tensor) -> StoredTensor | None:
        stand_in, own = made_of.get(_storage(parameter), (None, None))
        # slices and transposes of a tensor share its storage too
        return own if stand_in is not None and (stand_in.shape, stand_in.stride()) == (parameter.shape, parameter.stride()) else None

    for name, other in getattr(bare, "all_tied_weights_keys", {}).items():
        one, two = find(bare.get_parameter(name)), find(bare.get_parameter(other))
        if one and two and one != two and _same(one, two):  # stored twice: transformers compares them, but not on the meta device
            module, _, own = name.rpartition(".")
            setattr(bare.get_submodule(module), own, bare.get_parameter(other))
    parameters = dict(bare.named_parameters())
    for name, parameter in parameters.items():
        if (own := find(parameter)) is None:
            lost.append(name)
        else:
            kept[name] = own
    heads = head_names(bare) if task_of(task).head else []
    fresh = {n.split(".")[0] for n in lost}.intersection(heads)  # a head is initialized as a whole
    for name, parameter in parameters.items():
        if name.split(".")[0] in fresh:
            kept[name] = draw(name, tuple(parameter.shape), initializer_range(bare.config), seed)
    odd = [n for n in parameters if n not in kept or not _plain(kept[n])]
    odd += [n for n in bare.state_dict() if n not in dict(bare.named_parameters(remove_duplicate=False))]
    why = f"the checkpoint stores '{odd[0]}' in another form than the model" if odd else ""
    return Outline(backbone=backbone, kept=kept, odd=why)


def merged_tensors(outline: Outline, states: "Collection[AdapterState]", heads: Mapping[str, Tensor]) -> dict[str, MergedTensor]:
    """Return parameter → merged values, in the model's order; the arguments are those of `edits_of`.

    Raises:
        ModelError: As `edits_of`.
    """
    model = outline.backbone.model
    modules, parameters, turned = dict(model.named_modules()), dict(model.named_parameters()), transposed_weights(model)
    sizes = {n: tuple(p.shape) for n, p in parameters.items()}
    edits = edits_of(states, heads, sizes, turned, lambda module: linear(modules, module))
    return {n: MergedTensor(outline.kept[n], edits.get(n, ()), n in turned) for n in parameters}


def write_merged(model: PreTrainedModel, tensors: Mapping[str, MergedTensor], dtype: torch.dtype, folder: Path) -> None:
    """Write the files of `save_pretrained`, one tensor at a time.

    Args:
        model: A model on the meta device; unusable afterward.
        tensors: Its merged parameters.
        dtype: The dtype to store them in.
        folder: An existing folder.
    """
    numbers = {p: nn.Parameter(_numbered(i, dtype), requires_grad=False) for i, (_, p) in enumerate(model.named_parameters())}
    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, own, numbers[parameter])
    with quiet():
        model.save_pretrained(folder)
    saved, order = load_file(folder / "model.safetensors"), list(tensors)
    (folder / "model.safetensors").unlink()
    kept = {name: tensors[order[_number(tensor)]] for name, tensor in saved.items()}
    split = split_torch_state_dict_into_shards(
        {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in kept.items()}, max_shard_size=_SHARD
    )
    for name, members in split.filename_to_tensors.items():
        file = TensorFile(folder / name, {n: (dtype, kept[n].shape) for n in members})
        for n in members:
            file.put(n, kept[n].read(dtype))
        file.close()
    if split.is_sharded:
        total = {"total_parameters": sum(math.prod(t.shape) for t in tensors.values()), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _numbered(i: int, dtype: torch.dtype) -> Tensor:
    """A number as three base-256 digits, which every dtype represents exactly."""
    return torch.tensor([i >> shift & 255 for shift in (16, 8, 0)], dtype=dtype)


def _number(tensor: Tensor) -> int:
    return sum(int(digit) << shift for digit, shift in zip(tensor.tolist(), (16, 8, 0), strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(kept: StoredTensor | Tensor) -> bool:
    return isinstance(kept, Tensor) or (kept.dtype in DTYPES and 0 not in kept.shape and len(kept.shape) > 0)


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or not (_plain(one) and _plain(other)):
        return False
    a, b, step = MergedTensor(one), MergedTensor(other), max((1 << 19) // one.shape[-1], 1)
    parts = ((i, min(i + step, one.shape[0])) for i in range(0, one.shape[0], step))
    return all(torch.equal(a.rows(*part, torch.float32), b.rows(*part, torch.float32)) for part in parts)
