"""Keys of a deployment: they verify, nobody else can read them, and no file is overwritten."""

import datetime
import json
import os
import shutil
import socket
import ssl
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.supercore.primitives.asymmetric import sign_message, uses_nist_ec_curve, verify_signature

from fedtune.cli.main import main
from fedtune.delivery.signing import Signer, Verifier
from fedtune.errors import ConfigError
from fedtune.network import keys
from fedtune.network.keys import add_clients, check_private_key, make_keys, read_allowed, remove_clients, renew_server, rotate_clients
from fedtune.storage import atomic as files

SECRET = {"ca.key", "server.key", "signing.key", "key"}


@pytest.fixture(scope="module")
def keys_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployment") / "keys"
    make_keys(out, ["fed.example.org", "192.0.2.7"], ["a", "b"])
    return out


def handshake(folder: Path, ca: Path, name: str) -> str:
    """Do a TLS handshake on a socket pair as a client of the host `name`; returns the TLS version."""
    there, here = socket.socketpair()
    side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    side.load_cert_chain(folder / "server.pem", folder / "server.key")

    def serve() -> None:
        try:
            side.wrap_socket(there, server_side=True).close()
        except OSError:  # the client refused; its side raises the error
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=ca)
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default since 3.13
        with context.wrap_socket(here, server_hostname=name) as tls:
            return tls.version() or ""
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("name", ["fed.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_the_certificate_is_valid_for_each_of_its_names(keys_folder: Path, name: str) -> None:
    assert handshake(keys_folder, keys_folder / "clients" / "a" / "ca.pem", name) == "TLSv1.3"


@pytest.mark.parametrize("name", ["example.org", "192.0.2.8"])
def test_the_certificate_is_invalid_for_other_names(keys_folder: Path, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|not valid for"):
        handshake(keys_folder, keys_folder / "ca.pem", name)


def test_another_ca_is_not_trusted(keys_folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other", ["fed.example.org"], ["a"])
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer|signature"):
        handshake(keys_folder, tmp_path / "other" / "ca.pem", "fed.example.org")


def test_file_modes_and_private_keys(keys_folder: Path) -> None:
    everything = sorted(p.relative_to(keys_folder).as_posix() for p in keys_folder.rglob("*"))
    files = [
        "allowed.json",
        "ca.key",
        "ca.pem",
        *(f"clients/{c}/{f}" for c in "ab" for f in ("ca.pem", "key", "key.pub", "signing.pub")),
        "server.key",
        "server.pem",
        "signing.key",
        "signing.pub",
    ]
    assert everything == sorted([*files, "clients", "clients/a", "clients/b"])
    for path in (keys_folder, *keys_folder.rglob("*")):
        private = path.is_dir() or path.name in SECRET
        assert not private or stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert path.is_dir() or (b"PRIVATE KEY" in path.read_bytes()) == (path.name in SECRET)


def test_a_private_file_never_has_a_wider_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0)  # a permissive umask must not make a key readable
    opened: dict[str, int] = {}
    real = os.open

    def record_open(path: Path, flags: int, *mode: int, **how: Any) -> int:
        handle = real(path, flags, *mode, **how)
        if flags & os.O_CREAT:
            opened[str(path)] = os.fstat(handle).st_mode
        return handle

    monkeypatch.setattr(files.os, "open", record_open)
    try:
        make_keys(tmp_path / "keys", ["h"], ["a"])
    finally:
        os.umask(before)
    modes = {Path(path).name: stat.S_IMODE(mode) for path, mode in opened.items()}
    assert len(opened) == 11 and set(modes.values()) == {0o600}, modes


def test_flower_accepts_the_node_keys(keys_folder: Path) -> None:
    allowed = read_allowed(keys_folder / "allowed.json")
    assert list(allowed) == ["a", "b"]
    # as flower-supernode loads it: load_ssh_private_key of an elliptic curve
    private = serialization.load_ssh_private_key((keys_folder / "clients" / "a" / "key").read_bytes(), None)
    signed = sign_message(private, b"node")  # type: ignore[arg-type]
    public = {name: serialization.load_ssh_public_key(text.encode()) for name, text in allowed.items()}
    assert uses_nist_ec_curve(public["a"])  # type: ignore[arg-type]
    assert verify_signature(public["a"], b"node", signed) and not verify_signature(public["b"], b"node", signed)  # type: ignore[arg-type]
    assert (keys_folder / "clients" / "a" / "key.pub").read_text() == allowed["a"] + "\n"


def test_add_creates_one_client_and_changes_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a"])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "allowed.json"}
    old = read_allowed(out / "allowed.json")
    assert main(["keys", "--out", str(out), "--add", "c"]) == 0
    assert "allowed.json" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in before} == before
    new = read_allowed(out / "allowed.json")
    assert new.pop("c") + "\n" == (out / "clients" / "c" / "key.pub").read_text() and new == old
    assert stat.S_IMODE((out / "clients" / "c" / "key").stat().st_mode) == 0o600
    assert not [p for p in out.rglob("*.tmp")]


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    command = ["keys", "--out", str(out), "--server-name", "h", "--clients", "a"]
    assert main(command) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    for again in (command, ["keys", "--out", str(out), "--add", "a"], ["keys", "--out", str(out), "--add", "b", "a"]):
        assert main(again) == 2
        output = capsys.readouterr()
        assert not output.out and output.err.count("\n") == 1 and "never overwritten" in output.err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_private_material_is_never_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    assert main(["keys", "--out", str(out), "--server-name", "fed.example.org,192.0.2.7", "--clients", "a", "b"]) == 0
    assert main(["keys", "--out", str(out), "--add", "c"]) == 0
    assert main(["keys", "--out", str(out), "--rotate", "c"]) == 0
    assert main(["keys", "--out", str(out), "--renew-server"]) == 0
    output = "".join(capfd.readouterr())
    assert "PRIVATE" not in output
    trust = "--certificates ca.pem server.pem server.key --allowed allowed.json --signing-key signing.key"
    assert f"fedtune-server conf=NAME {trust}" in output
    assert "--key key --signing-pub signing.pub --data PATH" in output
    assert "--server fed.example.org:8080" in output
    secret = [p for p in out.rglob("*") if p.name in SECRET]
    assert len(secret) == 6
    for line in (line for p in secret for line in p.read_text().splitlines()):
        assert line not in output
    (out / "server.key").write_text((out / "server.key").read_text()[:60])
    with pytest.raises(ConfigError) as bad:  # a refusal does not quote it either
        check_private_key(out / "server.key")
    assert "MIG" not in str(bad.value) and "\n" not in str(bad.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--server-name", "h", "--clients", "../a"], "is not a client name"),
        (["--server-name", "h", "--clients", ".a"], "is not a client name"),
        (["--server-name", "h", "--clients", "a", "a"], "given twice"),
        (["--server-name", "https://h", "--clients", "a"], "neither a host name nor an IP address"),
        (["--server-name", "h:8080", "--clients", "a"], "no port"),
        (["--server-name", "10.0.0.300", "--clients", "a"], "neither a host name nor an IP address"),
        (["--server-name", "h,", "--clients", "a"], "neither a host name"),
        (["--server-name", "h", "--clients", "a", "--days", "0"], "1 to 36500"),
        (["--server-name", "h"], "needs --server-name HOST and --clients"),
        (["--add", "a"], "not a folder of `fedtune keys`"),
        (["--add", "a", "--days", "3"], "leave out --days"),
        (["--rotate", "a", "--clients", "b"], "leave out --clients"),
        (["--remove", "a", "--ca-key", "x"], "leave out --ca-key"),
        (["--renew-server", "--clients", "b"], "leave out --clients"),
        (["--renew-server", "--days", "0"], "1 to 36500"),
        (["--rotate", "a"], "not a folder of `fedtune keys`"),
        (["--remove", "a"], "not a folder of `fedtune keys`"),
        (["--renew-server"], "not a folder of `fedtune keys`"),
        (["--server-name", "h", "--clients", "a", "--ca-key", "x"], "leave out --ca-key"),
    ],
)
def test_a_refused_command_creates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], why: str) -> None:
    assert main(["keys", "--out", str(tmp_path / "keys"), *given]) == 2
    output = capsys.readouterr()
    assert why in output.err and not output.out and not list(tmp_path.iterdir())


def test_a_key_that_others_can_read_is_refused(keys_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "key"
    copy.write_bytes((keys_folder / "clients" / "a" / "key").read_bytes())
    copy.chmod(0o640)
    with pytest.raises(ConfigError, match=r"readable by others \(mode 0640\): chmod 600"):
        check_private_key(copy)
    copy.chmod(0o400)
    check_private_key(copy)
    if copy.stat().st_uid == 0:  # files of the superuser may be readable by a group: systemd and Docker pass secrets in this way
        copy.chmod(0o440)
        with monkeypatch.context() as service:
            service.setattr(keys.os, "geteuid", lambda: 10001)
            check_private_key(copy)
            copy.chmod(0o444)
            with pytest.raises(ConfigError, match="0444"):
                check_private_key(copy)
    check_private_key(keys_folder / "server.key")
    with pytest.raises(ConfigError, match="cannot read the private key"):
        check_private_key(tmp_path / "none")


def test_the_list_of_allowed_is_checked(keys_folder: Path, tmp_path: Path) -> None:
    good = json.loads((keys_folder / "allowed.json").read_text())["a"]
    path = tmp_path / "allowed.json"
    for text, why in {
        "[": "not a JSON object of names and public keys",
        "{}": "names no clients",
        '{"a": "x", "a": "y"}': "it lists a client twice",
        '{"a": "ssh-ed25519 AAAA"}': "key of client a is not an ECDSA public key",
        json.dumps({"a/b": good}): "is not a client name",
        json.dumps({"a": good, "b": f"{good} again"}): "b and a have the same key",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            read_allowed(path)


def test_an_incomplete_folder_of_add_is_named(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["h"], ["a"])
    (tmp_path / "keys" / "clients" / "b").mkdir()
    with pytest.raises(ConfigError, match="b is not allowed: remove that folder"):
        add_clients(tmp_path / "keys", ["b"])


def test_rotate_replaces_the_key_of_that_client_only(tmp_path: Path) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a", "b"])
    old, files = read_allowed(out / "allowed.json"), {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    message = rotate_clients(out, ["a"])
    assert "a/key" not in message and f"from {out / 'clients' / 'a'}" in message and "the old ones are refused" in message
    new = read_allowed(out / "allowed.json")
    assert new["b"] == old["b"] and new["a"] != old["a"]
    assert (out / "clients" / "a" / "key.pub").read_text() == new["a"] + "\n"
    assert stat.S_IMODE((out / "clients" / "a" / "key").stat().st_mode) == 0o600
    changed = {p.relative_to(out).as_posix() for p, data in files.items() if p.read_bytes() != data}
    assert changed == {"allowed.json", "clients/a/key", "clients/a/key.pub"} and {p for p in out.rglob("*") if p.is_file()} == set(files)
    shutil.rmtree(out / "clients")  # the operator has deleted the copies, as advised
    (out / "clients").mkdir()
    rotate_clients(out, ["a"])
    assert (out / "clients" / "a" / "key").is_file() and read_allowed(out / "allowed.json")["b"] == old["b"]


def test_remove_takes_clients_off_the_list_and_never_the_last(tmp_path: Path) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a", "b", "c"])
    old = read_allowed(out / "allowed.json")
    assert "allowed.json" in remove_clients(out, ["a", "c"])
    assert read_allowed(out / "allowed.json") == {"b": old["b"]} and [p.name for p in (out / "clients").iterdir()] == ["b"]
    for change, names, why in (
        (remove_clients, ["b"], "no client would be left"),
        (remove_clients, ["b", "x"], "client x has no key here"),
        (rotate_clients, ["b", "a"], "client a has no key here: make one with --add"),
    ):
        with pytest.raises(ConfigError, match=why):
            change(out, names)
    assert read_allowed(out / "allowed.json") == {"b": old["b"]}
    add_clients(out, ["a"])  # the name is free again
    assert set(read_allowed(out / "allowed.json")) == {"a", "b"}


def test_clients_trust_a_renewed_server_without_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["fed.example.org"], ["a"], days=30)
    trusted = tmp_path / "ca.pem"
    shutil.copy(out / "clients" / "a" / "ca.pem", trusted)
    before = (out / "server.pem").read_bytes(), (out / "server.key").read_bytes()
    assert main(["keys", "--out", str(out), "--renew-server"]) == 0
    assert "server.pem server.key" in capsys.readouterr().out
    assert before[0] != (out / "server.pem").read_bytes() and before[1] != (out / "server.key").read_bytes()
    assert handshake(out, trusted, "fed.example.org") == handshake(out, trusted, "127.0.0.1") == "TLSv1.3"
    (out / "ca.key").rename(tmp_path / "kept.key")  # stored on another machine
    with pytest.raises(ConfigError, match="there is no .*ca.key: give the CA's key with --ca-key FILE"):
        renew_server(out, [])
    assert (
        main(["keys", "--out", str(out), "--renew-server", "--server-name", "new.example.org", "--ca-key", str(tmp_path / "kept.key")]) == 0
    )
    assert handshake(out, trusted, "new.example.org") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(out, trusted, "fed.example.org")


def test_only_the_ca_s_own_key_signs_and_not_beyond_its_expiry(tmp_path: Path) -> None:
    out, other = tmp_path / "keys", tmp_path / "other"
    make_keys(out, ["h"], ["a"], days=30)
    make_keys(other, ["h"], ["a"])
    before = (out / "server.pem").read_bytes()
    with pytest.raises(ConfigError, match="is not the key of .*ca.pem"):
        renew_server(out, [], ca_key=other / "ca.key")
    (other / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        renew_server(out, [], ca_key=other / "ca.key")
    assert (out / "server.pem").read_bytes() == before
    renew_server(out, [], days=36500)
    ends = [x509.load_pem_x509_certificate((out / f"{name}.pem").read_bytes()).not_valid_after_utc for name in ("server", "ca")]
    assert ends[0] == ends[1]  # and the CA outlives a server's certificate of 30 days
    assert (ends[1] - datetime.datetime.now(datetime.UTC)).days > 3600


def test_a_new_signing_key_reaches_every_client_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a", "b"])
    old = out / "signing.pub"
    verifier = Verifier(old)
    assert {(out / "clients" / c / "signing.pub").read_bytes() for c in "ab"} == {old.read_bytes()}
    shutil.rmtree(out / "clients" / "b")  # its files are only on the client
    assert main(["keys", "--out", str(out), "--renew-signing-key"]) == 0
    assert "To the server" in (output := capsys.readouterr().out) and "signing.pub" in output
    signature = Signer(out / "signing.key").sign(b"data")
    assert Verifier(out / "clients" / "a" / "signing.pub").accepts(b"data", signature) and not verifier.accepts(b"data", signature)
    assert not (out / "clients" / "b").exists()
    assert main(["keys", "--out", str(out), "--add", "c"]) == 0
    assert (out / "clients" / "c" / "signing.pub").read_bytes() == (out / "signing.pub").read_bytes()


def test_a_folder_of_version_0_1_has_no_signing_key_until_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a"])
    for file in out.rglob("signing.*"):
        file.unlink()
    assert main(["keys", "--out", str(out), "--add", "b"]) == 0
    assert "signing" not in capsys.readouterr().out and not (out / "clients" / "b" / "signing.pub").exists()
    assert main(["keys", "--out", str(out), "--renew-signing-key"]) == 0
    assert stat.S_IMODE((out / "signing.key").stat().st_mode) == 0o600
    assert (out / "clients" / "b" / "signing.pub").is_file()


@pytest.mark.parametrize("kind", [Signer, Verifier])
def test_other_files_are_not_signing_keys(tmp_path: Path, kind: type[Signer] | type[Verifier]) -> None:
    out = tmp_path / "keys"
    make_keys(out, ["h"], ["a"])
    wrong = out / ("signing.pub" if kind is Signer else "signing.key")
    for file, sentence in (
        (tmp_path / "missing", "cannot read the .*signing key .*missing"),
        (wrong, "is not a .*signing key: give the signing"),
        (out / "server.key", "is not a .*signing key: give the signing"),
        (out, "cannot read the .*signing key"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            kind(file)
