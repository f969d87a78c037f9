"""Advice about the flags of the server, the client and the other commands."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from fedtune.config import to_dict
from fedtune.network.status_server import StatusServer
from tests.advised.keys import client_of, folder, quiet_client, quiet_server, server_of
from tests.advised.rows import Place, command, compose_once, follows, ways

SERVER = "fedtune-server --run {here}/run --insecure "
CLIENT = "fedtune-client --server localhost:1 --state {here}/state --client-id a "


def keys_and_quiet(place: Place) -> dict[str, str]:
    quiet_client(place)
    quiet_server(place)
    return folder(place)


command(
    "neither TLS nor keys: leave out --key",
    CLIENT + "--insecure --key {a}/key --root-certificates {a}/ca.pem",
    ready=keys_and_quiet,
)
command("--max-epsilon limits the cost of private turns", CLIENT + "--insecure --max-epsilon 3", ready=quiet_client)
command("cannot create the state folder {}: {}; give another --state", CLIENT + "--insecure --state /proc/no",
        ready=quiet_client, state="{here}/other")  # fmt: skip
command("the client name '{}' is invalid: give a --client-id", CLIENT + "--insecure --client-id 'a b'",
        ready=quiet_client, client_id="ab")  # fmt: skip
command("neither TLS nor keys: leave out --certificates", SERVER + "--certificates {keys}/ca.pem {keys}/server.pem {keys}/server.key"
        " --allowed {keys}/allowed.json", ready=keys_and_quiet)  # fmt: skip
command("give either a run directory or --control 127.0.0.1:PORT", "fedtune status", ready=lambda place: _board(place), control="{control}")


def _board(place: Place) -> dict[str, str]:
    board = StatusServer(place.folder / "server.json", lambda: {"run": str(place.folder), "nodes": [], "rounds": 2, "round": 1})
    board.__enter__()
    place.patch.setattr(StatusServer, "__del__", lambda self: self.__exit__(None, None, None), raising=False)
    return {"control": board.control}


@follows("--key is missing: create a key with `fedtune keys`, or use --insecure")
def _(place: Place) -> Iterator[str]:
    quiet_client(place)
    bare = ["fedtune-client", "--server", "localhost:1", "--client-id", "a", "--state", str(place.folder / "state")]
    yield place.run(*bare)
    yield place.run("fedtune", "keys", "--out", place.folder / "keys", "--server-name", "h", "--clients", "a")
    yield place.run(*client_of({"a": str(place.folder / "keys/clients/a")}, place.folder / "state"))
    yield place.run(*bare, "--insecure")


@follows("--certificates and --allowed are both needed: create them with `fedtune keys`")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    bare = ["fedtune-server", "--run", str(place.folder / "run")]
    yield place.run(*bare)
    yield place.run("fedtune", "keys", "--out", place.folder / "keys", "--server-name", "h", "--clients", "a")
    yield place.run(*server_of({"keys": str(place.folder / "keys")}, place.folder / "run"))
    yield place.run(*bare, "--insecure")


@follows("there is no file {}: create certificates with `fedtune keys`")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    (place.folder / "keys/server.pem").unlink()
    yield place.run(*server_of(keys, place.folder / "run"))
    yield place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield place.run(*server_of({"keys": str(place.folder / "new")}, place.folder / "run"))


@follows("is not a setting: write KEY=VALUE, such as")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    bare = ["fedtune-server", "--run", str(place.folder / "run"), "--insecure"]
    output = place.run(*bare, "rounds")
    yield output
    for setting in output.rpartition("such as ")[2].strip().split(" or "):
        yield place.run(*bare, setting)


@follows("engine={} is for simulations: leave it out here", slow=True)
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    bare = ["fedtune-server", "--run", str(place.folder / "run"), "--insecure"]
    yield place.run(*bare, "engine=ray")
    yield place.run(*bare)


@follows("is not an address: write HOST:PORT")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    bare = ["fedtune-server", "--run", str(place.folder / "run"), "--insecure"]
    output = place.run(*bare, "--address", "8080")
    yield output
    yield place.run(*bare, "--address", output.split()[-1])


@follows("clients use the run's name '{}' as a folder name")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    yield place.run("fedtune-server", "--run", place.folder / "my run", "--insecure")
    yield place.run("fedtune-server", "--run", place.folder / "My.run-1_a", "--insecure")


def run_folder(path: Path, *settings: str, served: bool = False, done: int = 1, pid: int = 0) -> Path:
    """The parts of a run directory that an entry point reads."""
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(compose_once(["rounds=2", *settings])[0].config)))
    for number in range(done + 1):
        (path / "checkpoints" / f"round-{number:04d}").mkdir(parents=True)
        (path / "checkpoints" / f"round-{number:04d}" / "checkpoint.json").write_text(json.dumps({"round": number, "clients": {}}))
    if served:
        (path / "server.json").write_text(json.dumps({"pid": pid, "run": str(path), "nodes": [], "rounds": 2, "round": done}))
    return path


@follows("already sets the run directory: leave out {}, or --run", slow=True)
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    run = run_folder(place.folder / "kept")
    argv = ["fedtune-server", f"resume={run}", "--run", str(run), "--insecure"]
    output = place.run(*argv)
    yield output
    for out in output.rpartition("leave out ")[2].strip().split(", or "):
        (way,) = ways(f"x: leave out {out}", argv, {}) if out.startswith("--") else [[word for word in argv if word != out]]
        yield place.run(*way)


@follows("leave that setting out, or give another --run to start another run", slow=True)
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    run = run_folder(place.folder / "kept", "round_timeout_s=600")
    yield place.run("fedtune-server", "--insecure", "--run", run, "seed=7")
    yield place.run("fedtune-server", "--insecure", "--run", run)
    yield place.run("fedtune-server", "--insecure", "--run", place.folder / "other", "seed=7")


# -- commands that read a run -------------------------------------------------------------------------------------------------------------


@follows("there is no run {}: give the folder that holds config.yaml and checkpoints/")
def _(place: Place) -> Iterator[str]:
    run = run_folder(place.folder / "run")
    yield place.run("fedtune", "status", run / "adapter")
    yield place.run("fedtune", "status", next(p.parent for p in place.folder.rglob("config.yaml") if (p.parent / "checkpoints").is_dir()))


@follows("there is no run directory {}: give the folder that holds config.yaml and checkpoints/")
def _(place: Place) -> Iterator[str]:
    quiet_run(place)
    run = run_folder(place.folder / "run")
    yield place.run("fedtune.sim", f"resume={place.folder}/rnu")
    yield place.run("fedtune.sim", f"resume={run}")


def quiet_run(place: Place) -> None:
    """Simulations that stop before they begin."""
    place.patch.setattr("fedtune.experiment.simulate", lambda config: Path(config.resume or "a run"))


@follows("{} is stopped after {} of {} rounds: continue with {}")
def _(place: Place) -> Iterator[str]:
    yield from _continue(place, run_folder(place.folder / "run"))


@follows("python -m fedtune.sim resume={}")
def _(place: Place) -> Iterator[str]:
    yield from _continue(place, run_folder(place.folder / "run"))


@follows("fedtune-server --run {} and the flags for its keys")
def _(place: Place) -> Iterator[str]:
    yield from _continue(place, run_folder(place.folder / "served", served=True))


@follows("if it hangs, stop it and continue with {}")
def _(place: Place) -> Iterator[str]:
    run = run_folder(place.folder / "served", served=True, pid=os.getpid())
    os.utime(run / "server.json", (1e9, 1e9))
    yield from _continue(place, run)


def _continue(place: Place, run: Path) -> Iterator[str]:
    """Take the command that `fedtune status` prints and start it."""
    quiet_run(place)
    keys_and_quiet(place) if not (place.folder / "keys").exists() else None
    assert not place.run("fedtune", "status", run)
    output = " ".join(place.printed.split())
    yield output
    line = output.partition("continue with ")[2]
    if line.startswith("python -m "):
        (name, setting) = line.removeprefix("python -m ").split()[:2]
        yield place.run(name, setting)
        return
    start, more = line.partition(" and ")[::2]
    assert more.startswith("the flags for its keys")
    flags = server_of({"keys": str(place.folder / "keys")}, run)[3:]
    yield place.run(*start.split(), *flags)
