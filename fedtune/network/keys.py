"""`fedtune keys`: the certificates and node keys of a deployment, and the checks of such files.

    DIR/ca.pem  server.pem  server.key      the CA that clients trust, and the server's certificate and key (TLS)
    DIR/ca.key                              signs the next server.pem; never copy it to the server
    DIR/signing.key  signing.pub            signs the models that the server delivers; clients verify with the public half
    DIR/allowed.json                        allowed clients: name → public key
    DIR/clients/NAME/{key, key.pub, ca.pem, signing.pub} a client's key pair (Flower's node authentication), the CA, the public signing key

Node keys use the curve P-256 and OpenSSH's format, the only private-key format that Flower's SuperNode reads. Anyone with the CA's key can
set up a second server that the clients trust: DIR stays with the operator, and ca.key may be stored elsewhere.
"""

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.delivery.signing import make_signing_key
from fedtune.errors import ConfigError
from fedtune.network.certificates import certificate_names, make_ca, sign_server, subject_names
from fedtune.storage.atomic import new_folder, write_bytes
from fedtune.storage.parsing import content_of, parse_json, read_text

DAYS = 3650  # clients trust this one CA: when it expires, every device needs a new ca.pem
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PEM = serialization.Encoding.PEM


def make_keys(out: Path, hosts: Sequence[str], clients: Sequence[str], *, days: int = DAYS) -> str:
    """Create the folder `out` with all keys and certificates of a deployment. It appears complete or not at all.

    Args:
        out: Folder to create; it must be missing or empty.
        hosts: Host names and IP addresses of the server; localhost is always added.
        clients: Names of the clients.
        days: Validity of the server's certificate; the CA is valid for the same time, and for `DAYS` at least.

    Returns:
        Instructions: what to copy where, and how to start both sides.

    Raises:
        ConfigError: A name is invalid, or `out` is not empty or cannot be written.
    """
    names = subject_names(hosts)
    _check_clients(clients)
    _check_days(days)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists and keys are never overwritten: give another --out, or add a client with --add NAME")
    authority, ca_key = make_ca(max(days, DAYS))
    certificate, key = sign_server(authority, ca_key, names, days)
    signing_key, signing_pub = make_signing_key()
    public = {"ca.pem": authority.public_bytes(_PEM), "signing.pub": signing_pub}
    with _key_folder(out) as folder:
        for file, data in public.items():
            write_bytes(folder / file, data, mode=0o644)
        write_bytes(folder / "signing.key", signing_key, mode=0o600)
        write_bytes(folder / "ca.key", _private(ca_key), mode=0o600)
        write_bytes(folder / "server.pem", certificate.public_bytes(_PEM), mode=0o644)
        write_bytes(folder / "server.key", _private(key), mode=0o600)
        (folder / "clients").mkdir(mode=0o700)
        allowed = {name: _make_client(folder / "clients" / name, name, public) for name in clients}
        write_bytes(folder / "allowed.json", _as_json(allowed), mode=0o644)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    head = f"Keys for {len(clients)} clients in {out}; the server's certificate expires on {until}."
    return _next_steps(out, hosts[0], list(clients), head)


def add_clients(out: Path, clients: Sequence[str]) -> str:
    """Create key pairs for more clients in a folder of `make_keys`. Of the existing files only the list of allowed clients changes.

    Returns:
        Instructions: what to copy where.

    Raises:
        ConfigError: The folder does not exist, or a name is invalid or taken.
    """
    _check_clients(clients)
    with _locked_folder(out) as (public, allowed):
        for name in clients:
            if name in allowed:
                raise ConfigError(f"client {name} already has a key, and keys are never overwritten: use another name, or --rotate {name}")
            if (out / "clients" / name).exists():
                raise ConfigError(f"{out / 'clients' / name} exists but {name} is not allowed: remove that folder, or use another name")
        for name in clients:
            with _key_folder(out / "clients" / name) as folder:
                allowed[name] = _write_client_keys(folder, name, public)
    return _next_steps(out, "HOST", list(clients), f"Keys for {len(clients)} more clients in {out}.", changed=True)


def rotate_clients(out: Path, clients: Sequence[str]) -> str:
    """Replace the key pairs of clients; the old ones are no longer accepted.

    Returns:
        Instructions: what to copy where.

    Raises:
        ConfigError: The folder does not exist, or a client has no key there.
    """
    _check_clients(clients)
    with _locked_folder(out) as (public, allowed):
        _check_known(clients, allowed, f"make one with --add {clients[0]}")
        for name in clients:
            with _key_folder(out / "clients" / name, replace=True) as folder:
                allowed[name] = _write_client_keys(folder, name, public)
    return _next_steps(out, "HOST", list(clients), f"New keys for {len(clients)} clients in {out}; the old ones are refused.", changed=True)


def remove_clients(out: Path, clients: Sequence[str]) -> str:
    """Remove clients from the list of allowed clients and delete their keys.

    Returns:
        Instructions: what to copy where.

    Raises:
        ConfigError: The folder does not exist, a client has no key there, or no client would be left.
    """
    _check_clients(clients)
    with _locked_folder(out) as (_, allowed):
        _check_known(clients, allowed, f"{out / 'allowed.json'} lists the clients that have one")
        if not set(allowed) - set(clients):
            raise ConfigError(
                "no client would be left, and a server with an empty list does not start: add a client first, with --add NAME"
            )
        for name in clients:
            del allowed[name]
    for name in clients:
        shutil.rmtree(out / "clients" / name, ignore_errors=True)
    return f"{len(clients)} clients are no longer allowed.\n\n{_to_server(out)}"


def renew_server(out: Path, hosts: Sequence[str], *, days: int = DAYS, ca_key: Path | None = None) -> str:
    """Create a new certificate and key for the server; clients need no change.

    Args:
        out: Folder of `make_keys`.
        hosts: Host names and IP addresses of the server; empty keeps those of the present certificate.
        days: Validity of the certificate, limited by the CA's.
        ca_key: File of the CA's key; None uses the one in `out`.

    Returns:
        Instructions: what to copy where.

    Raises:
        ConfigError: The folder does not exist, or the CA's key is missing or belongs to another CA.
    """
    _check_days(days)
    signer = ca_key or out / "ca.key"
    with _locked_folder(out) as (public, _):
        authority = x509.load_pem_x509_certificate(public["ca.pem"])
        if not signer.exists():
            raise ConfigError(f"there is no {signer}: give the CA's key with --ca-key FILE; if it is lost, make a new folder with --out")
        check_private_key(signer)
        private = serialization.load_pem_private_key(signer.read_bytes(), None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != authority.public_key():
            raise ConfigError(f"{signer} is not the key of {out / 'ca.pem'}: give the matching key with --ca-key FILE")
        names = subject_names(hosts) if hosts else certificate_names(x509.load_pem_x509_certificate((out / "server.pem").read_bytes()))
        certificate, key = sign_server(authority, private, names, days)
        write_bytes(out / "server.key", _private(key), mode=0o600)
        write_bytes(out / "server.pem", certificate.public_bytes(_PEM), mode=0o644)
    head = f"New server certificate, expires on {certificate.not_valid_after_utc:%Y-%m-%d}."
    then = "  then restart it; clients reconnect by themselves and keep their ca.pem"
    return f"{head}\n\nTo the server, from {out}: server.pem server.key\n{then}"


def renew_signing_key(out: Path) -> str:
    """Create a new key pair that signs models, and copy its public half into the clients' folders that are still there.

    Returns:
        Instructions: what to copy where.

    Raises:
        ConfigError: The folder does not exist or cannot be written.
    """
    with _locked_folder(out) as (_, allowed):
        private, public = make_signing_key()
        write_bytes(out / "signing.key", private, mode=0o600)
        for folder in (out, *(out / "clients" / name for name in allowed)):
            if folder.is_dir():
                write_bytes(folder / "signing.pub", public, mode=0o644)
    return (
        f"New signing key in {out}; clients refuse models that it signed until they have its public half.\n\nTo the server, from {out}:"
        f" signing.key\n  give it with --signing-key and restart the server\n\nTo each client, from {out}: signing.pub\n"
        "  give it with --signing-pub and restart the client"
    )


# -- checks of key files ------------------------------------------------------------------------------------------------------------------


def read_allowed(path: Path) -> dict[str, str]:
    """Read the allowed clients from `allowed.json`: name → public key in OpenSSH's text format.

    Raises:
        ConfigError: The file cannot be read, or a name or key in it is invalid.
    """
    try:
        found = parse_json(read_text(path), object_pairs_hook=_unique)
    except OSError as bad:
        raise ConfigError(f"cannot read the list of allowed clients {path}: {bad.strerror}; `fedtune keys` makes one") from None
    except ValueError as bad:
        raise ConfigError(f"the list of allowed clients {path} is not a JSON object of names and public keys: {str(bad)[:80]}") from None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"the list of allowed clients {path} names no clients: it must map each client's name to its public key")
    owner: dict[bytes, str] = {}
    for name, text in found.items():
        _check_clients([name])
        public = _public_key(text, f"{path}: the key of client {name}")
        point = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        if (other := owner.setdefault(point, name)) != name:
            raise ConfigError(f"{path}: {name} and {other} have the same key, so they cannot be told apart: give each its own")
    return found


def check_private_key(path: Path) -> None:
    """Check that a private key (PEM or OpenSSH) exists, is valid, and is not readable by others.

    Raises:
        ConfigError: It fails a check.
    """
    try:
        found = path.stat()
        data = content_of(path)
    except OSError as bad:
        raise ConfigError(f"cannot read the private key {path}: {bad.strerror}") from None
    forbidden = stat.S_IRWXG | stat.S_IRWXO
    if found.st_uid == 0 and os.geteuid() != 0:
        forbidden &= ~stat.S_IRGRP  # systemd and Docker give a service access to root's files through its group
    if (mode := found.st_mode) & forbidden:
        raise ConfigError(f"the private key {path} is readable by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
    load = serialization.load_ssh_private_key if data.startswith(b"-----BEGIN OPENSSH") else serialization.load_pem_private_key
    try:
        load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        raise ConfigError(f"{path} is not a private key without password (PEM or OpenSSH): use the file that `fedtune keys` made") from None


def _public_key(text: object, where: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(str(text).encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{where} is not an ECDSA public key: use the text of clients/NAME/key.pub")
    return key


# -- creating keys ------------------------------------------------------------------------------------------------------------------------


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _make_client(folder: Path, name: str, public: Mapping[str, bytes]) -> str:
    folder.mkdir(mode=0o700)
    return _write_client_keys(folder, name, public)


def _write_client_keys(folder: Path, name: str, shared: Mapping[str, bytes]) -> str:
    """Write a new key pair into a client's folder, and the public files that all clients get. Returns the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode() + f" {name}"
    write_bytes(folder / "key", private, mode=0o600)
    write_bytes(folder / "key.pub", f"{public}\n".encode(), mode=0o644)
    for file, data in shared.items():
        write_bytes(folder / file, data, mode=0o644)
    return public


def _check_clients(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("no client is given: give --clients NAME NAME ...")
    for i, name in enumerate(names):
        if not _CLIENT.fullmatch(name):
            raise ConfigError(f"'{name[:80]}' is not a client name: up to 64 letters, digits, '.', '_', '-', a letter or digit first")
        if name in names[:i]:
            raise ConfigError(f"client {name} is given twice: each client needs its own name")


def _check_known(names: Sequence[str], allowed: dict[str, str], otherwise: str) -> None:
    if unknown := [name for name in names if name not in allowed]:
        raise ConfigError(f"client {unknown[0]} has no key here: {otherwise}")


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise ConfigError(f"--days {days} is out of bounds: wanted 1 to 36500")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) < len(pairs):  # json keeps the last one silently
        raise ValueError("it lists a client twice")
    return found


def _as_json(allowed: dict[str, str]) -> bytes:
    return (json.dumps(allowed, indent=1, sort_keys=True) + "\n").encode()


# -- on disk ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked_folder(out: Path) -> Iterator[tuple[dict[str, bytes], dict[str, str]]]:
    """Lock a folder and yield the public files that all clients get, and its allowed clients; changes to the latter are written back.

    Raises:
        ConfigError: The folder does not exist or cannot be written.
    """
    try:
        public = {"ca.pem": (out / "ca.pem").read_bytes()}
        if (signing := out / "signing.pub").exists():  # folders of version 0.1 have none
            public["signing.pub"] = signing.read_bytes()
        handle = os.open(out, os.O_RDONLY)
    except OSError as bad:
        raise ConfigError(f"{out} is not a folder of `fedtune keys` ({bad.strerror}): make one with --server-name and --clients") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # else one of two concurrent changes would be lost
        allowed = read_allowed(out / "allowed.json")
        before = dict(allowed)
        yield public, allowed
        if allowed != before:
            write_bytes(out / "allowed.json", _as_json(allowed), mode=0o644)
    except OSError as bad:
        raise ConfigError(f"cannot write in {out}: {bad.strerror}") from None
    finally:
        os.close(handle)


@contextmanager
def _key_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder of mode 0700 that moves to `target` at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with new_folder(target, mode=0o700, replace=replace, shared=True) as folder:
            yield folder
    except OSError as bad:
        raise ConfigError(f"cannot make {target}: {bad.strerror}") from None


def _next_steps(out: Path, host: str, clients: Sequence[str], head: str, *, changed: bool = False) -> str:
    host = f"[{host}]" if ":" in host else host
    lines = [head, ""]
    if changed:
        lines.append(_to_server(out))
    else:
        lines.append(f"To the server, from {out}: ca.pem server.pem server.key signing.key allowed.json")
        lines.append(
            "  fedtune-server conf=NAME --certificates ca.pem server.pem server.key --allowed allowed.json --signing-key signing.key"
        )
    shown, signs = clients[0] if len(clients) == 1 else "NAME", (out / "signing.pub").exists()
    lines += ["", f"To each client, from {out / 'clients' / shown}, over a secure channel: key ca.pem{' signing.pub' * signs}"]
    signer = " --signing-pub signing.pub" * signs
    lines.append(f"  fedtune-client --server {host}:8080 --client-id {shown} --root-certificates ca.pem --key key{signer} --data PATH")
    lines += ["", f"Then delete the copies in {out / 'clients'}: each key belongs only on its client."]
    if not changed:
        lines.append(
            f"Keep {out / 'ca.key'} off the server: it signs the next certificate (--renew-server) and lets its holder pose as the server."
        )
    return "\n".join(lines)


def _to_server(out: Path) -> str:
    return f"To the server, from {out}: allowed.json\n  replaces the file given with --allowed; a running server reads it within seconds"
