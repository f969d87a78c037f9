"""Combine an adapter and its run's shifts of the frozen weights into one pair of factors per module: W0 + Σ shifts + adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models.methods import method
from fedtune.storage.parsing import parse_json, read_text

_PREFIX = "base_model.model."


def fold_shifts(folder: Path, adapter: AdapterState, shifts: Sequence[AdapterState]) -> None:
    """Rewrite a PEFT LoRA folder so that its adapter includes the shifts.

    Stacking is exact: A = [s·A; s_1·A_1; …], B = [B, B_1, …]. If the stack has more rows than min(in, out) of its module, its singular
    value decomposition replaces it, with at most that many rows. Scalings become 1.

    Args:
        folder: The folder that `save_peft` wrote for `adapter`.
        adapter: A LoRA adapter.
        shifts: The shifts of the server state.

    Raises:
        ModelError: A shift changes a module without a LoRA.
    """
    if odd := [m for s in shifts for m in s.spec.scaling if m not in adapter.spec.ranks]:
        raise ModelError(f"a shift changes '{odd[0]}', which the adapter in {folder} does not adapt: they belong to different runs")
    weights, config = load_file(folder / "adapter_model.safetensors"), parse_json(read_text(folder / "adapter_config.json"))
    ranks = {}
    for module in adapter.spec.ranks:
        states = [s for s in (adapter, *shifts) if module in s.spec.scaling]
        a, b = stack([(s.spec.scaling[module], s[f"{module}.lora_A"].double(), s[f"{module}.lora_B"].double()) for s in states])
        ranks[module] = len(a)
        weights[f"{_PREFIX}{module}.lora_A.weight"], weights[f"{_PREFIX}{module}.lora_B.weight"] = a.float(), b.float()
    # PEFT uses the keys as regular expressions that match the end of a module's name
    patterns = {module.replace(".", r"\."): rank for module, rank in ranks.items()}
    config.update({"rank_pattern": patterns, "alpha_pattern": dict(patterns), "use_rslora": False})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def combined_factors(states: Sequence[AdapterState], sizes: Mapping[str, tuple[int, ...]], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A (R, in) with the scalings s multiplied in, and B (out, R), of all states together, in float32.

    Args:
        states: The adapter and the shifts.
        sizes: Tensor of the backbone → its shape.
        what: The adapter's name in errors.

    Raises:
        ModelError: A state has tensors other than factors, or their shapes do not fit the backbone.
    """
    parts = dict[str, list[tuple[float, Tensor, Tensor]]]()
    for state in states:
        how = method(state.spec.method).factors
        mine = how(state) if how else {}
        if len(state.tensors) != 2 * len(mine):
            raise ModelError(f"{what} changes more than LoRA's factors: merge it with `fedtune export`")
        for module, (scaling, a, b) in mine.items():
            parts.setdefault(module, []).append((scaling, a.double(), b.double()))
    out = {}
    for module, some in parts.items():
        a, b = stack(some)
        if sizes.get(f"{module}.weight") != (len(b), a.shape[1]):
            raise ModelError(f"{what} changes '{module}' by {(len(b), a.shape[1])}, which does not fit: it belongs to another backbone")
        out[module] = (a.float(), b.float())
    return out


def stack(parts: list[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) with R ≤ min(in, out) and B·A = Σ s_i·B_i·A_i."""
    a, b = torch.cat([s * a for s, a, _ in parts]), torch.cat([b for _, _, b in parts], 1)
    if len(a) <= min(a.shape[1], len(b)):
        return a, b
    left, values, right = torch.linalg.svd(b @ a, full_matrices=False)
    return values.sqrt()[:, None] * right, left * values.sqrt()
