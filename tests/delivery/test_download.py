"""A device refuses a delivered model that is unsigned, older, damaged or too large, and continues an unfinished download."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.clients.deployed import Device
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.delivery import Manifest, signed
from fedtune.delivery.download import Downloads
from fedtune.delivery.signing import Signer
from fedtune.errors import CheckpointError, ConfigError, Decline, FedtuneError, PlanError
from fedtune.rounds.delivery import Offer
from tests.delivery.offers import delivery, fake_host, prepare, write_keys
from tests.fakes import lora_state


class Both:
    """A server and a device with the two halves of one key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private, self.public = write_keys(folder)
        self.server = delivery(folder, self.private)
        self.device = Device(client="anna", state=folder / "state", signing_pub=str(self.public))
        self.downloads = Downloads(self.device)

    def accept(self, offer: Offer) -> Manifest:
        return self.downloads.accept(offer.text, offer.signature, fake_host())

    def sign(self, manifest: Manifest) -> Offer:
        text = manifest.to_json()
        return Offer(text=text, signature=Signer(self.private).sign(signed(text)), size=manifest.bytes, base=manifest.base, body=Path())

    def download(self, offer: Offer, step: int = 100) -> Manifest:
        manifest, body = self.accept(offer), offer.body.read_bytes()
        while (have := self.downloads.have(manifest)) < manifest.bytes:
            self.downloads.add(manifest, have, body[have : have + step])
        return manifest


@pytest.fixture
def both(tmp_path: Path) -> Both:
    return Both(tmp_path)


def shift(version: int) -> AdapterState:
    return lora_state(seed=version, version=version)


def test_a_delivered_model_arrives_unchanged(both: Both) -> None:
    offer = prepare(both.server, 3, lora_state(version=3), [shift(1), shift(2)], keep=("*.lora_B",), turn="ditto", params={"mu": 0.5})
    manifest = both.download(offer)
    got = both.downloads.read(manifest)
    assert (got.round, got.base, got.keep, got.turn, got.params) == (3, (1, 2), ("*.lora_B",), "ditto", {"mu": 0.5})
    for expected, state in zip((lora_state(version=3), shift(1), shift(2)), (got.adapter, *got.shifts), strict=True):
        assert state.spec == expected.spec
        assert all(torch.equal(state[n], t) for n, t in expected.tensors.items())
    assert manifest.name == f"mine-r0003-{manifest.digest[:8]}"


def test_a_download_continues_in_another_process(both: Both) -> None:
    offer = prepare(both.server, 1, lora_state(version=1))
    manifest, body = both.accept(offer), offer.body.read_bytes()
    both.downloads.add(manifest, 0, body[:300])
    again = Downloads(both.device)
    assert again.have(manifest) == 300
    assert again.add(manifest, 0, body[:300]) == 300, "a part that came twice"
    assert again.add(manifest, 700, body[700:]) == 300, "a part that came too early"
    assert again.add(manifest, 300, body[300:] + b"more than was announced") == len(body)
    assert torch.equal(again.read(manifest).adapter["q.lora_A"], lora_state(version=1)["q.lora_A"])


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: bytes(len(b)), lambda b: b[8:] + b[:8]])
def test_a_damaged_body_is_refused_and_forgotten(both: Both, damage: Any) -> None:
    offer = prepare(both.server, 1, lora_state(version=1), [shift(1)])
    manifest = both.accept(offer)
    with pytest.raises(CheckpointError, match="the download of the model of round 1 is damaged: its SHA-256 differs"):
        both.downloads.add(manifest, 0, damage(offer.body.read_bytes()))
    assert both.downloads.have(manifest) == 0
    both.download(offer)


def test_a_truncated_body_is_not_read(both: Both) -> None:
    offer = prepare(both.server, 1, lora_state(version=1))
    manifest = both.accept(offer)
    assert both.downloads.add(manifest, 0, offer.body.read_bytes()[:-1]) == manifest.bytes - 1
    with pytest.raises(FedtuneError, match="cannot read the adapter"):
        both.downloads.read(manifest)


def test_values_that_are_not_finite_are_refused(both: Both) -> None:
    bad = lora_state(version=1)
    bad = bad.replace({**bad.tensors, "head.weight": bad["head.weight"] / 0})
    with pytest.raises(CheckpointError, match="the model of round 1 has values that are not finite"):
        both.downloads.read(both.download(prepare(both.server, 1, bad)))


def test_only_the_accepted_key_s_signature_counts(both: Both, tmp_path: Path) -> None:
    offer = prepare(both.server, 1, lora_state(version=1))
    other, _ = write_keys(tmp_path, "other")
    for text, signature in (
        (offer.text, Signer(other).sign(signed(offer.text))),
        (offer.text.replace('"round": 1', '"round": 2'), offer.signature),
        (offer.text, Signer(both.private).sign(offer.text.encode())),  # a signature for another purpose
        (offer.text, offer.signature[:-1]),
        (offer.text, b""),
    ):
        with pytest.raises(
            Decline, match="the model's signature is wrong or missing: the server must use the private half of --signing-pub"
        ):
            both.downloads.accept(text, signature, fake_host())
    assert not (both.device.state / "models").exists()
    both.accept(offer)


def test_an_older_model_is_refused(both: Both) -> None:
    first, second = (prepare(both.server, n, lora_state(seed=n, version=n)) for n in (1, 2))
    both.accept(second)
    both.accept(second)
    with pytest.raises(Decline, match="the model of run mine, round 1, is older than one that was offered before"):
        Downloads(both.device).accept(first.text, first.signature, fake_host())
    (both.device.state / "models/seen.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot read .*seen.json, which keeps older models from being offered as new: remove it"):
        both.accept(second)


def test_without_a_key_only_insecure_devices_install(both: Both, tmp_path: Path) -> None:
    offer = prepare(delivery(tmp_path / "trial", None), 1, lora_state(version=1))
    assert offer.signature == b""
    device = Device(client="anna", state=tmp_path / "other")
    with pytest.raises(Decline, match="this device installs no model: start it with --signing-pub signing.pub"):
        Downloads(device).accept(offer.text, offer.signature, fake_host())
    Downloads(dataclasses.replace(device, unsigned=True)).accept(offer.text, offer.signature, fake_host())


def test_invalid_fields_of_a_signed_manifest_are_refused(both: Both) -> None:
    good = Manifest.from_json(prepare(both.server, 1, lora_state(version=1), [shift(1)]).text)
    large = dataclasses.replace(good.files[0], bytes=10**9)
    for changed, error, sentence in (
        ({"run": "../../etc"}, PlanError, "the run name '../../etc' of the model is not a plain folder name"),
        ({"backbone": "c" * 64}, Decline, "the model belongs to the backbone cccccccccccc, and this device has bbbbbbbbbbbb"),
        ({"files": (large, good.files[1])}, Decline, "the model is announced with 1e\\+03 MB, and has at most"),
        ({"files": good.files[::-1]}, PlanError, "its files are not an adapter and the shifts of its base"),
        ({"base": (1, 2)}, PlanError, "its files are not an adapter and the shifts of its base"),
        ({"serial": -1}, PlanError, "a number is negative"),
    ):
        with pytest.raises(error, match=sentence):
            both.accept(both.sign(dataclasses.replace(good, **changed)))
    for text in ("", "[]", "{}", json.dumps({**json.loads(good.to_json()), "path": "/etc/passwd"})):
        with pytest.raises(PlanError, match="the manifest of the server's model cannot be read"):
            both.downloads.accept(text, Signer(both.private).sign(signed(text)), fake_host())


def test_another_offer_replaces_an_unfinished_one(both: Both) -> None:
    first = prepare(both.server, 1, lora_state(version=1))
    both.downloads.add(both.accept(first), 0, first.body.read_bytes()[:50])
    second = prepare(both.server, 2, lora_state(seed=2, version=2))
    both.downloads.add(both.accept(second), 0, second.body.read_bytes()[:50])
    assert [f.name for f in (both.device.state / "models/incoming").iterdir()] == [Manifest.from_json(second.text).digest]


def test_a_server_that_starts_again_offers_the_same_model_with_the_same_serial(both: Both, tmp_path: Path) -> None:
    first = prepare(both.server, 1, lora_state(version=1))
    again = prepare(delivery(tmp_path, both.private), 1, lora_state(version=1))
    assert again.text == first.text
    other = prepare(delivery(tmp_path, both.private), 1, lora_state(seed=5, version=1))
    assert Manifest.from_json(other.text).serial > Manifest.from_json(first.text).serial
