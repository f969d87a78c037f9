"""The listening socket of a server. This module loads no torch."""

import ipaddress
import socket

from fedtune.config.bounds import require
from fedtune.errors import NetworkError
from fedtune.inference.serve.limits import KEY_VARIABLE


def listen(host: str, port: int, *, option: str = "--host or --port") -> socket.socket:
    """Open a listening socket.

    Other arguments:
        option: The command-line option to change if the address is not available.

    Raises:
        NetworkError: The address is not available.
        ConfigError: The port is invalid.
    """
    require("port", port, ge=0, le=65535)  # 0 selects a free port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=512)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: no response waits 40 ms for an ACK
        return listener
    except (OSError, UnicodeError) as bad:
        why = getattr(bad, "strerror", None) or bad
        raise NetworkError(f"cannot listen on {host}:{port}: {why}; give another {option}") from None


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def public_warning(listener: socket.socket, *, keyed: bool, option: str = f"--api-key-file or {KEY_VARIABLE}") -> str:
    """A warning that others can reach a server that is not bound to loopback; "" if it is.

    Other arguments:
        option: How to set an API key.
    """
    if is_loopback(listener):
        return ""
    who = "anybody with an API key" if keyed else f"ANYBODY, because no API key is set ({option})"
    return (
        f"WARNING: {url(listener)} can be reached from other machines and answers {who}; "
        "prompts and answers are sent unencrypted, so put a TLS proxy in front of it"
    )
