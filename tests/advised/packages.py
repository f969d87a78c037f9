"""The advice about a package that is damaged or put together wrongly."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.advised.engine import export_as_advised, load_error
from tests.advised.models import run_of
from tests.advised.operators import package
from tests.advised.rows import Place, follows
from tests.export.test_huggingface import CAUSAL, make_run
from tests.inference.sealing import seal_again
from tests.inference.test_package import change, edit
from tests.models.build import checkpoint, hub

UP, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"


def copy_package(place: Place) -> Path:
    return Path(shutil.copytree(package(place, "plain"), place.folder / "copied"))


def damaged_package(says: str, damage: Callable[[Path], Any], *, seal: bool = True) -> None:
    """A package that `damage` changes, with digests that fit if `seal`, and is exported again."""

    def follow(place: Place) -> Iterator[str]:
        folder = copy_package(place)
        damage(folder)
        if seal:
            seal_again(folder)
        yield load_error(folder)
        yield load_error(export_as_advised(place, run_of(place), "--to", "edge"))

    follows(says)(follow)


def _entry(folder: Path, **values: Any) -> None:
    listed = json.loads((folder / "package.json").read_text())["linears"]
    listed[UP] |= values
    edit(folder / "package.json", linears=listed)


def _mix_kinds(folder: Path) -> None:
    """`up_proj` in another kind than `gate_proj`, which is fused with it."""
    name = f"{UP}.weight"
    weight = load_file(folder / "weights-f32.safetensors")[name]
    change(folder, "f32", **{name: None})
    save_file({name: weight.bfloat16()}, folder / "weights-bf16.safetensors")
    _entry(folder, kind="bf16")


damaged_package("has the format {}, but this fedtune reads {}: export it again", lambda p: edit(p / "package.json", format=1))
damaged_package("requires {} layers, more than the package has tensors", lambda p: edit(p / "config.json", num_hidden_layers=900))
damaged_package("does not list the linears that config.json requires", lambda p: edit(p / "config.json", num_hidden_layers=1))
damaged_package("lacks the tensor '{}' ({} such) that its config requires: export it again", lambda p: change(p, "f32", **{NORM: None}))
damaged_package("holds '{}', which its config does not have: export the model again", lambda p: change(p, "f32", extra=torch.ones(1)))
damaged_package("{} is invalid: {}; export the model again", lambda p: edit(p / "fedtune.json", prompt=3))
damaged_package("lists '{}' as {}, which does not fit {}: export the model again", lambda p: _entry(p, kind="int3"))
damaged_package("{}: '{}' is {}: export the model again", lambda p: change(p, "f32", **{NORM: torch.ones(3)}))
damaged_package("and the linears fused with it are of different kinds: export the model again", _mix_kinds)
damaged_package("holds '{}' twice: export the model again",
       lambda p: save_file({NORM: torch.ones(16).bfloat16()}, p / "weights-bf16.safetensors"))  # fmt: skip
damaged_package("does not list the files in {}: one is missing or was added; export it again",
       lambda p: save_file({"more": torch.ones(1).bfloat16()}, p / "weights-bf16.safetensors"), seal=False)  # fmt: skip


@follows("{} has another digest than after the export: it is damaged; copy the package again or export it again")
def _(place: Place) -> Iterator[str]:
    damaged = copy_package(place)
    (damaged / "config.json").write_text((damaged / "config.json").read_text() + " ")
    yield load_error(damaged)
    shutil.rmtree(damaged)
    yield load_error(copy_package(place))
    yield load_error(export_as_advised(place, run_of(place), "--to", "edge"))


@follows("{} is not a file of a package: remove it, or export the model again")
def _(place: Place) -> Iterator[str]:
    folder = copy_package(place)
    added = folder / "weights-f16.safetensors"
    shutil.copyfile(folder / "weights-f32.safetensors", added)
    yield load_error(folder)
    added.unlink()
    yield load_error(folder)
    yield load_error(export_as_advised(place, run_of(place), "--to", "edge"))


@follows("{} is missing: give a folder that `fedtune export --to edge` wrote")
def _(place: Place) -> Iterator[str]:
    folder = copy_package(place)
    (folder / "fedtune.json").unlink()
    yield load_error(folder)
    yield load_error(export_as_advised(place, run_of(place), "--to", "edge"))


@follows("{} belongs to the backbone {}, the package to {}: use an adapter of the same one", slow=True)
def _(place: Place) -> Iterator[str]:
    foreign, _ = make_run(place.folder / "run", hub(checkpoint(place.folder / "m", seed=9)), CAUSAL)
    (other,) = (export_as_advised(place, foreign, "--to", "edge", "--separate") / "adapters").glob("*.safetensors")
    other = other.rename(place.folder / "other.safetensors")
    folder = export_as_advised(place, run_of(place), "--to", "edge", "--separate")
    (own,) = (folder / "adapters").glob("*.safetensors")
    shutil.copyfile(other, folder / "adapters/more.safetensors")
    yield load_error(folder)
    shutil.copyfile(own, folder / "adapters/more.safetensors")
    yield load_error(folder)
