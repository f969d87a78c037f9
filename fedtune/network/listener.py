"""The listening socket of the public port, which an address cannot fill with connections that show no key.

Anybody can open connections, and each takes a file descriptor and one of the port's places until it is given up: a minute where the TLS
handshake is not finished. So connections without a key are counted by address, before TLS. One that has shown a key counts no more: many
clients may come from one address.
"""

import contextlib
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

STRANGERS = 64  # connections of one address that have not shown a key

Peer = tuple[str, int]

_log = logging.getLogger("fedtune.superlink")


class Guests:
    """The connections of a port. Where there are too many, the oldest one without a key is hung up: a client shows its key at once.

    Args:
        most: Of all addresses.
        strangers: Of one address, without a key.
    """

    def __init__(self, most: int, strangers: int = STRANGERS) -> None:
        self._most, self._few = most, strangers
        self._known: set[Peer] = set()
        self._strangers: dict[Peer, tuple[str, Callable[[], None]]] = {}  # the oldest first: address, and what ends the connection
        self._count: Counter[str] = Counter()
        self._named: set[str] = set()  # addresses of which the log has said that they come too often

    def come(self, peer: Peer, hang_up: Callable[[], None]) -> bool:
        """Take a connection in, which must `leave`; False where there is no room."""
        address = _address(peer[0])
        if self._count[address] >= self._few:
            if address not in self._named:
                self._named.add(address)
                why = f"it has {self._few} connections without a key: from now on a new one ends the oldest of them"
                _log.warning("refused", extra={"peer": peer[0], "why": why})
            self._end(next(peer for peer, (of, _) in self._strangers.items() if of == address))
        elif len(self._known) + len(self._strangers) >= self._most:
            if not self._strangers:
                return False
            self._end(next(iter(self._strangers)))
        self._strangers[peer] = address, hang_up
        self._count[address] += 1
        return True

    def welcome(self, peer: Peer) -> None:
        """A connection has shown a key."""
        if peer in self._strangers:
            self._forget(peer)
            self._known.add(peer)

    def leave(self, peer: Peer) -> None:
        """A connection is closed."""
        self._known.discard(peer)
        if peer in self._strangers:
            self._forget(peer)

    def _end(self, peer: Peer) -> None:
        _, hang_up = self._strangers[peer]
        self._forget(peer)
        hang_up()

    def _forget(self, peer: Peer) -> None:
        address, _ = self._strangers.pop(peer)
        self._count[address] -= 1
        if not self._count[address]:
            del self._count[address]
            self._named.discard(address)


class Door(socket.socket):
    """A listening socket whose connections are guests."""

    def __init__(self, family: socket.AddressFamily, guests: Guests) -> None:
        super().__init__(family)
        self._guests = guests

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection for which there is room.

        Raises:
            ConnectionAbortedError: There is none for this one; asyncio takes it for one that has gone again.
        """
        accepted, address = super().accept()
        peer = (str(address[0]), int(address[1]))
        guest = _Connection(accepted, self._guests, peer)
        if self._guests.come(peer, guest.hang_up):
            return guest, address
        guest.close()
        raise ConnectionAbortedError("too many connections")


class _Connection(socket.socket):
    """A connection that says when it is closed."""

    def __init__(self, accepted: socket.socket, guests: Guests, peer: Peer) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._guests, self._peer = guests, peer

    def hang_up(self) -> None:
        """End the connection for its owner, who sees it end and closes it."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._guests.leave(self._peer)
        super().close()


def _address(host: str) -> str:
    """What counts as one address: of IPv6 the network that one household gets."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
