"""The hello messages that server and client exchange before the first round.

A server on a network tells a client that it rejects with a `query.rejected` message, whose record `rejected` has the reason, `why`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config.bounds import require
from fedtune.errors import PlanError
from fedtune.storage.reading import read_object

REJECTED = "query.rejected"


@dataclass(frozen=True, kw_only=True)
class ServerHello:
    """The hello of a server on a network. In a simulation, the server sends only the round: the clients already have the experiment.

    Args:
        config: The experiment, as `config.to_dict` writes it.
        run: Name of the run; a client may use it as a folder name.
        labels: Class names of a classification.
        round: The next round.
    """

    config: Mapping[str, Any]
    run: str
    labels: tuple[str, ...]
    round: int = 0

    @classmethod
    def from_json(cls, text: str) -> "ServerHello":
        """Raises PlanError if `text` is not a hello of this version of fedtune."""
        try:
            return read_object(cls, text, ValueError, "hello")
        except ValueError as bad:
            raise PlanError(f"the server's hello cannot be read ({bad}): the peers run different versions of fedtune") from None


@dataclass(frozen=True, kw_only=True)
class ClientHello:
    """A client's answer.

    Args:
        client: Its logical id.
        device_class: Its device class; "" if it has none.
        examples: Number of its training rows.
        held_out: Number of its held-out rows, for its own evaluation.
        base: Fingerprint of its backbone.
        shifts: Versions of the shifts merged into its frozen weights.
        remembers: Whether it keeps these shifts until its next turn.
        rank: LoRA rank that it requests; None means the config's.
        device: Description of its device and settings; "" for a simulated client.
        start: Digest of the start of a warm start that it holds; "" for none.
    """

    client: str
    device_class: str
    examples: int
    held_out: int
    base: str
    shifts: tuple[int, ...]
    remembers: bool
    rank: int | None = None
    device: str = ""
    start: str = ""

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if name not in ("device", "start") or value})

    @classmethod
    def from_json(cls, text: str) -> "ClientHello":
        """Raises ValueError if `text` is not a hello, or a count is out of range."""
        hello = read_object(cls, text, ValueError, "hello")
        for name, least in (("examples", 0), ("held_out", 0), ("rank", 1)):
            require(f"the hello's {name}", getattr(hello, name), ValueError, ge=least)
        return hello
