"""Advice about the versions of the model on a device."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from fedtune.delivery import served
from fedtune.delivery.serving import DeviceServer
from fedtune.delivery.versions import Versions
from tests.advised.rows import Place, follows
from tests.delivery import test_serving
from tests.delivery.test_versions import install


def model(place: Place, *words: str | Path) -> str:
    """The output of `fedtune model`."""
    return place.run("fedtune", "model", *words, "--state", place.folder)


def two(place: Place) -> Versions:
    """Versions a and b; b is current."""
    for at, name in enumerate("ab"):
        install(place.folder, name, installed=at)
    versions = Versions(place.folder)
    versions.activate("b")
    return versions


@follows("--state {}: no such folder; give the folder that the log of `fedtune-client` names at its start")
def _(place: Place) -> Iterator[str]:
    yield place.run("fedtune", "model", "list", "--state", place.folder / "none")
    yield place.run("fedtune", "model", "list", "--state", place.folder)


@follows("'{}' is not the name of a version: give one that `fedtune model list` shows")
def _(place: Place) -> Iterator[str]:
    yield from _version_error(place, "../a")


@follows("there is no version {} in {}: give one that `fedtune model list` shows")
def _(place: Place) -> Iterator[str]:
    yield from _version_error(place, "c")


def _version_error(place: Place, name: str) -> Iterator[str]:
    two(place)
    yield model(place, "remove", name)
    yield model(place, "list")
    yield model(place, "remove", next(line.split()[0] for line in place.printed.splitlines()[1:] if not line.startswith("*")))


@follows("version {} is current: go back to an earlier one with `fedtune model rollback`, or remove all of them with --all")
def _(place: Place) -> Iterator[str]:
    two(place)
    yield model(place, "remove", "b")
    yield model(place, "rollback")
    yield model(place, "remove", "b")
    assert [version.name for version in Versions(place.folder).names()] == ["a"]
    yield model(place, "remove", "--all")


@follows("{} points to '{}', which is no version: remove this link")
def _(place: Place) -> Iterator[str]:
    link = two(place).folder / "current"
    link.unlink()
    link.symlink_to("elsewhere")
    yield model(place, "rollback")
    link.unlink()
    yield model(place, "rollback")


@follows("{} is not a symbolic link: remove it")
def _(place: Place) -> Iterator[str]:
    link = two(place).folder / "current"
    link.unlink()
    link.mkdir()
    yield model(place, "list")
    link.rmdir()
    yield model(place, "list")


@follows("{}: retry later")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(served, "SERVER", (sys.executable, "-I", "-S", "-c", test_serving.CHILD))
    server = DeviceServer(place.folder, "127.0.0.1", 0, print)
    server.start()
    try:
        yield httpx.get(server.url).json()["error"]["message"]
        test_serving.add(place.folder, "a", 1)
        Versions(place.folder).activate("a")
        test_serving.wait_for(lambda: httpx.get(server.url).status_code == 200)
        yield ""
    finally:
        server.stop(0)
