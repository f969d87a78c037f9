"""AdapterState over the wire and the disk."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState, random_mask
from fedtune.errors import CheckpointError, UpdateMismatch
from tests.fakes import lora_state


def unusual_state() -> AdapterState:
    gen = torch.Generator().manual_seed(0)
    tensors = {
        "z.lora_A": torch.randn(3, 5, generator=gen),
        "a.lora_B": torch.randn(7, 3, generator=gen).bfloat16(),
        "bias": torch.randn((), generator=gen).half(),
        "empty": torch.zeros(0, 4),
        "view": torch.randn(4, 6, generator=gen).t(),
        "m.index": torch.tensor([0, 7, 2**31 - 1], dtype=torch.int32),
    }
    return AdapterState(tensors, AdapterSpec(method="lora", base="x", version=3, ranks={"z": 3}, scaling={"z": 0.1}, mask="7"))


def same(a: AdapterState, b: AdapterState) -> bool:
    equal = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True))
    return list(a.tensors) == list(b.tensors) and a.spec == b.spec and equal


def test_wire_round_trip_keeps_order_dtype_and_bits() -> None:
    state = unusual_state()
    assert same(state, AdapterState.from_arrays(state.to_arrays(), AdapterSpec.from_json(state.spec.to_json()), state))


def test_disk_round_trip_keeps_order_dtype_and_bits(tmp_path: Path) -> None:
    unusual_state().save(tmp_path / "a.safetensors")
    assert same(unusual_state(), AdapterState.load(tmp_path / "a.safetensors"))


def test_tensors_cannot_be_replaced_in_place() -> None:
    with pytest.raises(TypeError):
        lora_state().tensors["q.lora_A"] = torch.zeros(1)  # type: ignore[index]


def test_a_subset_has_the_bytes_of_its_tensors() -> None:
    # 2*5 + 3*2 float32 values
    assert lora_state().subset(["q.lora_A", "q.lora_B"]).nbytes == (10 + 6) * 4


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        AdapterState.load(path)
    unusual_state().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        AdapterState.load(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a fedtune adapter"):
        AdapterState.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"method": 1}',
        '{"method": "lora", "x": 1}',
        '{"method": "lora", "ranks": {"q": 0}}',
        '{"method": "lora", "scaling": {"q": NaN}}',
        '{"method": "sparse", "mask": 7}',
    ],
)
def test_an_invalid_spec_is_refused(text: str) -> None:
    with pytest.raises(UpdateMismatch, match="the (rank of 'q' in the )?adapter's spec"):
        AdapterSpec.from_json(text)


def test_a_spec_survives_json() -> None:
    spec = unusual_state().spec
    assert AdapterSpec.from_json(spec.to_json()) == spec and json.loads(spec.to_json())["version"] == 3


def test_a_random_mask_is_sorted_distinct_and_different_for_each_module() -> None:
    mask = random_mask("7", "q", 35, 12)
    assert mask.dtype == torch.int64 and len(mask.unique()) == 12 and mask.min() >= 0 and mask.max() < 35
    assert torch.equal(mask, mask.sort().values) and torch.equal(mask, random_mask("7", "q", 35, 12))
    assert not torch.equal(mask, random_mask("7", "k", 35, 12)) and not torch.equal(mask, random_mask("8", "q", 35, 12))
    assert torch.equal(random_mask("7", "q", 35, 35), torch.arange(35))
