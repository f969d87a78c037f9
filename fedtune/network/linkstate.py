"""What the SuperLink process does to Flower's LinkState on its owner's word: who may come in, a new run, what has arrived."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
from sqlalchemy import delete, func, select, update

from fedtune.errors import NetworkError
from fedtune.network import APP, _flwr
from fedtune.network.sizes import opened_size
from fedtune.version import __version__

_log = logging.getLogger("fedtune.superlink")


def make_fab() -> _flwr.Fab:
    """An app bundle of metadata only: its components name modules that every machine has installed; it ships no code."""
    project = f"""
[project]
name = "fedtune"
version = "{__version__}"
description = "metadata only"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune.cli.flower_app:server_app"
clientapp = "fedtune.cli.flower_app:client_app"
"""
    content, _ = _flwr.build_fab_from_files({"pyproject.toml": project.encode()})
    return _flwr.Fab(hashlib.sha256(content).hexdigest(), content, {})


def read_keys(allowed: Mapping[str, str]) -> dict[bytes, str]:
    """Flower's form of each allowed public key → its client.

    Raises:
        NetworkError: A key cannot be read, is of the wrong kind, or stands for two clients.
    """
    found: dict[bytes, str] = {}
    for name, text in allowed.items():
        try:
            raw = text.strip().encode()
            key = load_pem_public_key(raw) if raw.startswith(b"-----") else load_ssh_public_key(raw)
        except (ValueError, UnsupportedAlgorithm):
            raise NetworkError(f"the public key of client '{name}' cannot be read: take the text of clients/{name}/key.pub") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _flwr.uses_nist_ec_curve(key):
            raise NetworkError(f"the public key of client '{name}' is not of a NIST curve: take the text of clients/{name}/key.pub")
        encoded = _flwr.public_key_to_bytes(key)
        if encoded in found:
            raise NetworkError(f"clients '{found[encoded]}' and '{name}' have the same public key: each needs its own")
        found[encoded] = name
    return found


class Registrar:
    """The owner's hand on the LinkState; each method answers with what JSON can carry.

    Args:
        state: Flower's LinkState.
        keys: Public key → client that may come in, which `allow` changes in place; None lets anybody register.
    """

    def __init__(self, state: _flwr.LinkState, keys: dict[bytes, str] | None) -> None:
        self._state, self._keys = state, keys
        self._redelivered: set[str] = set()  # messages that were lost on their way once, and are not answered yet

    def admit(self) -> None:
        """Register every allowed key, and forget nodes whose key is not allowed any more. Who stays keeps its node id."""
        if self._keys is None:
            return
        known = {node.public_key: node.node_id for node in self._state.get_node_info()}
        with self._state.session() as session:  # type: ignore[attr-defined]
            strangers = set(known) - set(self._keys)  # deleted, not unregistered: Flower would never take the key again
            session.execute(delete(_flwr.NodeRow).where(_flwr.NodeRow.public_key.in_(strangers)))
        for key in set(self._keys) - set(known):
            self._state.create_node(_flwr.NOOP_FLWR_AID, _flwr.NOOP_ACCOUNT_NAME, key, 0, name=self._keys[key])

    def allow(self, allowed: Mapping[str, str]) -> dict[str, Any]:
        """Let these clients in, by name and public key, and no others from now on.

        Raises:
            NetworkError: A key cannot be used, or the server asks for no keys; nothing has changed then.
        """
        keys = read_keys(allowed)
        if self._keys is None:
            raise NetworkError("this server asks for no keys: nobody can be taken off the list of those that it has not got")
        for key in set(self._keys) - set(keys):
            del self._keys[key]
        self._keys.update(keys)
        self.admit()
        return {"allowed": len(keys)}

    def open_run(self, name: str) -> dict[str, Any]:
        """End all older runs with what they left in the database, and start a new one whose ServerApp is the caller."""
        state = self._state
        for run in state.get_run_info():
            if not state.stop_run(run.run_id):
                state.cleanup_run(run.run_id)
        fab = make_fab()
        state.store_fab(fab)
        run_id = state.create_run(
            APP,
            __version__,
            fab.hash_str,
            {},
            _flwr.NOOP_FEDERATION_ID,
            None,
            _flwr.NOOP_FLWR_AID,
            _flwr.TaskType.SERVER_APP,
            series_description=name,
        )
        runs = state.get_run_info(run_ids=[run_id])
        task_id = (runs[0].primary_task_id if runs else None) or 0
        token = state.claim_task(task_id)
        if token is None or not state.activate_task(task_id):
            raise NetworkError("the SuperLink cannot start a run: see its log")
        return {"run_id": run_id, "token": token}

    def takeover(self, key: bytes) -> None:
        """Make room for a node that comes again while its former life still counts as present: it crashed, and was started again.

        Flower would refuse it until the lease of its former life ends (two heartbeats), and would wait for ever for the replies that died
        with that life, or for minutes for one that it was sending. So the lease ends here, and messages that it took and did not answer to
        the end are deleted: the server is then told that their replies will never come.
        """
        node_id = self._state.get_node_id_by_public_key(key)
        if node_id is None or not self._state.deactivate_node(node_id):
            return
        lost = self._unanswered(node_id)
        self._state.delete_messages(lost)
        _log.info(
            "a node takes over from its former life", extra={"node": node_id, "client": (self._keys or {}).get(key, ""), "lost": len(lost)}
        )

    def idle(self, key: bytes) -> None:
        """Find what was lost on its way to or in a node that asks for its next message, which it does when it holds none.

        A message of which every part is still here never reached it: the answer that brought it was lost. It is delivered once more. Any
        other will not be answered: it is deleted, so that the server hears of it now and not at the end of the round.
        """
        node_id = self._state.get_node_id_by_public_key(key)
        if node_id is None or not (lost := self._unanswered(node_id)):
            return
        again = {m for m in lost - self._announced(lost) - self._redelivered if self._state.object_store.get(m) is not None}
        with self._state.session() as session:  # type: ignore[attr-defined]
            session.execute(update(_flwr.MessageIns).where(_flwr.MessageIns.message_id.in_(again)).values(delivered_at=""))
        self._redelivered = {m for m in self._redelivered if m in lost} | again
        self._state.delete_messages(lost - again)
        about = {"node": node_id, "client": (self._keys or {}).get(key, "")}
        _log.info("a node has lost messages", extra={**about, "again": len(again), "lost": len(lost - again)})

    def _unanswered(self, node_id: int) -> set[str]:
        """Messages that a node took and did not answer to the end."""
        message = _flwr.MessageIns
        answered = _uploads(_flwr.MessageRes.reply_to_message_id).where(func.coalesce(_flwr.ObjectPushSession.pending_count, 0) == 0)
        taken = select(message.message_id).where(
            message.dst_node_id == _flwr.uint64_to_int64(node_id),
            message.delivered_at != "",
            message.message_id.not_in(answered),
        )
        with self._state.session() as session:  # type: ignore[attr-defined]
            return {str(name) for name in session.scalars(taken)}

    def _announced(self, messages: set[str]) -> set[str]:
        """Those of the messages of which a reply has begun to come."""
        reply = _flwr.MessageRes.reply_to_message_id
        with self._state.session() as session:  # type: ignore[attr-defined]
            return {str(name) for name in session.scalars(select(reply).where(reply.in_(messages)))}

    def arrived(self, ids: list[str], most: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Sort messages by what became of their replies.

        A reply that is larger than `most` says of its message is forgotten, with its tensors: it is `large`, with its size. Of a
        message that is `lost` there is no reply, and its node is gone or the message is.

        Flower hands a reply out as soon as it is announced, and then waits for its tensors, for minutes where its sender died: so a reply
        that is still being uploaded is `uploading`, and nobody should pull it yet. It is `complete` once all is there. Of others there is
        no reply, nor will there be one where a sender's lease has ended meanwhile: Flower says so to whoever pulls.
        """
        reply, node = _flwr.MessageRes, _flwr.NodeRow
        asked = (
            _uploads(reply.reply_to_message_id, _flwr.ObjectPushSession.pending_count, node.online_until)
            .outerjoin(node, node.node_id == reply.src_node_id)
            .where(reply.reply_to_message_id.in_(ids))
        )
        with self._state.session() as session:  # type: ignore[attr-defined]
            rows = [(str(message), pending or 0, until or 0.0) for message, pending, until in session.execute(asked)]
        now = _flwr.now().timestamp()
        complete, large = [m for m, n, _ in rows if n == 0], self._too_large([m for m, n, _ in rows if n == 0], most or {})
        uploading = [m for m, n, until in rows if n and until > now]
        silent = [m for m in ids if m not in {*complete, *uploading}]
        return {
            "complete": [m for m in complete if m not in large],
            "uploading": uploading,
            "large": large,
            "lost": self._lost(silent, now),
        }

    def _lost(self, silent: list[str], now: float) -> list[str]:
        message, node = _flwr.MessageIns, _flwr.NodeRow
        hoped = (
            select(message.message_id)
            .join(node, node.node_id == message.dst_node_id)
            .where(message.message_id.in_(silent), message.created_at + message.ttl > now, node.online_until >= now)
        )
        with self._state.session() as session:  # type: ignore[attr-defined]
            waiting = {str(name) for name in session.scalars(hoped)}
        return [m for m in silent if m not in waiting]

    def _too_large(self, complete: list[str], most: Mapping[str, int]) -> dict[str, int]:
        reply, found, forgotten = _flwr.MessageRes, dict[str, int](), list[str]()
        asked = select(reply.reply_to_message_id, reply.message_id).where(reply.reply_to_message_id.in_([m for m in complete if m in most]))
        with self._state.session() as session:  # type: ignore[attr-defined]
            for message, name in [(str(m), str(n)) for m, n in session.execute(asked)]:
                if (size := opened_size(session, name, most[message])) > most[message]:
                    found[message] = size
                    forgotten.append(name)
        self._state.delete_messages(set(found))
        for name in forgotten:
            self._state.object_store.delete(name)
        return found

    def nodes(self) -> dict[str, Any]:
        """Every node that ever came, and the allowed ones that never did (last_seen 0)."""
        names = self._keys or {}
        return {
            "nodes": [
                {
                    "node_id": node.node_id,
                    "name": names.get(node.public_key, ""),
                    "online": node.status == _flwr.NodeStatus.ONLINE,
                    "last_seen": max(0.0, node.online_until - _flwr.HEARTBEAT_PATIENCE * node.heartbeat_interval),
                }
                for node in self._state.get_node_info()
                if node.status != _flwr.NodeStatus.UNREGISTERED
            ]
        }


def _uploads(*what: Any) -> Any:
    """A query over replies, each with its upload where that is not over; of one that has expired Flower makes an error by itself."""
    reply, root, push = _flwr.MessageRes, _flwr.ObjectPushSessionRoot, _flwr.ObjectPushSession
    return (
        select(*what)
        .select_from(reply)
        .outerjoin(root, root.root_object_id == reply.message_id)
        .outerjoin(push, (push.session_id == root.session_id) & (push.expires_at > _flwr.now()))
    )
