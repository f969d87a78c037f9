"""The advice of `fedtune keys`, and of server and client about keys, certificates and the allowed clients."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedtune.network.keys import add_clients, make_keys
from tests.advised.rows import FLAG, Place, command, compose_once, error_of, follows


def folder(place: Place) -> dict[str, str]:
    """A copy of a folder of keys for the clients a and b."""
    made = place.keep("keys", lambda path: make_keys(path, ["fed.example.org"], ["a", "b"]))
    shutil.copytree(made, place.folder / "keys")
    return {"keys": str(place.folder / "keys"), "a": str(place.folder / "keys/clients/a")}


def quiet_client(place: Place) -> None:
    """Clients that stop as soon as they are ready to connect."""
    place.patch.setattr("fedtune.network.node.Node.serve", lambda self: None)


def quiet_server(place: Place) -> None:
    """Servers that stop as soon as they are ready to listen."""
    place.patch.setattr("fedtune.cli.server.compose", compose_once)
    place.patch.setattr("fedtune.experiment.run_experiment", lambda *args, **more: None)
    place.patch.setattr("fedtune.clients.workspace.Workspace", lambda *args: None)
    place.patch.setattr("fedtune.data.load_test", lambda config: None)


def client_of(keys: dict[str, str], at: Path) -> list[str]:
    files = ["--key", f"{keys['a']}/key", "--root-certificates", f"{keys['a']}/ca.pem"]
    return ["fedtune-client", "--server", "localhost:1", *files, "--state", str(at)]


def server_of(keys: dict[str, str], at: Path) -> list[str]:
    files = [f"{keys['keys']}/{name}" for name in ("ca.pem", "server.pem", "server.key")]
    return ["fedtune-server", "--run", str(at), "--certificates", *files, "--allowed", f"{keys['keys']}/allowed.json"]


MAKE = "fedtune keys --out {here}/new"
command("is neither a host name nor an IP address", MAKE + " --server-name host:8080 --clients a", server_name="fed.example.org,192.0.2.7")
command("{}: leave out --{}", "fedtune keys --out {keys} --add c --days 3 --ca-key x", ready=folder)
command("already exists and keys are never overwritten", "fedtune keys --out {keys} --server-name h --clients a", ready=folder,
        out="{here}/other", add="c")  # fmt: skip
command("already has a key, and keys are never overwritten", "fedtune keys --out {keys} --add a", ready=folder, rotate="a")


@follows("a new folder of keys needs --server-name HOST and --clients NAME ...;")
def _(place: Place) -> Iterator[str]:
    make = ["fedtune", "keys", "--out", str(place.folder / "new")]
    output = place.run(*make)
    yield output
    yield place.run(*make, "--server-name", "h", "--clients", "a", "b")
    changes = {"--add": ["c"], "--rotate": ["a"], "--remove": ["b"], "--renew-server": [], "--renew-signing-key": []}
    for flag in FLAG.findall(output.rpartition(";")[2]):
        yield place.run(*make, flag, *changes[flag])


@follows("no client would be left")
def _(place: Place) -> Iterator[str]:
    keys = ["fedtune", "keys", "--out", folder(place)["keys"]]
    yield place.run(*keys, "--remove", "a", "b")
    yield place.run(*keys, "--add", "c")
    yield place.run(*keys, "--remove", "a", "b")


@follows("is not a folder of `fedtune keys`")
def _(place: Place) -> Iterator[str]:
    keys = ["fedtune", "keys", "--out", str(place.folder / "new")]
    yield place.run(*keys, "--add", "c")
    yield place.run(*keys, "--server-name", "h", "--clients", "a")
    yield place.run(*keys, "--add", "c")


@follows("{} exists but {} is not allowed: remove that folder, or use another name")
def _(place: Place) -> Iterator[str]:
    keys = folder(place)
    (place.folder / "keys/clients/c").mkdir()
    yield place.run("fedtune", "keys", "--out", keys["keys"], "--add", "c")
    yield place.run("fedtune", "keys", "--out", keys["keys"], "--add", "d")
    (place.folder / "keys/clients/c").rmdir()
    yield place.run("fedtune", "keys", "--out", keys["keys"], "--add", "c")


@follows("make one with --add {}")
def _(place: Place) -> Iterator[str]:
    keys = folder(place)
    rotate = ["fedtune", "keys", "--out", keys["keys"], "--rotate", "c"]
    output = place.run(*rotate)
    yield output
    yield place.run(*rotate[:4], *output.rpartition(" with ")[2].split())
    yield place.run(*rotate)


@follows("there is no {}: give the CA's key with --ca-key FILE; if it is lost, make a new folder with --out")
def _(place: Place) -> Iterator[str]:
    keys = folder(place)
    (place.folder / "keys/ca.key").rename(place.folder / "apart.key")
    yield place.run("fedtune", "keys", "--out", keys["keys"], "--renew-server")
    yield place.run("fedtune", "keys", "--out", keys["keys"], "--renew-server", "--ca-key", place.folder / "apart.key")
    yield place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")


@follows("{} is not the key of {}: give the matching key with --ca-key FILE")
def _(place: Place) -> Iterator[str]:
    keys = folder(place)
    shutil.copy(place.folder / "keys/ca.key", place.folder / "apart.key")
    shutil.copy(place.folder / "keys/server.key", place.folder / "keys/ca.key")
    renew = ["fedtune", "keys", "--out", keys["keys"], "--renew-server"]
    yield place.run(*renew)
    yield place.run(*renew, "--ca-key", place.folder / "apart.key")


@follows("cannot read the list of allowed clients {}: {}; `fedtune keys` makes one")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    (place.folder / "keys/allowed.json").unlink()
    yield place.run(*server_of(keys, place.folder / "run"))
    yield place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield place.run(*server_of({"keys": str(place.folder / "new")}, place.folder / "run"))


def _list(place: Place, keys: dict[str, str], **changes: str) -> None:
    path = Path(keys["keys"]) / "allowed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@follows("{}: {} and {} have the same key, so they cannot be told apart: give each its own")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    _list(place, keys, b=json.loads((Path(keys["keys"]) / "allowed.json").read_text())["a"])
    yield place.run(*server_of(keys, place.folder / "run"))
    _list(place, keys, b=(Path(keys["keys"]) / "clients/b/key.pub").read_text())
    yield place.run(*server_of(keys, place.folder / "run"))


@follows("{} is not an ECDSA public key: use the text of clients/NAME/key.pub")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    _list(place, keys, a="ssh-rsa AAAA")
    yield place.run(*server_of(keys, place.folder / "run"))
    _list(place, keys, a=(Path(keys["keys"]) / "clients/a/key.pub").read_text())
    yield place.run(*server_of(keys, place.folder / "run"))


@follows("the private key {} is readable by others (mode {}): chmod 600 {}")
def _(place: Place) -> Iterator[str]:
    quiet_client(place)
    keys = folder(place)
    (Path(keys["a"]) / "key").chmod(0o644)
    output = place.run(*client_of(keys, place.folder / "state"))
    yield output
    word, mode, path = output.rpartition(": ")[2].split()
    assert word == "chmod"
    Path(path).chmod(int(mode, 8))
    yield place.run(*client_of(keys, place.folder / "state"))


@follows("is not a private key without password (PEM or OpenSSH): use the file that `fedtune keys` made")
def _(place: Place) -> Iterator[str]:
    quiet_client(place)
    keys = folder(place)
    made = (Path(keys["a"]) / "key").read_bytes()
    (Path(keys["a"]) / "key").write_bytes((Path(keys["a"]) / "key.pub").read_bytes())
    yield place.run(*client_of(keys, place.folder / "state"))
    (Path(keys["a"]) / "key").write_bytes(made)
    yield place.run(*client_of(keys, place.folder / "state"))


@follows("  then restart it; clients reconnect by themselves and keep their ca.pem")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    place.run("fedtune", "keys", "--out", keys["keys"], "--renew-server")
    yield place.printed
    yield place.run(*server_of(keys, place.folder / "run"))


@follows("  fedtune-server conf=NAME --certificates ca.pem server.pem server.key --allowed allowed.json")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield place.printed
    (line,) = [line for line in place.printed.splitlines() if line.startswith("  fedtune-server")]
    place.patch.chdir(place.folder / "new")
    yield place.run(*line.replace("NAME", "heterogeneous").split())


@follows("  fedtune-client --server {}:8080 --client-id {} --root-certificates ca.pem --key key{} --data PATH")
def _(place: Place) -> Iterator[str]:
    quiet_client(place)
    place.patch.setenv("HOME", str(place.folder))
    place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield place.printed
    (line,) = [line for line in place.printed.splitlines() if line.startswith("  fedtune-client")]
    place.patch.chdir(place.folder / "new/clients/a")
    (place.folder / "rows.jsonl").write_text('{"text": "a"}\n')
    yield place.run(*line.replace("PATH", str(place.folder / "rows.jsonl")).split())


@follows("Keep {} off the server: it signs the next certificate (--renew-server)")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    place.run("fedtune", "keys", "--out", place.folder / "keys", "--server-name", "h", "--clients", "a")
    yield place.printed
    (place.folder / "keys/ca.key").rename(place.folder / "ca.key")
    yield place.run(*server_of({"keys": str(place.folder / "keys")}, place.folder / "run"))
    yield place.run("fedtune", "keys", "--out", place.folder / "keys", "--renew-server", "--ca-key", place.folder / "ca.key")


@follows("Then delete the copies in {}: each key belongs only on its client.")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    place.run("fedtune", "keys", "--out", place.folder / "keys", "--server-name", "h", "--clients", "a")
    yield place.printed
    shutil.rmtree(place.folder / "keys/clients")
    yield place.run(*server_of({"keys": str(place.folder / "keys")}, place.folder / "run"))
    yield place.run("fedtune", "keys", "--out", place.folder / "keys", "--rotate", "a")


@follows("no client is given: give --clients NAME NAME ...")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: add_clients(place.folder, []))  # the command line requires a client's name
    yield error_of(lambda: make_keys(place.folder / "keys", ["h"], ["a", "b"]))


@follows("--server-name is missing: give the host name or IP address that clients reach the server by")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: make_keys(place.folder / "keys", [], ["a"]))  # the command line requires a server's name
    yield place.run("fedtune", "keys", "--out", place.folder / "keys", "--server-name", "192.0.2.7", "--clients", "a")
