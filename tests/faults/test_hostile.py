"""A real server refuses unknown and impersonating clients and false updates by name, without an effect on three honest clients.

tests/network/test_public_port.py tests the public port alone, tests/network/test_node.py a hostile server.
"""

import json
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata
from flwr.proto.node_pb2 import Node as NodeProto

from fedtune.network.keys import make_keys
from tests.faults.campaign import CLIENTS, Campaign, Cell, kill_at_end
from tests.faults.deployment import STORIES, Deployment, settings, write_rows
from tests.faults.forking import in_own_process
from tests.faults.replay import BOUND, counted_clients, differences, replay
from tests.network.echo import Echo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare"),
]
WAIT_S = 600.0
LIES = ("nan", "shape", "huge", "stale", "other", "weight")


@in_own_process
def test_lies_of_a_real_client_are_refused_by_name(tmp_path: Path) -> None:
    """An update that is not finite, too large, or has another shape, round, name or weight."""
    with kill_at_end(Campaign(tmp_path, [Cell("lie", kind) for kind in LIES])) as campaign:
        outcomes = campaign.run()
    assert len(outcomes) == len(LIES) and all(o.good for o in outcomes), outcomes
    words = [
        "not finite",
        "wanted float32",
        "it was not trained with this plan",
        "stale or belongs to another client",
        "wanted carla",
        "but the client's hello reported",
    ]
    for out, sentence in zip(outcomes, words, strict=True):
        assert any("carla refused: " in w and sentence in w for w in out.words), out


@in_own_process
def test_strangers_and_impostors_are_refused_by_name_and_nobody_else_notices(tmp_path: Path) -> None:
    others = ("mallory", "moll")  # their keys are allowed, but not their requests
    write_rows(tmp_path / "rows", [*CLIENTS, *others])
    experiment = settings(tmp_path / "rows", CLIENTS, "round_timeout_s=600")
    points = tmp_path / "points"
    points.mkdir()
    (points / "server.idle").touch()
    deployment = Deployment(tmp_path, [*CLIENTS, *others], experiment)
    try:
        deployment.start_server("--wait", f"{WAIT_S:g}", launcher=["-m", "tests.faults.launch", "server", str(points), "server"])
        deployment.start_client("mallory", "--client-id", "anna")  # before the honest clients
        for name in CLIENTS:
            deployment.start_client(name)
        deployment.until("hello", count=3, timeout=WAIT_S)
        wait_for((points / "server.idle.held").exists)
        refused = intrude(deployment, tmp_path)
        (points / "server.idle.held").unlink()
        assert deployment.finish(WAIT_S) == 0, deployment.output("server")
    finally:
        deployment.stop()
    turnout = counted_clients(deployment.run)
    assert [turnout[r] for r in (1, 2, 3)] == [set(CLIENTS)] * 3
    for name in (*others, "dora"):  # in the simulation each file would be a client
        (tmp_path / "rows" / f"{name}.jsonl").unlink()
    assert max(differences(deployment.run, replay(tmp_path, experiment, turnout)).values()) <= BOUND
    log = (deployment.run / "logs/server.jsonl").read_text()
    assert "has the key of 'mallory' but the id 'anna'" in log
    seen = [json.loads(line) for line in (deployment.run / "logs/superlink.jsonl").read_text().splitlines()]
    assert set(refused) <= {str(line.get("why")) for line in seen}
    for who in ("server", *CLIENTS, "mallory", "dora"):
        assert "Traceback" not in deployment.output(who)


def intrude(deployment: Deployment, folder: Path) -> list[str]:
    """Try all forbidden requests. Returns the reasons that the SuperLink's log must have."""
    trust, at = ssl.create_default_context(cafile=str(deployment.keys / "ca.pem")), f"127.0.0.1:{deployment.port}"
    with httpx.Client(base_url=f"https://{at}", verify=trust, timeout=20) as nobody:
        assert nobody.post("/v1/fleet/pull-messages", content=b"").status_code == 401
        for path in ("/v1/control/list-runs", "/v1/runtime/push-messages", "/docs", "/openapi.json", "/v1/fleet/../control/start-run"):
            assert nobody.post(path).status_code == 404
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{at}/health", timeout=20)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"https://{at}/health", timeout=20)  # the system's CAs did not sign the certificate

    make_keys(folder / "elsewhere", ["127.0.0.1"], ["dora"])
    key = folder / "elsewhere/clients/dora/key"
    deployment.names.append("dora")
    (deployment.keys / "clients/dora").mkdir(mode=0o700)
    for name, source in (("key", key), ("ca.pem", deployment.keys / "ca.pem")):
        (deployment.keys / "clients/dora" / name).write_bytes(source.read_bytes())
    (deployment.keys / "clients/dora/key").chmod(0o600)
    (deployment.rows / "dora.jsonl").write_text('{"text": "a"}\n')
    dora = deployment.start_client("dora", "--max-retries", "1")
    assert dora.wait(WAIT_S) == 2
    assert "does not know the key" in deployment.output("dora").splitlines()[-1]

    private = load_ssh_private_key((deployment.keys / "clients/moll/key").read_bytes(), None)
    moll = Echo(deployment.port, private, deployment.keys / "ca.pem")  # type: ignore[arg-type]
    mine, anna = moll.activate(), node_of(deployment, "anna")
    assert refusal(lambda: moll.client.PullMessages(PullMessagesRequest(node=NodeProto(node_id=anna)))) in (401, 403)
    head = Metadata(run_id=1, src_node_id=anna, dst_node_id=1, reply_to_message_id="m", message_type="train", ttl=60.0)
    forged = PushMessagesRequest(node=NodeProto(node_id=mine), messages_list=[MessageProto(metadata=head)])
    assert refusal(lambda: moll.client.PushMessages(forged)) == 403
    moll.client.close()
    return ["no node key", "no such path", "a node key that is not allowed", f"node {mine} pushes a message of node {anna}"]


def node_of(deployment: Deployment, client: str) -> int:
    lines = map(json.loads, (deployment.run / "logs/server.jsonl").read_text().splitlines())
    return next(int(line["node"]) for line in lines if line["event"] == "hello" and line["client"] == client)


def refusal(call: Callable[[], object]) -> int:
    with pytest.raises(httpx.HTTPStatusError) as error:
        call()
    return error.value.response.status_code


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
