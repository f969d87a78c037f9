"""Classes found by the names of their files."""

import os
from pathlib import Path

import pytest

from fedtune.config.registry import Registry


def test_a_file_added_to_the_folder_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "added_later"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "_shared.py").touch()
    os.utime(folder, ns=(0, 0))  # so that the next change has another time, however coarse the disk's clock is
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("added_later", "builtins.object")
    assert registry.names() == registry.names() == ()
    (folder / "mine.py").write_text("class Mine: pass")
    assert registry.names() == ("mine",) and "mine" in registry
