"""The listening socket of the public port. It limits the connections of one address that have not authenticated.

Anybody can open connections, and each takes a file descriptor and a connection slot until it is closed: after a minute if the TLS
handshake is not finished. So unauthenticated connections are counted by address, before TLS. Authenticated connections are not counted:
many clients may share one address.
"""

import contextlib
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

MAX_UNAUTHENTICATED = 64  # unauthenticated connections per address

Peer = tuple[str, int]

_log = logging.getLogger("fedtune.superlink")


class Connections:
    """The connections of a port. When there are too many, the oldest unauthenticated one is closed: a client authenticates at once.

    Args:
        most: Limit of all connections.
        unauthenticated: Limit of unauthenticated connections per address.
    """

    def __init__(self, most: int, unauthenticated: int = MAX_UNAUTHENTICATED) -> None:
        self._most, self._most_per_address = most, unauthenticated
        self._authenticated: set[Peer] = set()
        self._unauthenticated: dict[Peer, tuple[str, Callable[[], None]]] = {}  # oldest first: (address, closes the connection)
        self._count: Counter[str] = Counter()
        self._logged: set[str] = set()  # addresses whose excess has been logged

    def admit(self, peer: Peer, shut_down: Callable[[], None]) -> bool:
        """Register a connection, which must be removed at its end. Returns False if the port is full."""
        address = _address(peer[0])
        if self._count[address] >= self._most_per_address:
            if address not in self._logged:
                self._logged.add(address)
                why = f"{self._most_per_address} connections without a key: each further one closes the oldest"
                _log.warning("refused", extra={"peer": peer[0], "why": why})
            self._evict(next(peer for peer, (of, _) in self._unauthenticated.items() if of == address))
        elif len(self._authenticated) + len(self._unauthenticated) >= self._most:
            if not self._unauthenticated:
                return False
            self._evict(next(iter(self._unauthenticated)))
        self._unauthenticated[peer] = address, shut_down
        self._count[address] += 1
        return True

    def authenticate(self, peer: Peer) -> None:
        """Mark a connection as authenticated."""
        if peer in self._unauthenticated:
            self._forget(peer)
            self._authenticated.add(peer)

    def remove(self, peer: Peer) -> None:
        """Forget a closed connection."""
        self._authenticated.discard(peer)
        if peer in self._unauthenticated:
            self._forget(peer)

    def _evict(self, peer: Peer) -> None:
        _, shut_down = self._unauthenticated[peer]
        self._forget(peer)
        shut_down()

    def _forget(self, peer: Peer) -> None:
        address, _ = self._unauthenticated.pop(peer)
        self._count[address] -= 1
        if not self._count[address]:
            del self._count[address]
            self._logged.discard(address)


class LimitedListener(socket.socket):
    """A listening socket that registers its connections."""

    def __init__(self, family: socket.AddressFamily, connections: Connections) -> None:
        super().__init__(family)
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the next connection.

        Raises:
            ConnectionAbortedError: The port is full; asyncio treats the connection as closed by its peer.
        """
        accepted, address = super().accept()
        peer = (str(address[0]), int(address[1]))
        connection = _Connection(accepted, self._connections, peer)
        if self._connections.admit(peer, connection.shut_down):
            return connection, address
        connection.close()
        raise ConnectionAbortedError("too many connections")


class _Connection(socket.socket):
    """A connection that is removed from its port's `Connections` when it is closed."""

    def __init__(self, accepted: socket.socket, connections: Connections, peer: Peer) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._connections, self._peer = connections, peer

    def shut_down(self) -> None:
        """Shut the connection down; its owner notices and closes it."""
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.fileno() >= 0:
            self._connections.remove(self._peer)
        super().close()


def _address(host: str) -> str:
    """The address to count by; for IPv6 the /64 network, which one household receives."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
