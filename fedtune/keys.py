"""`fedtune keys`: the certificates and node keys of a first deployment, and the checks that the doors make of such files.

    DIR/ca.pem  server.pem  server.key      what clients trust, and what the server proves itself with (TLS)
    DIR/allowed.json                        client name → its public key: who may take part
    DIR/clients/NAME/{key, key.pub, ca.pem} what a client proves itself with (Flower's node authentication)

Node keys are on the curve P-256, in OpenSSH's form, which is the one form of a private key that Flower's SuperNode reads. The key of the CA
is never written: nobody, the holder of DIR included, can make a second server that the clients trust.
"""

import datetime
import fcntl
import ipaddress
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import ConfigError

DAYS = 3650  # a client trusts this one CA: the day it ends, every device needs a visit
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")


def make_keys(out: Path, hosts: Sequence[str], clients: Sequence[str], *, days: int = DAYS) -> str:
    """Make the folder `out` with everything that a deployment needs, whole or not at all.

    Args:
        out: Folder to make; there is none yet, or it is empty.
        hosts: Names and IP addresses that clients reach the server by; localhost is always among them.
        clients: Name of each client.
        days: How long the certificates are good.

    Returns:
        What to copy where, and how to start both sides.

    Raises:
        ConfigError: A name cannot be used, or `out` holds something or cannot be written.
    """
    names = _subject_names(hosts)
    _check_clients(clients)
    if not 1 <= days <= 36500:
        raise ConfigError(f"--days {days} is out of bounds: certificates are good for 1 to 36500 days")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and keys are never overwritten: give another --out, or add a client with --add NAME")
    ca, certificate, key = _certificates(names, days)
    with _beside(out) as folder:
        _write(folder / "ca.pem", ca, 0o644)
        _write(folder / "server.pem", certificate, 0o644)
        _write(folder / "server.key", key, 0o600)
        (folder / "clients").mkdir(mode=0o700)
        allowed = {name: _make_client(folder / "clients" / name, name, ca) for name in clients}
        _write(folder / "allowed.json", _as_json(allowed), 0o644)
    until = datetime.date.today() + datetime.timedelta(days=days)
    return _what_next(out, hosts[0], list(clients), f"Keys for {len(clients)} clients in {out}; the certificates are good until {until}.")


def add_clients(out: Path, clients: Sequence[str]) -> str:
    """Make key pairs for further clients in a folder that `make_keys` made; nothing that is there changes but the list of the allowed.

    Returns:
        What to copy where.

    Raises:
        ConfigError: No such folder, or a name that cannot be used or is taken.
    """
    _check_clients(clients)
    try:
        ca = (out / "ca.pem").read_bytes()
        handle = os.open(out, os.O_RDONLY)
    except OSError as bad:
        raise ConfigError(f"{out} is no folder of fedtune keys ({bad.strerror}): make one with --server-name and --clients") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two who add at once would lose one of the two
        allowed = read_allowed(out / "allowed.json")
        for name in clients:
            if name in allowed:
                raise ConfigError(f"client {name} has a key already, and keys are never overwritten: take another name")
            if (out / "clients" / name).exists():
                raise ConfigError(f"{out / 'clients' / name} is there but {name} is not allowed: remove that folder, or take another name")
        for name in clients:
            with _beside(out / "clients" / name) as folder:
                allowed[name] = _fill_client(folder, name, ca)
        beside = out / f".allowed.{secrets.token_hex(4)}.tmp"
        _write(beside, _as_json(allowed), 0o644)
        os.replace(beside, out / "allowed.json")
    except OSError as bad:
        raise ConfigError(f"cannot write in {out}: {bad.strerror}") from None
    finally:
        os.close(handle)
    return _what_next(out, "HOST", list(clients), f"Keys for {len(clients)} more clients in {out}.", added=True)


# -- what the doors check -----------------------------------------------------------------------------------------------------------------


def read_allowed(path: Path) -> dict[str, str]:
    """The clients that may take part: name → public key in OpenSSH's text form, as `allowed.json` holds them.

    Raises:
        ConfigError: The file cannot be read, or a name or a key in it cannot be used.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
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
        data = path.read_bytes()
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


def _certificates(names: Sequence[x509.GeneralName], days: int) -> tuple[bytes, bytes, bytes]:
    """PEM of a new CA, of a server certificate that it signed, and of the server's key."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedtune CA {secrets.token_hex(4)}")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune server")])
    now = datetime.datetime.now(datetime.UTC)

    def certificate(
        name: x509.Name, public: ec.EllipticCurvePublicKey, uses: Sequence[tuple[x509.ExtensionType, bool]]
    ) -> x509.Certificate:
        built = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(public)
        built = built.serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - datetime.timedelta(days=1))  # a device's clock may be behind
        built = built.not_valid_after(now + datetime.timedelta(days=days))
        for use, critical in uses:
            built = built.add_extension(use, critical)
        return built.sign(ca_key, hashes.SHA256())

    own = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = certificate(issuer, ca_key.public_key(), [(x509.BasicConstraints(True, 0), True), (_may(signs=True), True), (own, False)])
    signed = certificate(
        subject,
        key.public_key(),
        [
            (x509.BasicConstraints(False, None), True),
            (_may(signs=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName(names), False),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False),
        ],
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ca.public_bytes(pem), signed.public_bytes(pem), private


def _may(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _make_client(folder: Path, name: str, ca: bytes) -> str:
    folder.mkdir(mode=0o700)
    return _fill_client(folder, name, ca)


def _fill_client(folder: Path, name: str, ca: bytes) -> str:
    """Write a new key pair into a client's folder; returns the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode() + f" {name}"
    _write(folder / "key", private, 0o600)
    _write(folder / "key.pub", f"{public}\n".encode(), 0o644)
    _write(folder / "ca.pem", ca, 0o644)
    return public


def _subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Names of the server for its certificate, each once, with those of the machine itself."""
    found: dict[str, x509.GeneralName] = {}
    for host in (*hosts, "localhost", "127.0.0.1", "::1"):
        try:
            address = ipaddress.ip_address(host)
            found[str(address)] = x509.IPAddress(address)
        except ValueError:
            if not _HOST.fullmatch(host) or re.fullmatch(r"[\d.]+", host):
                raise ConfigError(f"--server-name '{host}' is neither a host name nor an IP address: give HOST[,IP...], no port") from None
            found[host.lower()] = x509.DNSName(host.lower())
    if not hosts:
        raise ConfigError("--server-name is missing: give the host name or IP address that clients reach the server by")
    return list(found.values())


def _check_clients(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("no client is named: give --clients NAME NAME ...")
    for i, name in enumerate(names):
        if not _CLIENT.fullmatch(name):
            raise ConfigError(f"'{name[:80]}' cannot name a client: letters, digits, '.', '_' and '-', a letter or digit first, 64 at most")
        if name in names[:i]:
            raise ConfigError(f"client {name} is named twice: each client needs a name of its own")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) < len(pairs):  # JSON would keep the last one and say nothing
        raise ValueError("a client is named twice")
    return found


def _as_json(allowed: dict[str, str]) -> bytes:
    return (json.dumps(allowed, indent=1, sort_keys=True) + "\n").encode()


# -- on disk ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder of mode 0700 that takes its place when all is in it."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside.mkdir(mode=0o700)
        yield beside
        os.rename(beside, target)
    except OSError as bad:
        raise ConfigError(f"cannot make {target}: {bad.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that never, not even for a moment, has a wider mode."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
        f.write(data)
        f.flush()
        os.fchmod(f.fileno(), mode)
        os.fsync(f.fileno())


def _what_next(out: Path, host: str, clients: Sequence[str], head: str, *, added: bool = False) -> str:
    host = f"[{host}]" if ":" in host else host
    files = "allowed.json" if added else "ca.pem server.pem server.key allowed.json"
    lines = [head, "", f"To the server, from {out}: {files}"]
    if added:
        lines.append("  then restart it; the other clients come back by themselves")
    else:
        lines.append("  fedtune-server conf=NAME --certificates ca.pem server.pem server.key --allowed allowed.json")
    shown = clients[0] if len(clients) == 1 else "NAME"
    lines += ["", f"To each client, from {out / 'clients' / shown}, by a safe way: key ca.pem"]
    lines.append(f"  fedtune-client --server {host}:8080 --client-id {shown} --root-certificates ca.pem --key key --data PATH")
    lines += ["", f"Then delete the copies in {out / 'clients'}: a client's key is its own."]
    return "\n".join(lines)
