"""An unmodified SuperLink in a thread of the test process, and a link to it that can be interrupted."""

import contextlib
import selectors
import socket
import threading
import time
from pathlib import Path

import uvicorn
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app

from tests.network.waiting import wait_until

Certificates = tuple[Path, Path, Path]  # CA, server's certificate, its key


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """Flower's SuperLink on a loopback port; can be stopped and started again on the same port."""

    def __init__(self, database: str = ":flwr-in-memory:", certificates: Certificates | None = None) -> None:
        self.port, self._certificates = free_port(), certificates
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=self.port,
            insecure=certificates is None,
            certificates=None,
            superexec_auth_secret=None,
            authn_plugin=load_control_authn_plugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=certificates is not None,
            fleet_api_type="grpc-rere",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=database,
            isolation="process",
            runtime_dependency_install=False,
        )
        self.config = config
        self.empty()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def empty(self) -> None:
        """Delete all state."""
        self.app = create_app(self.config, SuperLinkLifespan)
        self.state = self.app.state.linkstate_factory.state()
        self.store = self.app.state.superlink_lifespan.objectstore_factory.store()

    def start(self) -> None:
        tls = {"ssl_certfile": self._certificates[1], "ssl_keyfile": self._certificates[2]} if self._certificates else {}
        self._uvicorn = uvicorn.Server(uvicorn.Config(self.app, "127.0.0.1", self.port, log_config=None, **tls))  # type: ignore[arg-type]
        self._uvicorn.config.timeout_graceful_shutdown = 1
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._uvicorn.started)

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()

    def allow(self, public_key: bytes) -> int:
        return self.state.create_node(NOOP_FLWR_AID, "", public_key, 0)

    def open_run(self, app: str = "fedtune/fedtune") -> int:
        run_id = self.state.create_run(app, "1.0.0", "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (run,) = self.state.get_run_info(run_ids=[run_id])
        assert self.state.claim_task(run.primary_task_id) and self.state.activate_task(run.primary_task_id)
        return run_id

    def end_run(self, run_id: int) -> None:
        assert self.state.stop_run(run_id)

    def online(self) -> list[int]:
        return [node.node_id for node in self.state.get_node_info() if node.status == "online"]

    def send(self, run_id: int, node_id: int, content: RecordDict, kind: str = "train", late: int = 0) -> str:
        """Post a message; `late` of its parts are withheld. Returns the message's id."""
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1
        message = Message(content, node_id, kind, group_id="3", ttl=600.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(run_id)
        stored, missing = self.state.store_message_and_object_tree(remove_content_from_message(message), get_object_tree(message), session)
        assert stored
        self.late = [(run_id, session, i, each.deflate()) for i, each in get_all_nested_objects(message).items() if i in missing]
        for part in self.late[late:]:
            assert self.state.store_object(*part)
        self.late = self.late[:late]
        return message.metadata.message_id

    def reply(self, run_id: int, message_id: str, seconds: float = 20.0) -> Message:
        """The complete reply to a message."""
        heads: list[Message] = []

        def came() -> bool:
            heads.extend(self.state.get_message_res({message_id}, run_id))
            return bool(heads)

        wait_until(came, seconds)
        if heads[0].has_error():
            return heads[0]
        root = heads[0].metadata.message_id
        tree = self.store.get_object_tree(root)
        ids = {each.object_id for each in iterate_object_tree(tree)}
        wait_until(lambda: all(self.store.get(i) for i in ids), seconds)
        content = inflate_object_from_contents(root, {i: self.store.get(i) for i in ids})
        assert isinstance(content, Message)
        return content


class Link:
    """A TCP proxy that can hold all data (a network loss) or close all connections and accept no new ones (a dead host)."""

    def __init__(self, port: int) -> None:
        self._target, self._held, self._pairs = port, threading.Event(), []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._held.set()

    def cut(self) -> None:
        """Close all connections and refuse new ones."""
        self._open = False
        for end in [end for pair in self._pairs for end in pair]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def mend(self) -> None:
        self._open = True
        self._held.clear()

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                if not self._open:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), 5)
                except OSError:
                    near.close()
                    continue
                self._pairs.append((near, far))
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, selectors.DefaultSelector() as ready, contextlib.suppress(OSError):
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    while self._held.is_set():
                        time.sleep(0.02)
                    if not data:
                        return
                    key.data.sendall(data)
