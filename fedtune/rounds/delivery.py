"""Delivers the run's model to the clients: writes and signs it, sends it in parts, and records what each client did with it."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.config import DeliverConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.delivery import DELIVER, END, PART_BYTES, DeliveryState, File, Manifest, signed
from fedtune.contracts.plan import PLAIN, Plan
from fedtune.errors import PlanError, RunError
from fedtune.rounds.membership import POLL_S, SMALL_REPLY_BYTES, Client, Membership, printable, push, replies
from fedtune.storage.atomic import new_file, new_folder, write_text
from fedtune.storage.parsing import read_text

_TRIES = 5  # failed messages to a client before it is given up
_PAUSE_S = 1.0  # after a failed message: the client may be starting again
_HELLO_S = 10.0  # to wait for the hello of nodes that have just connected
_END_S = 10.0  # to wait for clients to confirm the end of the run


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that is ready to be sent.

    Args:
        text: Its manifest.
        signature: Of the manifest; empty if the server does not sign.
        size: Bytes of its body.
        base: Versions of its shifts.
        body: File of its body.
    """

    text: str
    signature: bytes
    size: int
    base: tuple[int, ...]
    body: Path

    def message(self, offset: int | None) -> RecordDict:
        """The content of a message with the part of the body at `offset`; None: the manifest only."""
        content = RecordDict({"manifest": ConfigRecord({"text": self.text, "signature": self.signature})})
        if offset is not None:
            with self.body.open("rb") as file:
                file.seek(offset)
                content["part"] = ConfigRecord({"offset": offset, "data": file.read(PART_BYTES)})
        return content


@dataclass
class _Download:
    """The state of one client's download.

    Args:
        offer: What it gets.
        offset: The next part; None sends the manifest only.
        node: The node that the message in flight was sent to.
        message: Id of the message in flight; "" if there is none.
        failures: Failed messages in a row.
        not_before: When the next message may be sent, on the clock `time.monotonic`.
    """

    offer: Offer
    offset: int | None = None
    node: int = 0
    message: str = ""
    failures: int = 0
    not_before: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Delivers models in a run on a network.

    Args:
        folder: Holds the newest body and its manifest; created when needed.
        run: Name of the run.
        config: When to deliver, and how long to wait.
        sign: Signs bytes. None leaves models unsigned; only clients with --insecure install them.
        offers: Whether models are delivered at all; clients learn of the run's end in any case.
        note: Receives sentences for the operator.
    """

    folder: Path
    run: str
    config: DeliverConfig
    sign: Callable[[bytes], bytes] | None
    offers: bool
    note: Callable[[str], None]

    def is_due(self, round: int, rounds: int) -> bool:
        """Whether a model is delivered after this round of `rounds`."""
        due = self.config.at_end if round == rounds else self.config.every > 0 and round % self.config.every == 0
        return self.offers and due

    def prepare(self, round: int, adapter: AdapterState, shifts: Sequence[AdapterState]) -> Callable[[Plan], Offer]:
        """Write the body of a round's model. Returns the function that makes the offer to the clients of a plan.

        An offer that was prepared before the server was restarted keeps its serial.

        Args:
            round: The round.
            adapter: The server's adapter.
            shifts: All shifts of the frozen weights.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files, body = list[File](), self.folder / "body"
        with new_file(body) as whole, new_folder(self.folder / "files", durable=False) as parts, whole.open("wb") as out:
            for i, state in enumerate((adapter, *shifts)):
                state.save(part := parts / str(i))
                digest, size = hashlib.sha256(), 0
                with part.open("rb") as file:
                    while piece := file.read(PART_BYTES):
                        digest.update(piece)
                        size += out.write(piece)
                files.append(File(kind="shift" if i else "adapter", bytes=size, sha256=digest.hexdigest()))
                part.unlink()
        shutil.rmtree(self.folder / "files")
        base = tuple(s.spec.version for s in shifts)
        newest = Manifest(run=self.run, round=round, serial=0, backbone=adapter.spec.base, base=base, files=tuple(files), turn=PLAIN)
        newest = dataclasses.replace(newest, serial=self._serial(newest))
        write_text(self.folder / "manifest.json", newest.to_json())

        def offer(plan: Plan) -> Offer:
            text = dataclasses.replace(newest, keep=plan.keep, turn=plan.turn, params=plan.params).to_json()
            return Offer(text=text, size=newest.bytes, base=base, body=body, signature=self.sign(signed(text)) if self.sign else b"")

        return offer

    def _serial(self, manifest: Manifest) -> int:
        """The serial of this run's newest offer if it had the same content, else a larger one."""
        if not (file := self.folder / "manifest.json").is_file():
            return time.time_ns()
        try:
            last = Manifest.from_json(read_text(file))
        except (OSError, ValueError, PlanError):
            raise RunError(f"cannot read {file}: remove {self.folder}, and the server writes it again") from None
        same = dataclasses.replace(manifest, serial=last.serial) == last
        return last.serial if same else max(time.time_ns(), last.serial + 1)

    def deliver(
        self,
        round: int,
        grid: Grid,
        membership: Membership,
        offer_for: Callable[[str], Offer],
        *,
        expected: int = 0,
        patience_s: float = 0.0,
    ) -> None:
        """Send a model to all connected clients, and wait until they have installed it, have refused it, or the time is over.

        A client that returns during this time gets its model too. A client that missed its last turn gets an offer but is not waited for.

        Args:
            round: The round.
            grid: Flower's grid.
            membership: The clients.
            offer_for: Client → its offer.
            expected: Clients to wait for, also if they are not connected yet.
            patience_s: Longest wait for them, in seconds.
        """
        began, downloads, done = time.monotonic(), dict[str, _Download](), dict[str, str]()
        sent = 0
        while True:
            membership.refresh(round)
            connected = membership.connected()
            for client in connected.keys() - downloads.keys() - done.keys():
                downloads[client] = _Download(offer_for(client))
            active = {c: d for c, d in downloads.items() if c in connected and c not in done}
            sent += self._send(grid, round, {c: d for c, d in active.items() if _may_send(d, connected[c])}, connected)
            for client, download in active.items():
                if download.message and (reply := next(replies(grid, [download.message], 0.0))) is not None:
                    download.message = ""
                    if why := self._read(client, download, reply, connected[client]):
                        done[client] = why
            waiting = [c for c in active if c not in done and not connected[c].missed]
            took = time.monotonic() - began
            joining = membership.waits_for_hello and took < _HELLO_S or len(done) < expected and took < patience_s
            if not waiting and not joining or took > self.config.timeout_s:
                break
            time.sleep(POLL_S)
        self._report(round, done, membership, sent, time.monotonic() - began)

    def end(self, rounds: int, grid: Grid, membership: Membership) -> None:
        """Tell the connected clients that the run has ended, so that those started with --exit-when-done exit."""
        content = RecordDict({"end": ConfigRecord({"run": self.run, "rounds": rounds})})
        nodes = [c.node for c in membership.connected().values() if not c.missed]
        if nodes:
            ids = push(grid, [Message(content, node, END, group_id=str(rounds)) for node in nodes], lambda _: SMALL_REPLY_BYTES)
            list(replies(grid, ids, time.monotonic() + _END_S))

    def _send(self, grid: Grid, round: int, ready: Mapping[str, _Download], connected: Mapping[str, Client]) -> int:
        """Send the next message to each of these clients. Returns the bytes of their parts."""
        if not ready:
            return 0
        contents = {client: download.offer.message(download.offset) for client, download in ready.items()}
        messages = [Message(content, connected[c].node, DELIVER, group_id=str(round)) for c, content in contents.items()]
        for (client, download), message in zip(ready.items(), push(grid, messages, lambda _: SMALL_REPLY_BYTES), strict=True):
            download.node, download.message = connected[client].node, message
        parts = [c.config_records["part"]["data"] for c in contents.values() if "part" in c.config_records]
        return sum(len(part) for part in parts if isinstance(part, bytes))

    def _read(self, client: str, download: _Download, reply: Message, known: Client) -> str:
        """Read a client's reply. Returns what it has done with the model; "" if it has not finished."""
        why = ""
        if reply.has_error():
            why = printable(reply.error.reason)
        elif (declined := reply.content.config_records.get("declined")) is not None:
            if declined.get("kind") != "failed":
                return f"refused: {printable(declined.get('why', ''))}"
            why = printable(declined.get("why", ""))
        else:
            try:
                state = DeliveryState.from_content(reply.content)
            except ValueError as bad:
                return f"refused: its reply cannot be read: {bad}"
            if state.state != "wants":
                known.held = download.offer.base if known.remembers else ()
                return f"{state.state} {state.chosen}".strip()
            if state.have < download.offer.size:
                download.offset, download.failures = state.have, 0
                return ""
            why = "it asks for more bytes than the model has"
        known.held = ()  # it may have restarted and lost its shifts
        download.failures, download.offset, download.not_before = download.failures + 1, None, time.monotonic() + _PAUSE_S
        return f"failed: {why}" if download.failures >= _TRIES else ""

    def _report(self, round: int, done: Mapping[str, str], membership: Membership, sent: int, seconds: float) -> None:
        took = {c: why for c, why in done.items() if not why.startswith(("refused", "failed"))}
        kinds = {kind: sum(why == kind for why in took.values()) for kind in sorted(set(took.values()))}
        detail = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        self.note(
            f"delivered the model of round {round} to {len(took)} of {len(membership.clients)} clients in {seconds:.1f} s"
            f" ({sent / 1e6:.2f} MB sent{'; ' * bool(detail)}{detail})"
        )
        for client, why in sorted(done.items()):
            if client not in took:
                self.note(f"client {client} has not installed the model: {why.partition(': ')[2]}")
        if missing := sorted(membership.clients.keys() - done.keys()):
            shown = ", ".join(missing[:5]) + f" and {len(missing) - 5} more" * (len(missing) > 5)
            self.note(f"not delivered to {shown}: start the server again with --run {self.folder.parent} to deliver the run's model later")
        results = {c: {"round": round, "result": done.get(c, "not reached")} for c in sorted(membership.clients)}
        write_text(self.folder / "results.json", json.dumps(results, indent=1) + "\n")


def _may_send(download: _Download, client: Client) -> bool:
    if download.message and download.node != client.node:  # it returned with another node id: the message is lost
        download.message, download.offset = "", None
    return not download.message and time.monotonic() >= download.not_before
