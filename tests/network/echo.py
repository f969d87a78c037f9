"""A peer that implements Flower's Fleet API and returns every message, with certificates and keys for it."""

import datetime
import ipaddress
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf, make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def public_text(key: Key) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def private_text(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """CA, certificate for 127.0.0.1 and its key, as files."""
    ca_key, key, now = new_key(), new_key(), datetime.datetime.now(datetime.UTC)

    def certificate(name: str, subject: Key, extension: Any, critical: bool) -> bytes:
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]),
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            public_key=subject.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=1),
        )
        return builder.add_extension(extension, critical).sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    files = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    files[0].write_bytes(certificate("ca", ca_key, x509.BasicConstraints(ca=True, path_length=None), True))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    files[1].write_bytes(certificate("server", key, here, False))
    files[2].write_bytes(private_text(key))
    return files


def client(port: int, key: Key, ca: Path | None) -> FleetHttpClient:
    roots = None if ca is None else ca.read_bytes()
    return FleetHttpClient.from_server_address(f"127.0.0.1:{port}", ca is None, roots, [NodeAuthHttpInterceptor(key, key.public_key())])


class Echo(threading.Thread):
    """One node. `halt` is called between a reply's announcement and its tensors."""

    def __init__(self, port: int, key: Key | None = None, ca: Path | None = None, halt: Callable[[], object] | None = None) -> None:
        super().__init__(daemon=True)
        self.key, self.secured, self.halt = key or new_key(), key is not None, halt
        self.client = client(port, self.key, ca)
        self.node = Node()
        self._stop_it = threading.Event()

    def activate(self) -> int:
        public = public_key_to_bytes(self.key.public_key())
        if not self.secured:
            self.client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        self.node = Node(node_id=self.client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id)
        return self.node.node_id

    def __enter__(self) -> "Echo":
        self.activate()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join(30)
        self.client.close()

    def beat(self) -> bool:
        return self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30)).success

    def run(self) -> None:
        beaten = time.monotonic()
        while not self._stop_it.wait(0.03):
            try:
                if time.monotonic() - beaten > 10:
                    self.beat()
                    beaten = time.monotonic()
                answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
                if answer.messages_list:
                    self._send_back(message_from_proto(answer.messages_list[0]), answer.message_object_trees[0])
            except (httpx.HTTPError, RuntimeError):
                time.sleep(0.1)  # try again, as every node does

    def _send_back(self, message: Message, tree: Any) -> None:
        run, name = message.metadata.run_id, message.metadata.message_id
        pull = make_pull_object_fn_protobuf(self.client.PullObject, self.node, run)
        content = pull_objects([t.object_id for t in iterate_object_tree(tree)], pull)
        self.client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name))
        message = inflate_object_from_contents(name, content)  # type: ignore[assignment]
        message.metadata.__dict__["_message_id"] = name
        reply = Message(message.content, reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            bare = Message(RecordDict(), reply_to=message)
            bare.metadata.__dict__["_message_id"] = reply.metadata.message_id
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.1],
            )
            answer = self.client.PushMessages(request)
            if self.halt:
                self.halt()
            push = make_push_object_fn_protobuf(self.client.PushObject, self.node, run, answer.session_id)
            push_objects(objects, push, object_ids_to_push=set(answer.objects_to_push))


def small(value: int) -> RecordDict:
    return RecordDict({"c": ConfigRecord({"value": value})})


def large(megabytes: float) -> RecordDict:
    return RecordDict({"a": ArrayRecord({"w": Array(np.random.default_rng(0).normal(size=(int(megabytes * 125_000), 1)))})})


def round_trip(grid: Any, content: RecordDict, node: int, patience_s: float = 60.0) -> Message:
    names = list(grid.push_messages([Message(content, node, "train")]))
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        if replies := list(grid.pull_messages(names)):
            return replies[0]
        time.sleep(0.05)
    raise TimeoutError(f"no reply from node {node}")
