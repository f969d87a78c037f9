"""The messages by which the server delivers a model to a client, and tells it that the run has ended.

The server sends `query.deliver` messages, and the client answers each with its state:

manifest    ConfigRecord    `text`, the manifest as JSON, and `signature`, of `signed(text)`; empty if the server does not sign
part        ConfigRecord    `offset` and `data`, the next bytes of the body; absent in the first message

The body is the concatenation of safetensors files: the adapter, then the shifts that are merged into the frozen weights. The client stores
the bytes, so a download continues after a restart of either side. After the last byte the client installs the model.

`query.end` has the record `end` with `run` and `rounds`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from flwr.app import ConfigRecord, RecordDict

from fedtune.errors import PlanError
from fedtune.storage.reading import SCALAR, read_object

DELIVER, END = "query.deliver", "query.end"
PART_BYTES = 4 << 20  # of the body in one message
_SIGNED = b"fedtune model 1\n"  # keeps the signature from being valid for anything else


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of the body; `bytes` is its size."""

    kind: Literal["adapter", "shift"]
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes a model that the server delivers.

    Args:
        run: Name of the run.
        round: The round whose result it is.
        serial: Time of its first offer, in nanoseconds since 1970. A client accepts no smaller serial than its newest.
        backbone: Fingerprint of the backbone.
        base: Versions of the shifts, in the order of their files.
        files: The files of the body: one adapter, then the shifts.
        turn: As in `wire.ServerMessage`.
        keep: As in `wire.ServerMessage`.
        params: As in `wire.ServerMessage`.
    """

    run: str
    round: int
    serial: int
    backbone: str
    base: tuple[int, ...]
    files: tuple[File, ...]
    turn: str
    keep: tuple[str, ...] = ()
    params: Mapping[str, SCALAR] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the body."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Identifies the content: SHA-256 over the files' digests."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the version on a device, such as `assistant-r0008-1a2b3c4d`."""
        return f"{self.run[:40]}-r{self.round:04d}-{self.digest[:8]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises PlanError if `text` is not a manifest of this version of fedtune."""
        try:
            found = read_object(cls, text, ValueError, "manifest")
            if [f.kind for f in found.files] != ["adapter", *("shift" for _ in found.base)]:
                raise ValueError("its files are not an adapter and the shifts of its base")
            if min(found.round, found.serial, *found.base, *(f.bytes for f in found.files)) < 0:
                raise ValueError("a number is negative")
            return found
        except ValueError as bad:
            why = "the peers run different versions of fedtune"
            raise PlanError(f"the manifest of the server's model cannot be read ({bad}): {why}") from None


@dataclass(frozen=True, kw_only=True)
class DeliveryState:
    """A client's answer to a `query.deliver` message.

    Args:
        state: `wants` more bytes; has `installed` the model; has `kept` its older one, which scores better on its own rows; `done` without
            telling which, because its rows are private.
        have: Bytes of the body that the client has stored.
        chosen: What it installed: the `global` or its `personal` model.
    """

    state: Literal["wants", "installed", "kept", "done"]
    have: int = 0
    chosen: Literal["", "global", "personal"] = ""

    def to_record(self) -> ConfigRecord:
        return ConfigRecord({"json": json.dumps(asdict(self))})

    @classmethod
    def from_content(cls, content: RecordDict) -> "DeliveryState":
        """Raises ValueError if the content of a reply holds no valid state."""
        try:
            found = read_object(cls, str(content.config_records["delivery"]["json"]), ValueError, "answer to a delivery")
        except KeyError:
            raise ValueError("it lacks the record 'delivery'") from None
        if found.have < 0:
            raise ValueError("a number is negative")
        return found


def signed(text: str) -> bytes:
    """The bytes that the signature of a manifest covers."""
    return _SIGNED + text.encode()
