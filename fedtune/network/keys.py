"""`fedtune keys`: the certificates and node keys of a deployment, and the checks that the doors make of such files.

    DIR/ca.pem  server.pem  server.key      what clients trust, and what the server proves itself with (TLS)
    DIR/ca.key                              what signs the next server.pem; it never goes to the server
    DIR/allowed.json                        client name → its public key: who may take part
    DIR/clients/NAME/{key, key.pub, ca.pem} what a client proves itself with (Flower's node authentication)

Node keys are on the curve P-256, in OpenSSH's form, which is the one form of a private key that Flower's SuperNode reads. Whoever has the
key of the CA can make a second server that the clients trust: DIR stays with the operator, and ca.key may be kept apart from it.
"""

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import ConfigError
from fedtune.network.certificates import make_ca, names_of, sign_server, subject_names
from fedtune.storage.atomic import new_folder, write_bytes
from fedtune.storage.parsing import content_of, parse_json, read_text

DAYS = 3650  # a client trusts this one CA: the day it ends, every device needs a visit
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PEM = serialization.Encoding.PEM


def make_keys(out: Path, hosts: Sequence[str], clients: Sequence[str], *, days: int = DAYS) -> str:
    """Make the folder `out` with everything that a deployment needs, whole or not at all.

    Args:
        out: Folder to make; there is none yet, or it is empty.
        hosts: Names and IP addresses that clients reach the server by; localhost is always among them.
        clients: Name of each client.
        days: How long the server's certificate is good; the CA's is for as long, and for `DAYS` at least.

    Returns:
        What to copy where, and how to start both sides.

    Raises:
        ConfigError: A name cannot be used, or `out` holds something or cannot be written.
    """
    names = subject_names(hosts)
    _check_clients(clients)
    _check_days(days)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and keys are never overwritten: give another --out, or add a client with --add NAME")
    authority, ca_key = make_ca(max(days, DAYS))
    certificate, key = sign_server(authority, ca_key, names, days)
    ca = authority.public_bytes(_PEM)
    with _key_folder(out) as folder:
        write_bytes(folder / "ca.pem", ca, mode=0o644)
        write_bytes(folder / "ca.key", _private(ca_key), mode=0o600)
        write_bytes(folder / "server.pem", certificate.public_bytes(_PEM), mode=0o644)
        write_bytes(folder / "server.key", _private(key), mode=0o600)
        (folder / "clients").mkdir(mode=0o700)
        allowed = {name: _make_client(folder / "clients" / name, name, ca) for name in clients}
        write_bytes(folder / "allowed.json", _as_json(allowed), mode=0o644)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    return _what_next(out, hosts[0], list(clients), f"Keys for {len(clients)} clients in {out}; the server's certificate ends on {until}.")


def add_clients(out: Path, clients: Sequence[str]) -> str:
    """Make key pairs for further clients in a folder that `make_keys` made; nothing that is there changes but the list of the allowed.

    Returns:
        What to copy where.

    Raises:
        ConfigError: No such folder, or a name that cannot be used or is taken.
    """
    _check_clients(clients)
    with _changing(out) as (ca, allowed):
        for name in clients:
            if name in allowed:
                raise ConfigError(f"client {name} has a key already, and keys are never overwritten: take another name, or --rotate {name}")
            if (out / "clients" / name).exists():
                raise ConfigError(f"{out / 'clients' / name} is there but {name} is not allowed: remove that folder, or take another name")
        for name in clients:
            with _key_folder(out / "clients" / name) as folder:
                allowed[name] = _fill_client(folder, name, ca)
    return _what_next(out, "HOST", list(clients), f"Keys for {len(clients)} more clients in {out}.", changed=True)


def rotate_clients(out: Path, clients: Sequence[str]) -> str:
    """Make new key pairs for clients whose old ones are lost, known to others, or old; the old ones count no more.

    Returns:
        What to copy where.

    Raises:
        ConfigError: No such folder, or a client that has no key there.
    """
    _check_clients(clients)
    with _changing(out) as (ca, allowed):
        _check_known(clients, allowed, f"make it one with --add {clients[0]}")
        for name in clients:
            with _key_folder(out / "clients" / name, replace=True) as folder:
                allowed[name] = _fill_client(folder, name, ca)
    return _what_next(
        out, "HOST", list(clients), f"New keys for {len(clients)} clients in {out}; their old ones are refused.", changed=True
    )


def remove_clients(out: Path, clients: Sequence[str]) -> str:
    """Take clients off the list of those that may take part, and delete what is there of their keys.

    Returns:
        What to copy where.

    Raises:
        ConfigError: No such folder, a client that has no key there, or nobody would be left.
    """
    _check_clients(clients)
    with _changing(out) as (_, allowed):
        _check_known(clients, allowed, f"{out / 'allowed.json'} names those that do")
        if not set(allowed) - set(clients):
            raise ConfigError("nobody would be left, and a server with an empty list does not start: add a client first, with --add NAME")
        for name in clients:
            del allowed[name]
    for name in clients:
        shutil.rmtree(out / "clients" / name, ignore_errors=True)
    return f"{len(clients)} clients may not take part any more.\n\n{_to_server(out)}"


def renew_server(out: Path, hosts: Sequence[str], *, days: int = DAYS, ca_key: Path | None = None) -> str:
    """Make a new certificate and key of the server, which all clients trust as they are.

    Args:
        out: Folder that `make_keys` made.
        hosts: Names and IP addresses that clients reach the server by; none takes those of the present certificate.
        days: How long the certificate is good, at most as long as the CA's.
        ca_key: Where the CA's key is; None takes the one in `out`.

    Returns:
        What to copy where.

    Raises:
        ConfigError: No such folder, or the CA's key is not there or another CA's.
    """
    _check_days(days)
    signer = ca_key or out / "ca.key"
    with _changing(out) as (ca, _):
        authority = x509.load_pem_x509_certificate(ca)
        if not signer.exists():
            raise ConfigError(f"there is no {signer}: give the CA's key with --ca-key FILE; a folder made without one needs a new --out")
        check_private(signer)
        private = serialization.load_pem_private_key(signer.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != authority.public_key():
            raise ConfigError(f"{signer} is not the key of {out / 'ca.pem'}: give the one that was made with it, with --ca-key FILE")
        names = subject_names(hosts) if hosts else names_of(x509.load_pem_x509_certificate((out / "server.pem").read_bytes()))
        certificate, key = sign_server(authority, private, names, days)
        write_bytes(out / "server.key", _private(key), mode=0o600)
        write_bytes(out / "server.pem", certificate.public_bytes(_PEM), mode=0o644)
    head = f"A new certificate of the server, which ends on {certificate.not_valid_after_utc:%Y-%m-%d}."
    then = "  then restart it; clients come back by themselves, with the ca.pem that they have"
    return f"{head}\n\nTo the server, from {out}: server.pem server.key\n{then}"


# -- what the doors check -----------------------------------------------------------------------------------------------------------------


def read_allowed(path: Path) -> dict[str, str]:
    """The clients that may take part: name → public key in OpenSSH's text form, as `allowed.json` holds them.

    Raises:
        ConfigError: The file cannot be read, or a name or a key in it cannot be used.
    """
    try:
        found = parse_json(read_text(path), object_pairs_hook=_unique)
    except OSError as bad:
        raise ConfigError(f"cannot read the list of allowed clients {path}: {bad.strerror}; `fedtune keys` makes one") from None
    except ValueError as bad:
        raise ConfigError(f"the list of allowed clients {path} is not JSON of names and public keys: {str(bad)[:80]}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"the list of allowed clients {path} names nobody: it maps each client's name to its public key")
    owner: dict[bytes, str] = {}
    for name, text in found.items():
        _check_clients([name])
        public = _public_key(text, f"{path}: the key of client {name}")
        point = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        if (other := owner.setdefault(point, name)) != name:
            raise ConfigError(f"{path}: {name} and {other} have the same key, so nobody could tell them apart: give each its own")
    return found


def check_private(path: Path) -> None:
    """Whether a private key (PEM or OpenSSH) is there, can be used, and is nobody else's to read.

    Raises:
        ConfigError: It is not.
    """
    try:
        found = path.stat()
        data = content_of(path)
    except OSError as bad:
        raise ConfigError(f"cannot read the private key {path}: {bad.strerror}") from None
    shut = stat.S_IRWXG | stat.S_IRWXO
    if found.st_uid == 0 and os.geteuid() != 0:
        shut &= ~stat.S_IRGRP  # systemd and Docker hand root's files to a service through its group
    if (mode := found.st_mode) & shut:
        raise ConfigError(f"the private key {path} is open to others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
    load = serialization.load_ssh_private_key if data.startswith(b"-----BEGIN OPENSSH") else serialization.load_pem_private_key
    try:
        load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password; none of them says what the key is
        raise ConfigError(
            f"{path} is not a private key without a password (PEM or OpenSSH): take the file that `fedtune keys` made"
        ) from None


def _public_key(text: object, where: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(str(text).encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{where} is not an ECDSA public key: take the text of clients/NAME/key.pub")
    return key


# -- making them --------------------------------------------------------------------------------------------------------------------------


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _make_client(folder: Path, name: str, ca: bytes) -> str:
    folder.mkdir(mode=0o700)
    return _fill_client(folder, name, ca)


def _fill_client(folder: Path, name: str, ca: bytes) -> str:
    """Write a new key pair into a client's folder; returns the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode() + f" {name}"
    write_bytes(folder / "key", private, mode=0o600)
    write_bytes(folder / "key.pub", f"{public}\n".encode(), mode=0o644)
    write_bytes(folder / "ca.pem", ca, mode=0o644)
    return public


def _check_clients(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("no client is named: give --clients NAME NAME ...")
    for i, name in enumerate(names):
        if not _CLIENT.fullmatch(name):
            raise ConfigError(f"'{name[:80]}' cannot name a client: letters, digits, '.', '_' and '-', a letter or digit first, 64 at most")
        if name in names[:i]:
            raise ConfigError(f"client {name} is named twice: each client needs a name of its own")


def _check_known(names: Sequence[str], allowed: dict[str, str], otherwise: str) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise ConfigError(f"client {unknown[0]} has no key here: {otherwise}")


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise ConfigError(f"--days {days} is out of bounds: certificates are good for 1 to 36500 days")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) < len(pairs):  # JSON would keep the last one and say nothing
        raise ValueError("a client is named twice")
    return found


def _as_json(allowed: dict[str, str]) -> bytes:
    return (json.dumps(allowed, indent=1, sort_keys=True) + "\n").encode()


# -- on disk ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _changing(out: Path) -> Iterator[tuple[bytes, dict[str, str]]]:
    """The CA's certificate and the list of the allowed of a folder, which is written back where it was changed; one at a time.

    Raises:
        ConfigError: No such folder, or it cannot be written.
    """
    try:
        ca = (out / "ca.pem").read_bytes()
        handle = os.open(out, os.O_RDONLY)
    except OSError as bad:
        raise ConfigError(f"{out} is no folder of fedtune keys ({bad.strerror}): make one with --server-name and --clients") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of two changes at once one would be lost
        allowed = read_allowed(out / "allowed.json")
        before = dict(allowed)
        yield ca, allowed
        if allowed != before:
            write_bytes(out / "allowed.json", _as_json(allowed), mode=0o644)
    except OSError as bad:
        raise ConfigError(f"cannot write in {out}: {bad.strerror}") from None
    finally:
        os.close(handle)


@contextmanager
def _key_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder of mode 0700 that takes its place when everything is in it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with new_folder(target, mode=0o700, replace=replace, shared=True) as folder:
            yield folder
    except OSError as bad:
        raise ConfigError(f"cannot make {target}: {bad.strerror}") from None


def _what_next(out: Path, host: str, clients: Sequence[str], head: str, *, changed: bool = False) -> str:
    host = f"[{host}]" if ":" in host else host
    lines = [head, ""]
    if changed:
        lines.append(_to_server(out))
    else:
        lines.append(f"To the server, from {out}: ca.pem server.pem server.key allowed.json")
        lines.append("  fedtune-server conf=NAME --certificates ca.pem server.pem server.key --allowed allowed.json")
    shown = clients[0] if len(clients) == 1 else "NAME"
    lines += ["", f"To each client, from {out / 'clients' / shown}, by a safe way: key ca.pem"]
    lines.append(f"  fedtune-client --server {host}:8080 --client-id {shown} --root-certificates ca.pem --key key --data PATH")
    lines += ["", f"Then delete the copies in {out / 'clients'}: a client's key is its own."]
    if not changed:
        lines.append(
            f"Keep {out / 'ca.key'} off the server: it signs the next certificate (--renew-server), and whoever has it can pass for one."
        )
    return "\n".join(lines)


def _to_server(out: Path) -> str:
    return (
        f"To the server, from {out}: allowed.json\n  in place of the file that --allowed names; a server that runs reads it within seconds"
    )
