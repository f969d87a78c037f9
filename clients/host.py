"""A host: one process, or a part of one, that acts as clients of one experiment.

The simulation, a Ray worker and a device each create a host when they start. A host owns all that its clients keep and count, so that two
hosts in one process share nothing.
"""

from dataclasses import dataclass
from functools import cached_property

from fedtune.clients.devices.fitting import Devices
from fedtune.clients.loaded_model import Body
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
    """What acts as clients of one experiment.

    Args:
        config: The experiment.
        storage: Where its clients keep things.
        device: Profile of this machine, where it is a real device: it then fits its turns to it, instead of simulating a class.
        floor: The least privacy that this device accepts; None accepts any.
        loaded: What is loaded already, which no other host that is in use may hold; None loads it when it is first needed.
    """

    config: Config
    storage: Storage
    device: DeviceClass | None = None
    floor: Floor | None = None
    loaded: Workspace | None = None

    @cached_property
    def space(self) -> Workspace:
        """What is loaded; the first use loads it."""
        return self.loaded or load_workspace(self.config)

    @cached_property
    def devices(self) -> Devices:
        """What the clients are, and what fits them."""
        return Devices(self.config, self.storage.store, self.device, lambda: self.space)

    def body_of(self, client: str) -> Body:
        """The body that a client computes in.

        Raises:
            Decline: Its device can hold none.
        """
        return self.space.body(self.devices.settle(client).precision)

    def complete(self, client: str, request: ServerMessage) -> AdapterState:
        """What a client goes on from: its own tensors before those that it was sent before those that it draws from the run's seed."""
        space, sent = self.space, request.adapter
        names = list(space.live.parameters)
        # an evaluation comes after the round's own turn
        kept = self.storage.store.read(client, request.round + (request.plan is None)) if request.keep else None
        own = set(matching(kept.tensors, request.keep)) if kept else set()
        if sent.spec.method != space.live.spec.method or (not own and all(n in sent.tensors for n in names)):
            return sent
        return sent.replace({n: kept[n] if kept and n in own else sent[n] if n in sent.tensors else space.initial[n] for n in names})

    def ledger(self, client: str) -> Ledger:
        """What the client has spent.

        Raises:
            PlanError: There is no place for it that outlives the process.
        """
        if self.storage.ledgers is None:
            raise PlanError("the plan asks for privacy and this client has no folder to count it in: what it has spent would be forgotten")
        return self.storage.ledgers(client)
