"""Recomputes the digests of an intentionally changed package."""

import json
from pathlib import Path

from fedtune.inference.engine.package import digest, sealed


def seal_again(folder: Path) -> None:
    card = json.loads((folder / "package.json").read_text("utf-8"))
    card["sha256"] = {path.name: digest(path) for path in folder.iterdir() if path.is_file() and sealed(path.name)}
    (folder / "package.json").write_text(json.dumps(card), encoding="utf-8")
