"""The certificates of a deployment: its own CA, and the server certificate that the CA signs (X.509, P-256)."""

import datetime
import ipaddress
import re
import secrets
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")


def make_ca(days: int) -> tuple[x509.Certificate, Key]:
    """Return a new CA, valid for `days`, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedtune CA {secrets.token_hex(4)}")])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    uses = [(x509.BasicConstraints(True, 0), True), (_key_usage(signs=True), True), (own, False)]
    return _certificate(name, name, key.public_key(), key, _until(days), uses), key


def sign_server(ca: x509.Certificate, ca_key: Key, names: Sequence[x509.GeneralName], days: int) -> tuple[x509.Certificate, Key]:
    """Return a new certificate and key for a server with these names. The certificate expires no later than its CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    uses: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(False, None), True),
        (_key_usage(signs=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), False),
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune server")])
    until = min(_until(days), ca.not_valid_after_utc)
    return _certificate(subject, ca.subject, key.public_key(), ca_key, until, uses), key


def certificate_names(server: x509.Certificate) -> list[x509.GeneralName]:
    """The host names and addresses in a server's certificate."""
    return list(server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Convert host names for the server's certificate, without duplicates, and add the loopback names.

    Raises:
        ConfigError: There is no name, or one is not a valid host name.
    """
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


def _until(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: Key,
    until: datetime.datetime,
    uses: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    built = built.serial_number(x509.random_serial_number())
    built = built.not_valid_before(_until(-1))  # a device's clock may be behind
    built = built.not_valid_after(until)
    for use, critical in uses:
        built = built.add_extension(use, critical)
    return built.sign(signer, hashes.SHA256())


def _key_usage(*, signs: bool) -> x509.KeyUsage:
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
