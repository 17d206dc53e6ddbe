"""Keys, scopes and addresses, on their own; `api/test_access.py` has them in the server."""

from __future__ import annotations

import pytest

from embedserve.config import ServeConfig
from embedserve.errors import InvalidField
from embedserve.security import ApiKeys, is_loopback, needed_scope, refuse_unsafe


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST.", "a.localhost"]
)
def test_loopback_is_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example", "127.1", "0x7f000001"]
)
def test_everything_else_is_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "images.example"])
def test_other_addresses_need_a_key_or_no_auth(host: str) -> None:
    with pytest.raises(InvalidField, match=r"--api-key.*--no-auth"):
        refuse_unsafe(ServeConfig(host=host))
    refuse_unsafe(ServeConfig(host=host, api_key=("secret",)))
    refuse_unsafe(ServeConfig(host=host, no_auth=True))


def test_loopback_needs_none() -> None:
    refuse_unsafe(ServeConfig())


@pytest.mark.parametrize("key", ["", ":read", ":write", "two words", "schlüssel", "tab\tbed", "line\n"])
def test_keys_that_no_header_carries_are_refused_without_showing_them(key: str) -> None:
    with pytest.raises(InvalidField, match="API key 2") as caught:
        refuse_unsafe(ServeConfig(api_key=("fine", key)))
    assert not key.strip(":") or key not in str(caught.value)


def test_keys_have_scopes() -> None:
    keys = ApiKeys.parse(["plain", "w:write", "r:read", "with:colon", "a:b:read"])
    assert keys.scopes("plain") == keys.scopes("w") == keys.scopes("with:colon") == {"read", "write"}
    assert keys.scopes("r") == keys.scopes("a:b") == {"read"}
    for unknown in ("", "plain ", "Plain", "w:write", "r:read", "with", "\udcff"):
        assert keys.scopes(unknown) == frozenset()


def test_one_key_may_have_both_scopes() -> None:
    assert ApiKeys.parse(["k:read", "k:write"]).scopes("k") == {"read", "write"}
    assert not ApiKeys.parse([])


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/", None),
        ("GET", "/page/main.js", None),
        ("GET", "/pages", "read"),
        ("GET", "/healthz", None),
        ("GET", "/readyz", None),
        ("GET", "/metrics", "read"),
        ("GET", "/v1/collections/c/items/a/b", "read"),
        ("HEAD", "/v1/models", "read"),
        ("POST", "/v1/embeddings", "read"),
        ("POST", "/v1/collections/c/search", "read"),
        ("POST", "/v1/collections/c/classify", "read"),
        ("POST", "/v1/collections/c/items", "write"),
        ("POST", "/v1/collections/c/items/search", "write"),
        ("POST", "/v1/collections/search", "write"),
        ("POST", "/v1/embed/", "write"),
        ("PUT", "/v1/classify", "write"),
        ("DELETE", "/v1/collections/c", "write"),
        ("BREW", "/v1/models", "write"),
    ],
)
def test_what_changes_nothing_is_reading_and_all_else_is_writing(
    method: str, path: str, scope: str | None
) -> None:
    assert needed_scope(method, path) == scope
