"""Downloads a delivered model: checks its manifest, stores its bytes, and reads its files.

    STATE/models/seen.json          signer → largest serial that it has offered
    STATE/models/incoming/DIGEST    the bytes so far

Nothing in the manifest is used before its signature is verified. Of the names in it, only the run's becomes part of a path, after a check.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch

from fedtune.clients.deployed import Device
from fedtune.clients.host import ClientHost
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.delivery import Manifest, signed
from fedtune.contracts.wire import ServerMessage
from fedtune.delivery.signing import Verifier
from fedtune.errors import CheckpointError, ConfigError, Decline, PlanError
from fedtune.storage.atomic import flush, new_folder, write_text
from fedtune.storage.ids import is_run_name
from fedtune.storage.parsing import parse_json, read_text

_UNSIGNED = "unsigned"  # signer of models of a server with --insecure
_HEADERS = 1 << 20  # bytes that a file may have besides its tensors


class Downloads:
    """The downloads of one device.

    Args:
        device: The device; its public signing key is read now.

    Raises:
        ConfigError: The public signing key cannot be read.
    """

    def __init__(self, device: Device) -> None:
        self._folder, self._unsigned = device.state / "models", device.unsigned
        self._verifier = None if device.signing_pub is None else Verifier(Path(device.signing_pub))

    def accept(self, text: str, signature: bytes, host: ClientHost) -> Manifest:
        """Verify a manifest and return it.

        Raises:
            Decline: It is not signed by the accepted key, is older than one that was offered before, belongs to another backbone, or
                announces more bytes than such a model can have.
            PlanError: It cannot be read.
            ConfigError: The device's folder cannot be read or written.
        """
        if self._verifier is not None:
            signer = self._verifier.fingerprint
            if not self._verifier.accepts(signed(text), signature):
                raise Decline("model", "the model's signature is wrong or missing: the server must use the private half of --signing-pub")
        elif self._unsigned:
            signer = _UNSIGNED
        else:
            raise Decline("model", "this device installs no model: start it with --signing-pub signing.pub, which `fedtune keys` makes")
        manifest = Manifest.from_json(text)
        if not is_run_name(manifest.run):
            raise PlanError(f"the run name '{manifest.run[:40]}' of the model is not a plain folder name: rename the run on the server")
        self._check_serial(signer, manifest)
        if manifest.backbone != (own := host.space.backbone.fingerprint):
            raise Decline("model", f"the model belongs to the backbone {manifest.backbone[:12]}, and this device has {own[:12]}")
        if manifest.bytes > (most := _max_bytes(host, manifest)):
            raise Decline("model", f"the model is announced with {manifest.bytes / 1e6:.3g} MB, and has at most {most / 1e6:.3g} MB")
        return manifest

    def _check_serial(self, signer: str, manifest: Manifest) -> None:
        file = self._folder / "seen.json"
        try:
            seen = parse_json(read_text(file)) if file.is_file() else {}
            newest = int(seen.get(signer, 0))
        except (OSError, ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"cannot read {file}, which keeps older models from being offered as new: remove it if you trust the server"
            ) from None
        if manifest.serial < newest:
            raise Decline("model", f"the model of run {manifest.run}, round {manifest.round}, is older than one that was offered before")
        if manifest.serial > newest:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_text(file, json.dumps({**seen, signer: manifest.serial}))
            except OSError as bad:
                raise _disk(self._folder, bad) from None

    def add(self, manifest: Manifest, offset: int, data: bytes) -> int:
        """Store a part of the body. Returns the stored bytes; a part that does not follow them is ignored.

        Raises:
            ConfigError: The part cannot be written.
            CheckpointError: The complete body is damaged; it is deleted, so that the download starts again.
        """
        have = self.have(manifest)
        if data and offset == have < manifest.bytes:
            part = self._part(manifest)
            try:
                part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                for other in part.parent.iterdir():  # of older offers
                    if other != part and other.is_file():
                        other.unlink()
                with part.open("ab") as file:
                    file.write(data[: manifest.bytes - have])
                have = part.stat().st_size
                if have == manifest.bytes:
                    flush(part)
            except OSError as bad:
                raise _disk(part.parent, bad) from None
        if have == manifest.bytes:
            self._check_digests(manifest)
        return have

    def have(self, manifest: Manifest) -> int:
        """Stored bytes of the body."""
        part = self._part(manifest)
        return part.stat().st_size if part.is_file() else 0

    def read(self, manifest: Manifest) -> ServerMessage:
        """The complete body as the message that an evaluation of the same round would be.

        Raises:
            CheckpointError: A file is not an adapter, or has values that are not finite.
        """
        folder, states = self._folder / "incoming" / "files", list[AdapterState]()
        with new_folder(folder, durable=False) as files, self._part(manifest).open("rb") as body:
            for file in manifest.files:
                path, left = files / file.sha256, file.bytes
                with path.open("wb") as out:
                    while left and (piece := body.read(min(left, 1 << 20))):
                        left -= out.write(piece)
                states.append(state := AdapterState.load(path))
                if not all(torch.isfinite(t).all() for t in state.tensors.values() if t.is_floating_point()):
                    raise CheckpointError(f"the model of round {manifest.round} has values that are not finite")
        shutil.rmtree(folder)
        if tuple(s.spec.version for s in states[1:]) != manifest.base:
            raise CheckpointError(f"the shifts of the model of round {manifest.round} are not those of its manifest")
        return ServerMessage(
            round=manifest.round,
            adapter=states[0],
            base=manifest.base,
            shifts=tuple(states[1:]),
            keep=manifest.keep,
            turn=manifest.turn,
            params=manifest.params,
        )

    def discard(self, manifest: Manifest) -> None:
        """Delete the stored bytes."""
        self._part(manifest).unlink(missing_ok=True)

    def _part(self, manifest: Manifest) -> Path:
        return self._folder / "incoming" / manifest.digest

    def _check_digests(self, manifest: Manifest) -> None:
        with self._part(manifest).open("rb") as body:
            for file in manifest.files:
                digest, left = hashlib.sha256(), file.bytes
                while left and (piece := body.read(min(left, 1 << 20))):
                    digest.update(piece)
                    left -= len(piece)
                if digest.hexdigest() != file.sha256:
                    self.discard(manifest)
                    raise CheckpointError(f"the download of the model of round {manifest.round} is damaged: its SHA-256 differs")


def _max_bytes(host: ClientHost, manifest: Manifest) -> int:
    """The most bytes that the adapter and the shifts of this manifest can have. Factors of full rank take at most 8 bytes a weight."""
    adapter = host.space.initial.nbytes
    weights = sum(p.numel() for p in host.space.backbone.model.parameters())
    return 2 * adapter + len(manifest.base) * max(8 * weights, adapter) + (1 + len(manifest.base)) * _HEADERS


def _disk(folder: Path, bad: OSError) -> ConfigError:
    return ConfigError(f"cannot store the model in {folder}: {bad.strerror}; free the disk or give another --state")
