"""Advice about models that the server signs and a device installs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.clients.deployed import Device
from fedtune.delivery import install
from fedtune.delivery.download import Downloads
from fedtune.delivery.signing import Signer, Verifier
from fedtune.rounds.delivery import Delivery
from tests.advised.keys import client_of, folder, quiet_client, quiet_server, server_of
from tests.advised.rows import Place, error_of, follows
from tests.delivery.offers import delivery, fake_host, prepare, write_keys
from tests.fakes import lora_state
from tests.rounds.test_delivery import CLIENTS, Devices, run


def quiet_keys(place: Place) -> dict[str, str]:
    quiet_client(place)
    quiet_server(place)
    return folder(place)


@follows("--insecure signs no models: leave out --signing-key, or --insecure")
def _(place: Place) -> Iterator[str]:
    keys = quiet_keys(place)
    bare, key = ["fedtune-server", "--run", str(place.folder / "run")], ["--signing-key", f"{keys['keys']}/signing.key"]
    yield place.run(*bare, "--insecure", *key)
    yield place.run(*bare, "--insecure")
    yield place.run(*server_of(keys, place.folder / "run"), *key)


@follows("--insecure installs models without a signature: leave out --signing-pub, or --insecure")
def _(place: Place) -> Iterator[str]:
    keys = quiet_keys(place)
    insecure = ["fedtune-client", "--server", "localhost:1", "--state", str(place.folder / "state"), "--client-id", "a", "--insecure"]
    key = ["--signing-pub", f"{keys['a']}/signing.pub"]
    yield place.run(*insecure, *key)
    yield place.run(*insecure)
    yield place.run(*client_of(keys, place.folder / "state"), *key)


@follows("--serve answers from models that the server delivers: add --signing-pub signing.pub")
def _(place: Place) -> Iterator[str]:
    keys = quiet_keys(place)
    serve = [*client_of(keys, place.folder / "state"), "--serve", "127.0.0.1:0"]
    yield place.run(*serve)
    yield place.run(*serve, "--signing-pub", f"{keys['a']}/signing.pub")


@follows("is not an address: write HOST:PORT, such as")
def _(place: Place) -> Iterator[str]:
    quiet_client(place)
    serve = ["fedtune-client", "--server", "localhost:1", "--state", str(place.folder / "state"), "--insecure", "--client-id", "a"]
    output = place.run(*serve, "--serve", "8000")
    yield output
    yield place.run(*serve, "--serve", output.split()[-1].replace("8000", "0"))


@follows("no --signing-key: devices will not get the model; `fedtune keys` makes one")
def _(place: Place) -> Iterator[str]:
    quiet_server(place)
    keys = folder(place)
    yield "no --signing-key: devices will not get the model; `fedtune keys` makes one"  # a running server prints this note
    place.run("fedtune", "keys", "--out", keys["keys"], "--renew-signing-key")
    yield place.run(*server_of(keys, place.folder / "run"), "--signing-key", f"{keys['keys']}/signing.key")


@follows("New signing key in {}; clients refuse models that it signed until they have its public half.")
def _(place: Place) -> Iterator[str]:
    keys = quiet_keys(place)
    place.run("fedtune", "keys", "--out", keys["keys"], "--renew-signing-key")
    yield place.printed
    yield place.run(*server_of(keys, place.folder / "run"), "--signing-key", f"{keys['keys']}/signing.key")
    yield place.run(*client_of(keys, place.folder / "state"), "--signing-pub", f"{keys['keys']}/signing.pub")


def _key_file(kind: type[Signer] | type[Verifier], name: str, place: Place, wrong: bytes | None) -> Iterator[str]:
    keys = Path(folder(place)["keys"])
    good = (keys / name).read_bytes()
    (keys / name).unlink()
    if wrong is not None:
        (keys / name).write_bytes(wrong)
    yield error_of(lambda: kind(keys / name))
    if wrong is None:
        place.run("fedtune", "keys", "--out", keys, "--renew-signing-key")
    else:
        (keys / name).write_bytes(good)
    yield error_of(lambda: kind(keys / name))


@follows("cannot read the signing key {}: {}; `fedtune keys` makes one, signing.key")
def _(place: Place) -> Iterator[str]:
    yield from _key_file(Signer, "signing.key", place, None)


@follows("cannot read the public signing key {}: {}; `fedtune keys` makes one, signing.pub")
def _(place: Place) -> Iterator[str]:
    yield from _key_file(Verifier, "signing.pub", place, None)


@follows("{} is not a signing key: give the signing.key that `fedtune keys` made")
def _(place: Place) -> Iterator[str]:
    yield from _key_file(Signer, "signing.key", place, b"text")


@follows("{} is not a public signing key: give the signing.pub that `fedtune keys` made")
def _(place: Place) -> Iterator[str]:
    yield from _key_file(Verifier, "signing.pub", place, b"text")


def refusal_of(place: Place, server: Delivery, device: Device) -> str:
    """Why the device does not accept the server's model; "" if it does."""
    offer = prepare(server, 1, lora_state(version=1))
    return error_of(lambda: Downloads(device).accept(offer.text, offer.signature, fake_host()))


@follows("this device installs no model: start it with --signing-pub signing.pub, which `fedtune keys` makes")
def _(place: Place) -> Iterator[str]:
    private, public = write_keys(place.folder)
    server, state = delivery(place.folder, private), place.folder / "state"
    yield refusal_of(place, server, Device(client="a", state=state))
    yield refusal_of(place, server, Device(client="a", state=state, signing_pub=str(public)))


@follows("cannot read {}, which keeps older models from being offered as new: remove it if you trust the server")
def _(place: Place) -> Iterator[str]:
    private, public = write_keys(place.folder)
    device = Device(client="a", state=place.folder / "state", signing_pub=str(public))
    (seen := device.state / "models/seen.json").parent.mkdir(parents=True)
    seen.write_text("{")
    yield refusal_of(place, delivery(place.folder, private), device)
    seen.unlink()
    yield refusal_of(place, delivery(place.folder, private), device)


@follows("cannot store the model in {}: {}; free the disk or give another --state")
def _(place: Place) -> Iterator[str]:
    private, public = write_keys(place.folder)
    device = Device(client="a", state=place.folder / "state", signing_pub=str(public))
    (file := device.state).write_text("a file")
    yield refusal_of(place, delivery(place.folder, private), device)
    yield refusal_of(place, delivery(place.folder, private), Device(client="a", state=place.folder / "other", signing_pub=str(public)))
    file.unlink()
    yield refusal_of(place, delivery(place.folder, private), device)


@follows("cannot install the model in {}: {}; free the disk or give another --state")
def _(place: Place) -> Iterator[str]:
    from tests.delivery.test_install import Device as Tried
    from tests.delivery.test_install import offer_of

    (full := place.folder / "full").mkdir()
    tried = Tried(full)

    def deliver() -> str:
        try:
            tried.deliver(offer_of(tried, 1, 0.0))
        except AssertionError as bad:
            return str(bad)
        return ""

    def no_space(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    with place.patch.context() as patch:
        patch.setattr(install, "new_folder", no_space)
        yield deliver()
    yield deliver()


@follows("cannot read {}: remove {}, and the server writes it again")
def _(place: Place) -> Iterator[str]:
    private, _ = write_keys(place.folder)
    server = delivery(place.folder, private)
    server.folder.mkdir()
    (server.folder / "manifest.json").write_text("{")
    yield error_of(lambda: prepare(server, 1, lora_state(version=1)))
    shutil.rmtree(server.folder)
    yield error_of(lambda: prepare(server, 1, lora_state(version=1)))


@follows("not delivered to {}: start the server again with --run {} to deliver the run's model later")
def _(place: Place) -> Iterator[str]:
    _, observer = run(place.folder, Devices(), delivers={"timeout_s": 1e-9})
    (note,) = [n for n in observer.notes if n.startswith("not delivered to")]
    yield note
    run(place.folder, Devices())
    results = json.loads((place.folder / "delivery/results.json").read_text())
    yield "" if {c: r["result"] for c, r in results.items()} == dict.fromkeys(CLIENTS, "installed global") else str(results)


@follows("the run name '{}' of the model is not a plain folder name: rename the run on the server")
def _(place: Place) -> Iterator[str]:
    private, public = write_keys(place.folder)
    downloads = Downloads(Device(client="anna", state=place.folder / "state", signing_pub=str(public)))
    for name in ("../../etc", "etc"):
        offer = prepare(delivery(place.folder / name.strip("./"), private, name), 1, lora_state(version=1))
        yield error_of(lambda offer=offer: downloads.accept(offer.text, offer.signature, fake_host()))
