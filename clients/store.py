"""A client's state between turns: the tensors of `plan.keep`, such as FedSA's B, its turns' own states, and its privacy ledger."""

import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import CheckpointError
from fedtune.privacy.ledger import Ledger, ledgers_in
from fedtune.storage.atomic import new_file, write_text
from fedtune.storage.ids import file_name
from fedtune.storage.parsing import read_text

_ID = "id"  # file with the client's id, in a folder whose name is a shortened id


class ClientStore:
    """Stores tensors by client and round, one file each, so that a run resumed from an older checkpoint finds the tensors of that round.

    Args:
        folder: Holds one folder per client; created at the first write.
        rounds: Number of newest files to keep per client.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self._rounds = folder, rounds

    def read(self, client: str, before: int) -> AdapterState | None:
        """The client's tensors from its last turn before this round; None if there are none.

        Raises:
            CheckpointError: The file is damaged.
        """
        found = self.find(client, before)
        return AdapterState.load(found) if found else None

    def find(self, client: str, before: int) -> Path | None:
        """The file that `read` reads."""
        return next((path for path in reversed(self._files(client)) if round_of(path) < before), None)

    def write(self, client: str, round: int, state: AdapterState) -> None:
        """Store `state` as the client's tensors after this round.

        Raises:
            CheckpointError: They cannot be written.
        """
        path = self.folder_of(client) / f"round-{round:04d}.safetensors"
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)  # clients' tensors are private
            path.parent.mkdir(exist_ok=True)
            if "." in path.parent.name:  # a shortened name
                write_text(path.parent / _ID, client, durable=False)
            with new_file(path, durable=False) as beside:
                state.save(beside)
            for old in self._files(client)[: -self._rounds]:
                old.unlink()
        except OSError as bad:
            raise CheckpointError(f"client {client} cannot write its tensors to {path.parent}: {bad.strerror}; free the disk") from None

    def substore(self, name: str) -> "ClientStore":
        """Another store for the same clients, in a subfolder. Its name starts with a dot, so it differs from every client's folder."""
        return ClientStore(self.folder / f".{name}", self._rounds)

    def turns(self) -> dict[str, "ClientStore"]:
        """The stores of turns' own states (`Work.keep`), by the turn's name, which no code has checked."""
        return {path.name.removeprefix(".turn-"): self.substore(path.name[1:]) for path in sorted(self.folder.glob(".turn-*"))}

    def clients(self) -> list[str]:
        """Sorted ids of the clients with stored tensors."""
        folders = self.folder.glob("*") if self.folder.is_dir() else ()
        return sorted(client_id(path) for path in folders if path.name[0] != "." and any(path.glob("round-*.safetensors")))

    def folder_of(self, client: str) -> Path:
        """The folder of the client's files."""
        return self.folder / file_name(client)

    def _files(self, client: str) -> list[Path]:
        return sorted(self.folder_of(client).glob("round-*.safetensors"), key=round_of)


@dataclass(frozen=True, eq=False)
class Storage:
    """The clients' state between turns.

    Args:
        store: Their tensors.
        ledgers: Client → its privacy ledger. None if the storage is temporary; private turns are then rejected.
    """

    store: ClientStore
    ledgers: Callable[[str], Ledger] | None = None

    @classmethod
    def in_folder(cls, folder: Path, config: Config) -> "Storage":
        """Tensors in `folder`, ledgers in the sibling folder `privacy/`."""
        return cls(ClientStore(folder, config.keep_checkpoints + 1), ledgers_in(folder.with_name("privacy")))

    @classmethod
    def temporary(cls, config: Config) -> "Storage":
        """Storage in a temporary folder, which is deleted with this object."""
        folder = Path(tempfile.gettempdir()) / f"fedtune-clients-{secrets.token_hex(8)}"
        storage = cls(ClientStore(folder, config.keep_checkpoints + 1))
        weakref.finalize(storage, shutil.rmtree, folder, ignore_errors=True)
        return storage


def client_id(folder: Path) -> str:
    """The client id of this folder, which need not exist if the client has only a turn's state.

    Raises:
        CheckpointError: The folder's name is shortened, and no id file can be read.
    """
    if "." not in folder.name:
        return re.sub(r"%([0-9a-f]{6})", lambda m: chr(int(m[1], 16)), folder.name)
    places = [folder / _ID, *(turn / folder.name / _ID for turn in folder.parent.glob(".turn-*"))]
    file = next((place for place in places if place.is_file()), places[0])
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as bad:
        raise CheckpointError(f"{folder} is not a client's folder: {file} cannot be read ({bad})") from None


def round_of(path: Path) -> int:
    """The round of a file of a store."""
    return int(path.stem[6:])
