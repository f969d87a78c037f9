"""Virtual clients on Ray: on this machine's cores, or on an existing cluster.

Driver (this process)   the bridge, a `WorkerGrid`, the run directory
Worker                  an actor with its own workspace; acts for any client
Keeper                  an actor on the driver's machine; reads and writes the clients' stored tensors and privacy ledgers in the run
                        directory, so that any worker on any machine can act for a client
"""

import contextlib
import importlib
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import ClientStore, Storage
from fedtune.config import Config, EngineConfig, from_dict, to_dict
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ConfigError, FedtuneError
from fedtune.privacy.accounting import Spend
from fedtune.privacy.ledger import Ledger, ledgers_in
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.simulations.engines.ray_grid import WorkerGrid
from fedtune.storage.parsing import parse_json

_HEAD_S = 10.0  # timeout for connecting to the head node


def check_ray(engine: EngineConfig) -> None:
    """Check that Ray can run, before anything is loaded.

    Raises:
        ConfigError: A worker needs more CPUs than the machine has, Ray is not installed, or the kind of address is not supported.
    """
    cores = os.cpu_count() or 1
    if not engine.ray_address and engine.ray_cpus > cores:
        raise ConfigError(f"engine.ray_cpus={engine.ray_cpus} is more than the {cores} cores of this machine: no worker could start")
    if "://" in engine.ray_address:
        raise ConfigError(
            f"engine.ray_address={engine.ray_address}: Ray's client mode gives workers no files; run this on a machine of the"
            " cluster (`ray start --address=HOST:PORT` adds it) and give HOST:PORT"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine=ray needs Ray: install it with pip install 'fedtune[ray]'")


@contextlib.contextmanager
def ray_grid(config: Config, run: Path, nodes: int, note: Callable[[str], None]) -> Iterator[WorkerGrid]:
    """Yield the grid of one run, with Ray running meanwhile.

    Args:
        config: The experiment.
        run: The run directory.
        nodes: Virtual clients.
        note: Called with a sentence about each lost worker.

    Raises:
        ConfigError: There is no cluster at the address, or no machine has the resources for a worker.
    """
    engine, ray = config.engine, importlib.import_module("ray")  # an optional dependency: type checkers may not find it
    ours = not ray.is_initialized()
    if ours:
        _join(ray, engine)
    try:
        if not places(ray.nodes(), engine):
            raise ConfigError(
                f"no machine of the Ray cluster has engine.ray_cpus={engine.ray_cpus} and engine.ray_gpus={engine.ray_gpus:g} for a"
                f" worker: its machines have {_resources(ray.nodes())}"
            )
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = ray.remote(_Keeper).options(num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy=here)
        kept, worker = keeper.remote(str(run), config.keep_checkpoints + 1), ray.remote(Worker)
        encoded = json.dumps(to_dict(config))

        def add_worker(there: int) -> Any | None:
            if there >= min(nodes, places(ray.nodes(), engine)):
                return None
            return worker.options(num_cpus=engine.ray_cpus, num_gpus=engine.ray_gpus).remote(encoded, nodes, KeeperProxy(ray, kept))

        yield WorkerGrid(ray, add_worker, nodes, together=engine.batched != "none", note=note)
    finally:
        if ours:
            ray.shutdown()


def places(machines: Sequence[dict[str, Any]], engine: EngineConfig) -> int:
    """Number of workers that the live machines can hold; each runs on one machine."""
    found = 0
    for machine in machines:
        has = machine["Resources"] if machine["Alive"] else {}
        fits = int(has.get("CPU", 0) // engine.ray_cpus)
        found += min(fits, int(has.get("GPU", 0) // engine.ray_gpus)) if engine.ray_gpus else fits
    return found


def _join(ray: Any, engine: EngineConfig) -> None:
    # worker processes inherit the environment, but not this process's sys.path
    environment = {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    given = {"address": engine.ray_address} if engine.ray_address else {"num_cpus": os.cpu_count() or 1, "include_dashboard": False}
    host, _, port = engine.ray_address.rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), _HEAD_S).close()  # Ray itself retries for minutes
        ray.init(**given, logging_level="error", log_to_driver=False, runtime_env={"env_vars": environment})
    except (OSError, OverflowError, RuntimeError, ValueError) as bad:
        where = f"engine.ray_address={engine.ray_address}" if engine.ray_address else "engine=ray"
        raise ConfigError(f"{where}: Ray cannot be reached ({str(bad).splitlines()[0][:200]}): see `ray status`") from None


def _resources(machines: Sequence[dict[str, Any]]) -> str:
    alive = [m["Resources"] for m in machines if m["Alive"]]
    return ", ".join(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in alive) or "none alive"


class Worker:
    """Acts for any client, in its own process.

    Args:
        config: The experiment, as JSON.
        nodes: Number of virtual clients.
        kept: Access to the clients' stored state.
    """

    def __init__(self, config: str, nodes: int, kept: "KeeperProxy") -> None:
        self._config, self._nodes, self._kept = config, nodes, kept
        self._grid: InProcessGrid | None = None

    def start(self) -> str | None:
        """Load the data and the backbone. Returns an error sentence if that fails on this machine."""
        flower.quiet()
        try:
            host = ClientHost(from_dict(parse_json(self._config)), Storage(ProxyStore(self._kept), self._kept.ledger))
            host.space  # noqa: B018  loads it
        except FedtuneError as bad:
            return f"a worker on {socket.gethostname()} cannot take part: {bad}"
        together = None
        if host.config.engine.batched != "none":
            from fedtune.simulations.engines.together import Together

            together = Together(host, host.config.engine.batched)
        self._grid = InProcessGrid(make_client_app(host), self._nodes, together)
        return None

    def answer(self, messages: Sequence[Message]) -> list[RecordDict | Error]:
        """Return a content or an error for each message."""
        assert self._grid is not None
        replies = [reply for i in self._grid.push_messages(messages) for reply in self._grid.pull_messages([i])]
        return [r.content if r.has_content() else r.error for r in replies]


class _Keeper:
    """Reads and writes the clients' stored tensors and ledgers in the run directory."""

    def __init__(self, run: str, rounds: int) -> None:
        self._store, self._ledger = ClientStore(Path(run) / "clients", rounds), ledgers_in(Path(run) / "privacy")

    def read(self, substore: str, client: str, before: int) -> AdapterState | None:
        return self._of(substore).read(client, before)

    def write(self, substore: str, client: str, round: int, state: AdapterState) -> None:
        self._of(substore).write(client, round, state)

    def spent(self, client: str) -> list[Spend]:
        return self._ledger(client).spent()

    def spend(self, client: str, round: int, cost: Spend, unit: str) -> None:
        self._ledger(client).spend(round, cost, unit)

    def _of(self, substore: str) -> ClientStore:
        return self._store.substore(substore) if substore else self._store


class KeeperProxy:
    """A worker's proxy of the keeper.

    Args:
        ray: The Ray module.
        keeper: The keeper's actor handle.
    """

    def __init__(self, ray: Any, keeper: Any) -> None:
        self._ray, self._keeper = ray, keeper

    def __reduce__(self) -> Any:
        return _kept, (self._keeper,)

    def __call__(self, name: str, *args: Any) -> Any:
        """Call a method of the keeper.

        Raises:
            CheckpointError: As on the keeper's machine.
        """
        try:
            return self._ray.get(getattr(self._keeper, name).remote(*args))
        except self._ray.exceptions.RayTaskError as bad:
            raise (bad.cause if isinstance(bad.cause, FedtuneError) else bad) from None

    def ledger(self, client: str) -> Ledger:
        """The client's privacy ledger."""
        return ProxyLedger(self, client)


def _kept(keeper: Any) -> KeeperProxy:
    return KeeperProxy(importlib.import_module("ray"), keeper)


class ProxyStore(ClientStore):
    """A client store in the run directory, accessed from a worker.

    Args:
        kept: The proxy.
        name: Name of an additional store; "" for the clients' own tensors.
    """

    def __init__(self, kept: KeeperProxy, name: str = "") -> None:
        self._kept, self._name = kept, name

    def read(self, client: str, before: int) -> AdapterState | None:
        return self._kept("read", self._name, client, before)

    def write(self, client: str, round: int, state: AdapterState) -> None:
        self._kept("write", self._name, client, round, state)

    def substore(self, name: str) -> ClientStore:
        return ProxyStore(self._kept, name)


class ProxyLedger(Ledger):
    """A ledger in the run directory, accessed from a worker."""

    def __init__(self, kept: KeeperProxy, client: str) -> None:
        self._kept, self._client = kept, client

    def spent(self) -> list[Spend]:
        return self._kept("spent", self._client)

    def spend(self, round: int, cost: Spend, unit: str) -> None:
        self._kept("spend", self._client, round, cost, unit)
