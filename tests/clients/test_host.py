"""Each host has its own storage, device and privacy minimum; hosts in one process are independent; loading happens once, on demand."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DeviceClass, PrivacyConfig
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.wire import MessageWriter, read_message
from fedtune.privacy.floor import Floor
from fedtune.rounds.planning import base_plan
from tests.clients.test_floor import RECORD, LyingServer
from tests.tiny import tiny_config
from tests.working import host_for


@pytest.fixture(autouse=True)
def _identify() -> None:
    flower.identify_process(1)


def ask(host: ClientHost, kind: str, content: RecordDict, client: int = 0) -> Message:
    context = Context(1, 1, {"partition-id": client}, RecordDict(), {})  # type: ignore[arg-type]
    return make_client_app(host)(Message(content, 1, kind), context)


def train(host: ClientHost, config: Config, adapter: AdapterState, **changes: object) -> Message:
    plan = dataclasses.replace(base_plan(config, 1, "c0", 0), **changes)  # type: ignore[arg-type]
    return ask(host, "train", MessageWriter(1, ()).write(adapter, held=(), plan=plan))


def test_two_hosts_of_one_process_share_nothing(tmp_path: Path) -> None:
    one = tiny_config(tmp_path / "a")
    two = tiny_config(tmp_path / "b", privacy=PrivacyConfig(kind="record", epsilon=None, noise=0.8, clip=0.5, accountant="rdp"))
    hosts = [ClientHost(c, Storage.in_folder(tmp_path / name / "clients", c)) for c, name in ((one, "x"), (two, "y"))]
    first, second = (host.space.initial for host in hosts)
    alone = train(host_for(one), one, first, keep=("*.lora_B",)).content.array_records["adapter"]
    for _ in range(2):  # alternating between the hosts
        a, b = train(hosts[0], one, first, keep=("*.lora_B",)), train(hosts[1], two, second)
        assert "declined" not in a.content.config_records and "declined" not in b.content.config_records
        own = a.content.array_records["adapter"]
        assert all(own[name].data == alone[name].data for name in alone)
    assert hosts[0].space is not hosts[1].space
    assert hosts[0].storage.store.clients() == ["c0"] and hosts[1].storage.store.clients() == []
    assert hosts[0].ledger("c0").spent() == [] and len(hosts[1].ledger("c0").spent()) == 2
    assert not (tmp_path / "x" / "privacy").exists()


def test_each_host_has_its_own_floor_and_device(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    floor = Floor(kind="record", epsilon=None, delta=1e-5, client="c0", runs=tmp_path)
    device = DeviceClass(memory_mb=1000.0, gflops_per_core=1.0)
    strict = ClientHost(config, Storage.temporary(config), device, floor)
    free = ClientHost(config, Storage.temporary(config), loaded=Workspace(config))
    assert strict.devices.of("c0") is device and free.devices.of("c0") is None
    assert "declined" in train(strict, config, free.space.initial).content.config_records
    assert "declined" not in train(free, config, free.space.initial).content.config_records


def test_a_client_completes_a_message_with_the_start_it_received(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    host, plan = host_for(config), base_plan(config, 1, "c0", 0)
    drawn = host.space.initial
    start = drawn.replace({n: t + 1 for n, t in drawn.tensors.items()})
    part, writer = drawn.subset([n for n in drawn.tensors if n.endswith("lora_B")]), MessageWriter(1, (), start=start)

    def complete(content: RecordDict) -> AdapterState:
        request = read_message(content)
        host.take_start(request)
        return host.complete("c0", request)

    lost = writer.write(part, held=(), plan=plan, started=start.digest)  # the server believes that this client has the start
    answer = ask(host, "train", lost).content.config_records["declined"]
    assert answer["kind"] == "failed" and "this client lacks the adapter that the run started from: the server sends" in str(answer["why"])
    for content in (writer.write(part, held=(), plan=plan), lost):  # from now on the client has it
        whole = complete(content)
        assert all(torch.equal(t, part[n] if n in part.tensors else start[n]) for n, t in whole.tensors.items())
    assert json.loads(str(ask(host, "query", RecordDict({})).content.config_records["hello"]["json"]))["start"] == start.digest
    cold = complete(MessageWriter(1, ()).write(part, held=(), plan=plan))  # a run without a warm start, after one with it
    assert all(torch.equal(t, drawn[n]) for n, t in cold.tensors.items())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The experiments that were loaded."""
    out: list[Config] = []
    real = Workspace.__init__

    def count_loads(self: Workspace, config: Config, *more: object) -> None:
        out.append(config)
        real(self, config, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Workspace, "__init__", count_loads)
    return out


def test_a_device_loads_once_for_all_runs_of_one_experiment(tmp_path: Path, loads: list[Config]) -> None:
    server = LyingServer(tmp_path)
    loads.clear()
    for run in ("one", "two", "two"):
        assert server.hello(PrivacyConfig(), run) == ""
        assert server.train(PrivacyConfig(), keep=("*.lora_B",)) == ""
    assert len(loads) == 1
    assert {path.parent.name for path in (tmp_path / "state").glob("*/clients")} == {"one", "two"}  # and each run has its own state
    assert server.hello(RECORD) == "" and len(loads) == 2


def test_a_host_loads_once_and_only_on_use(tmp_path: Path, loads: list[Config]) -> None:
    config = tiny_config(tmp_path)
    host = host_for(config)
    app = make_client_app(host)
    assert not loads
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})  # type: ignore[arg-type]
    for _ in range(2):
        assert "hello" in app(Message(RecordDict({}), 1, "query"), context).content.config_records
    assert loads == [config] and torch.equal(*(next(iter(host.space.initial.tensors.values())) for _ in range(2)))


def test_temporary_storage_belongs_to_one_host_and_is_removed_with_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    one, two = Storage.temporary(config), Storage.temporary(config)
    assert one.store.folder != two.store.folder and one.ledgers is None
    state = host_for(config).space.initial
    one.store.write("c0", 1, state)
    folder = one.store.folder
    assert folder.is_dir()
    del one
    assert not folder.exists() and not two.store.folder.exists()
