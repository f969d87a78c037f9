"""A client's tensors are stored by round, so that a run resumed from an older checkpoint finds those of that round."""

from pathlib import Path

import pytest
import torch

from fedtune.clients.store import ClientStore
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import CheckpointError


def stored_state(value: float) -> AdapterState:
    return AdapterState({"q.lora_B": torch.full((3, 2), value)}, AdapterSpec(method="lora"))


def test_the_newest_file_before_a_round_is_read_and_old_files_are_deleted(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients", rounds=2)
    assert store.read("a", 9) is None and not (tmp_path / "clients").exists()
    for round in (1, 4, 6):
        store.write("a", round, stored_state(round))
    # round 5 runs again after a kill in round 6: it starts from the file of round 4
    assert [float(store.read("a", before)["q.lora_B"][0, 0]) for before in (5, 6, 7)] == [4, 4, 6]  # type: ignore[index]
    assert store.read("a", 4) is None  # the file of round 1 is deleted: two stay
    store.write("a", 6, stored_state(60))
    assert float(store.read("a", 7)["q.lora_B"][0, 0]) == 60  # type: ignore[index]


def test_every_client_name_has_its_own_folder(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients", rounds=2)
    names = ["я" * 150, "я" * 149 + "ю", "a/b", "a_b", "..", "TITUS ANDRONICUS", "ä", "a%2fb", "a%00002fb", "\x12e", "\u012e"]
    for i, name in enumerate(names):
        store.write(name, 1, stored_state(i))
    assert [float(store.read(name, 2)["q.lora_B"][0, 0]) for name in names] == list(range(len(names)))  # type: ignore[index]
    assert store.clients() == sorted(names)
    assert len(list((tmp_path / "clients").iterdir())) == len(names) and [f.name for f in tmp_path.iterdir()] == ["clients"]


def test_a_damaged_file_and_a_full_disk_are_errors(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "clients", rounds=2)
    store.write("a", 1, stored_state(1))
    (tmp_path / "clients" / "a" / "round-0001.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot read the adapter"):
        store.read("a", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="client a cannot write its tensors"):
        ClientStore(tmp_path / "file", rounds=2).write("a", 1, stored_state(1))
