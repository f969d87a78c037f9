"""Bodies, keys and hosts."""

import hmac
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from fedtune.errors import ConfigError
from fedtune.inference.serve.limits import KEY_VARIABLE, ApiKeys, Limits, check_host, parse
from fedtune.inference.serve.refusal import Refused

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)


def request(**headers: str) -> Request:
    return Request({"type": "http", "headers": [(k.replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]})


@given(VALUES, st.booleans())
def test_json_round_trips(value: object, ascii: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii).encode(), max_depth=50) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        parse(body, max_depth=4)
    except Refused as refused:
        assert refused.status == 400


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the body is not JSON"),
        (b'{"a": 1', "the body is not JSON"),
        (b'{"a": NaN}', "an invalid or too large number"),
        (b"[-Infinity]", "an invalid or too large number"),
        (b"[1e999]", "an invalid or too large number"),
        (b"[" + b"9" * 5000 + b"]", "an invalid or too large number"),
        (b'"\xff"', "not UTF-8: byte 1"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b"[" * 9 + b"]" * 9, "nests lists and objects deeper than 8"),
        (b"[" * 100_000, "nests lists and objects deeper than 8"),
        (b'{"a":' * 100_000, "nests lists and objects deeper than 8"),
    ],
)
def test_invalid_json_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        parse(body, max_depth=8)


def test_brackets_inside_strings_do_not_count() -> None:
    assert parse(b'["[[[[\\"[[[["]', max_depth=1) == ['[[[["[[[[']


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert not ApiKeys.find(None)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    keys = ApiKeys.find(file)
    for key in ("one", "two"):
        keys.check(request(authorization=f"Bearer {key}"))
    for header in (
        {},
        {"authorization": "Bearer three"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"authorization": "Bearer é"},
    ):
        with pytest.raises(Refused) as refused:
            keys.check(request(**header))
        assert refused.value.status == 401
    monkeypatch.setenv(KEY_VARIABLE, "four")
    ApiKeys.find(None).check(request(authorization="bearer four"))
    with pytest.raises(Refused):  # the file takes precedence over the variable
        ApiKeys.find(file).check(request(authorization="Bearer four"))


@pytest.mark.parametrize("text", ["", "\n \n", "two words\n", "é\n"])
def test_unusable_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="keys must hold API keys"):
        ApiKeys.find(tmp_path / "keys")
    monkeypatch.setenv(KEY_VARIABLE, text.strip("\n"))
    with pytest.raises(ConfigError, match=KEY_VARIABLE):  # an empty variable does not grant access
        ApiKeys.find(None)
    with pytest.raises(ConfigError, match="cannot read"):
        ApiKeys.find(tmp_path / "none")


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append((a, b)), real(a, b))[1])
    ApiKeys(["one", "two", "three"]).check(request(authorization="Bearer one"))
    assert [len(a) == len(b) == 32 for a, b in compared] == [True] * 3


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "localhost:", "127.0.0.1:1", "[::1]:80", "LOCALHOST"])
def test_local_names(host: str) -> None:
    check_host(request(host=host))


@pytest.mark.parametrize("host", ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"])
def test_foreign_host_names_are_refused(host: str) -> None:
    with pytest.raises(Refused) as refused:
        check_host(request(host=host))
    assert refused.value.status == 403


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:evil.example", "[::1]evil.example", "[::1].evil.example", "127.0.0.1:80@evil.example", "localhost:1:2", "[::1]:80:90"),
        *("[::1", "::1", "[localhost]", "localhost:-1", "localhost:٣", "localhost:123456", "localhost /", "localhost\n"),
    ],
)
def test_the_whole_host_header_is_checked(host: str) -> None:
    raw = Request({"type": "http", "headers": [(b"host", host.encode())]})
    with pytest.raises(Refused) as refused:
        check_host(raw)
    assert refused.value.status == 403


@given(st.sampled_from(["localhost", "127.0.0.1", "[::1]"]), st.text(st.characters(codec="ascii"), min_size=1, max_size=8))
def test_nothing_but_a_port_may_follow_a_local_name(name: str, rest: str) -> None:
    is_port = rest[0] == ":" and (rest[1:].isdecimal() or rest == ":") and len(rest) <= 6
    try:
        check_host(request(host=name + rest))
    except Refused:
        assert not is_port
    else:
        assert is_port


@pytest.mark.parametrize("wrong", [{"max_body": 0}, {"max_tokens": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"grace": -1.0}])
def test_impossible_limits_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]
