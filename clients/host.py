"""A host runs clients of one experiment in one process.

The simulation, a Ray worker and a device each create a host at startup. A host owns its clients' tensors and ledgers, so two hosts in one
process share nothing.
"""

from dataclasses import dataclass
from functools import cached_property

from fedtune.clients.devices.fitting import Devices
from fedtune.clients.loaded_model import LoadedModel
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace, load_workspace
from fedtune.config import Config, DeviceClass
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import matching
from fedtune.contracts.wire import ServerMessage
from fedtune.errors import PlanError
from fedtune.privacy.floor import Floor
from fedtune.privacy.ledger import Ledger


@dataclass(frozen=True, eq=False)
class ClientHost:
    """Runs clients of one experiment.

    Args:
        config: The experiment.
        storage: The clients' tensors and ledgers.
        device: Profile of this machine if it is a real device; turns are fitted to it. None simulates the config's device classes.
        floor: The minimum privacy that this device accepts; None accepts any.
        loaded: A loaded workspace that no other active host uses; None loads one when it is first needed.
    """

    config: Config
    storage: Storage
    device: DeviceClass | None = None
    floor: Floor | None = None
    loaded: Workspace | None = None

    @cached_property
    def space(self) -> Workspace:
        """The workspace; the first use loads it."""
        return self.loaded or load_workspace(self.config)

    @cached_property
    def devices(self) -> Devices:
        """The clients' devices."""
        return Devices(self.config, self.storage.store, self.device, lambda: self.space)

    def loaded_model(self, client: str) -> LoadedModel:
        """The model in the precision of a client's device.

        Raises:
            Decline: No precision fits the device.
        """
        return self.space.loaded_model(self.devices.fixed_choice(client).precision)

    def take_start(self, request: ServerMessage) -> None:
        """Remember the start of a warm start, if the message contains it.

        Raises:
            PlanError: The message needs the start, which is neither in it nor on this client.
        """
        if request.start is not None:
            self.space.start = request.start.digest, request.start
        held = self.space.start[0] if self.space.start else ""
        if request.start_digest not in ("", held):
            raise PlanError("this client lacks the adapter that the run started from: the server sends it again in the client's next round")

    def complete(self, client: str, request: ServerMessage) -> AdapterState:
        """A client's full adapter. Each tensor is the client's own if it has one, else the server's, else that of the run's start."""
        space, sent = self.space, request.adapter
        warm = space.start is not None and space.start[0] == request.start_digest
        first = space.start[1] if space.start and warm else space.initial
        names = list(space.live.parameters)
        # an evaluation (no plan) follows its round's turn, hence round + 1
        kept = self.storage.store.read(client, request.round + (request.plan is None)) if request.keep else None
        own = set(matching(kept.tensors, request.keep)) if kept else set()
        if sent.spec.method != space.live.spec.method or (not own and all(n in sent.tensors for n in names)):
            return sent
        return sent.replace({n: kept[n] if kept and n in own else sent[n] if n in sent.tensors else first[n] for n in names})

    def ledger(self, client: str) -> Ledger:
        """The client's privacy ledger.

        Raises:
            PlanError: The storage is temporary.
        """
        if self.storage.ledgers is None:
            raise PlanError("the plan asks for privacy, but this client has no folder for its ledger: what it has spent would be forgotten")
        return self.storage.ledgers(client)
