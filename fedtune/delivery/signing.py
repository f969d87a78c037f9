"""Ed25519 signatures of models: the server signs with a private key, and devices verify with its public half.

Both keys are PEM files; `fedtune keys` makes them.
"""

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.errors import ConfigError
from fedtune.storage.parsing import content_of

_PEM = serialization.Encoding.PEM


def make_signing_key() -> tuple[bytes, bytes]:
    """A new key pair: the private key (PKCS #8) and the public key, both PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class Signer:
    """Signs with a private key.

    Raises:
        ConfigError: The file cannot be read or is no Ed25519 private key.
    """

    def __init__(self, file: Path) -> None:
        try:
            key = serialization.load_pem_private_key(content_of(file), None)
        except OSError as bad:
            raise ConfigError(f"cannot read the signing key {file}: {bad.strerror}; `fedtune keys` makes one, signing.key") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{file} is not a signing key: give the signing.key that `fedtune keys` made")
        self._key = key

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self._key.sign(data)


class Verifier:
    """Verifies with a public key.

    Raises:
        ConfigError: The file cannot be read or is no Ed25519 public key.
    """

    def __init__(self, file: Path) -> None:
        try:
            key = serialization.load_pem_public_key(content_of(file))
        except OSError as bad:
            raise ConfigError(f"cannot read the public signing key {file}: {bad.strerror}; `fedtune keys` makes one, signing.pub") from None
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{file} is not a public signing key: give the signing.pub that `fedtune keys` made")
        self._key = key

    @property
    def fingerprint(self) -> str:
        """Identifies the key: 16 hexadecimal digits."""
        raw = self._key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return hashlib.sha256(raw).hexdigest()[:16]

    def accepts(self, data: bytes, signature: bytes) -> bool:
        """Whether the private half of this key has signed `data`."""
        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True
