"""The owner's requests to Flower's LinkState in the SuperLink process: allowed clients, new runs, arrived replies."""

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
from fedtune.network.sizes import inflated_size
from fedtune.version import __version__

_log = logging.getLogger("fedtune.superlink")


def make_fab() -> _flwr.Fab:
    """Build an app bundle of metadata only: it names modules that are installed on every machine, and ships no code."""
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
    """Convert allowed keys (client → text) to Flower's format (encoded key → client).

    Raises:
        NetworkError: A key cannot be parsed, is of the wrong kind, or belongs to two clients.
    """
    found: dict[bytes, str] = {}
    for name, text in allowed.items():
        try:
            raw = text.strip().encode()
            key = load_pem_public_key(raw) if raw.startswith(b"-----") else load_ssh_public_key(raw)
        except (ValueError, UnsupportedAlgorithm):
            raise NetworkError(f"the public key of client '{name}' cannot be read: use the text of clients/{name}/key.pub") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _flwr.uses_nist_ec_curve(key):
            raise NetworkError(f"the public key of client '{name}' is not on a NIST curve: use the text of clients/{name}/key.pub")
        encoded = _flwr.public_key_to_bytes(key)
        if encoded in found:
            raise NetworkError(f"clients '{found[encoded]}' and '{name}' have the same public key: each needs its own")
        found[encoded] = name
    return found


class Registrar:
    """Changes and queries of the LinkState for its owner; results are plain JSON.

    Args:
        state: Flower's LinkState.
        keys: Public key → allowed client; `allow` changes it in place. None lets anybody register.
    """

    def __init__(self, state: _flwr.LinkState, keys: dict[bytes, str] | None) -> None:
        self._state, self._keys = state, keys
        self._redelivered: set[str] = set()  # unanswered messages that were lost once and delivered again

    def sync_nodes(self) -> None:
        """Register every allowed key, and delete nodes whose key is no longer allowed. The others keep their node ids."""
        if self._keys is None:
            return
        known = {node.public_key: node.node_id for node in self._state.get_node_info()}
        with self._state.session() as session:  # type: ignore[attr-defined]
            strangers = set(known) - set(self._keys)  # deleted, not unregistered: Flower never registers an unregistered key again
            session.execute(delete(_flwr.NodeRow).where(_flwr.NodeRow.public_key.in_(strangers)))
        for key in set(self._keys) - set(known):
            self._state.create_node(_flwr.NOOP_FLWR_AID, _flwr.NOOP_ACCOUNT_NAME, key, 0, name=self._keys[key])

    def allow(self, allowed: Mapping[str, str]) -> dict[str, Any]:
        """Replace the allowed clients (name → public key).

        Raises:
            NetworkError: A key is invalid, or the server uses no keys; nothing has changed.
        """
        keys = read_keys(allowed)
        if self._keys is None:
            raise NetworkError("this server runs without node keys, so it has no list of allowed clients")
        for key in set(self._keys) - set(keys):
            del self._keys[key]
        self._keys.update(keys)
        self.sync_nodes()
        return {"allowed": len(keys)}

    def open_run(self, name: str) -> dict[str, Any]:
        """End all older runs, delete their data, and start a new run whose ServerApp is the caller."""
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

    def take_over(self, key: bytes) -> None:
        """Deactivate the previous process of a node that was restarted after a crash.

        Flower would refuse the new process until the lease of the previous one ends (two heartbeats), and would wait forever for the lost
        replies, or minutes for a partial one. So the lease ends here, and messages that the node received and did not fully answer are
        deleted: Flower then reports to the server that they will not be answered.
        """
        node_id = self._state.get_node_id_by_public_key(key)
        if node_id is None or not self._state.deactivate_node(node_id):
            return
        lost = self._unanswered(node_id)
        self._state.delete_messages(lost)
        _log.info("a restarted node takes over", extra={"node": node_id, "client": (self._keys or {}).get(key, ""), "lost": len(lost)})

    def redeliver_lost(self, key: bytes) -> None:
        """Find the lost messages of a node that polls; a node polls only when it holds no message.

        A message whose objects are all still stored never reached the node: the response was lost. It is delivered once more. Any other
        message will not be answered: it is deleted, so that the server learns of it now and not at the end of the round.
        """
        node_id = self._state.get_node_id_by_public_key(key)
        if node_id is None or not (lost := self._unanswered(node_id)):
            return
        again = {m for m in lost - self._with_announced_reply(lost) - self._redelivered if self._state.object_store.get(m) is not None}
        with self._state.session() as session:  # type: ignore[attr-defined]
            session.execute(update(_flwr.MessageIns).where(_flwr.MessageIns.message_id.in_(again)).values(delivered_at=""))
        self._redelivered = {m for m in self._redelivered if m in lost} | again
        self._state.delete_messages(lost - again)
        about = {"node": node_id, "client": (self._keys or {}).get(key, "")}
        _log.info("a node has lost messages", extra={**about, "again": len(again), "lost": len(lost - again)})

    def _unanswered(self, node_id: int) -> set[str]:
        """Messages that a node received and did not fully answer."""
        message = _flwr.MessageIns
        answered = _uploads(_flwr.MessageRes.reply_to_message_id).where(func.coalesce(_flwr.ObjectPushSession.pending_count, 0) == 0)
        taken = select(message.message_id).where(
            message.dst_node_id == _flwr.uint64_to_int64(node_id),
            message.delivered_at != "",
            message.message_id.not_in(answered),
        )
        with self._state.session() as session:  # type: ignore[attr-defined]
            return {str(name) for name in session.scalars(taken)}

    def _with_announced_reply(self, messages: set[str]) -> set[str]:
        """Messages whose reply has been announced."""
        reply = _flwr.MessageRes.reply_to_message_id
        with self._state.session() as session:  # type: ignore[attr-defined]
            return {str(name) for name in session.scalars(select(reply).where(reply.in_(messages)))}

    def reply_states(self, ids: list[str], most: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Classify messages by the state of their replies.

        `large`: the reply is larger than its limit in `most`; it is deleted, and its size is returned.
        `lost`: there is no reply, and the node or the message is gone. A pull returns Flower's error.
        `uploading`: the reply is announced but not complete. Flower would hand it out and block, for minutes if its sender died, so it
        must not be pulled yet. If the sender's lease has ended, the reply is not listed.
        `complete`: all objects of the reply are stored.
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
                if (size := inflated_size(session, name, most[message])) > most[message]:
                    found[message] = size
                    forgotten.append(name)
        self._state.delete_messages(set(found))
        for name in forgotten:
            self._state.object_store.delete(name)
        return found

    def nodes(self) -> dict[str, Any]:
        """All nodes that ever connected, and the allowed ones that never did (last_seen 0)."""
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
    """A query over replies, joined with their unfinished uploads; Flower itself reports expired ones as errors."""
    reply, root, push = _flwr.MessageRes, _flwr.ObjectPushSessionRoot, _flwr.ObjectPushSession
    return (
        select(*what)
        .select_from(reply)
        .outerjoin(root, root.root_object_id == reply.message_id)
        .outerjoin(push, (push.session_id == root.session_id) & (push.expires_at > _flwr.now()))
    )
