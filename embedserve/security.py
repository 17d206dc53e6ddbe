"""Who may call: API keys with a scope, and the guards for a server without keys.

A server without keys on loopback trusts whoever can reach it, so it must make sure that no web page can.
A page of another origin can send requests to 127.0.0.1 (cross-site request forgery) and, once its own name
resolves to 127.0.0.1, read the answers too (DNS rebinding). The first is refused by `Origin` and
`Sec-Fetch-Site`, the second by the `Host` header, which then holds the page's own name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedserve.api.failures import error_response
from embedserve.config import ServeConfig
from embedserve.errors import EmbedServeError, Forbidden, InvalidField, TooLarge, Unauthorized

__all__ = ["ApiKeys", "BodyLimit", "Guard", "SecurityHeaders", "is_loopback", "needed_scope", "refuse_unsafe"]

KeyScope = Literal["read", "write"]

OPEN_PATHS = frozenset({"/", "/favicon.ico", "/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_PREFIXES = ("/page/", "/docs/")
"""What needs no key: the page and the documentation, which hold no data, and the health checks."""

READING_POSTS = re.compile(r"/v1/(embeddings|embed|heatmap|classify|collections/[^/]+/(search|classify))")
"""POST requests that change nothing."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "font-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without port, is this machine only."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refuse_unsafe(config: ServeConfig) -> None:
    """Raises InvalidField when other machines could reach a server that asks nobody for a key."""
    ApiKeys.parse(config.api_key)
    if not config.api_key and not config.no_auth and not is_loopback(config.host):
        raise InvalidField(
            f"--host {config.host or chr(39) * 2} would let other machines in without a key. Give one with "
            "--api-key KEY (or EMBEDSERVE_API_KEY), bind to 127.0.0.1, or say --no-auth if that is meant.",
            param="host",
        )


def needed_scope(method: str, path: str) -> KeyScope | None:
    """The scope that a request needs; None for what is open to everyone."""
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
        return None
    if method in SAFE_METHODS or (method == "POST" and READING_POSTS.fullmatch(path)):
        return "read"
    return "write"


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a server, as sha256 digests with their scope."""

    digests: tuple[tuple[bytes, KeyScope], ...] = ()

    @classmethod
    def parse(cls, keys: Sequence[str]) -> ApiKeys:
        """From `KEY`, `KEY:read` or `KEY:write`. Raises InvalidField for a key no header could carry."""
        parsed: list[tuple[bytes, KeyScope]] = []
        for number, entry in enumerate(keys, 1):
            key, scope = entry, "write"
            if entry.endswith((":read", ":write")):
                key, _, scope = entry.rpartition(":")
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidField(  # the key itself stays out of the message, which ends in logs
                    f"API key {number} is empty or holds spaces or characters outside ASCII; "
                    "use letters, digits and -._~+/=, as in `openssl rand -hex 24`.",
                    param="api_key",
                )
            parsed.append((hashlib.sha256(key.encode()).digest(), "read" if scope == "read" else "write"))
        return cls(tuple(parsed))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def scopes(self, key: str) -> frozenset[KeyScope]:
        """What `key` may do; nothing for an unknown one. Takes as long for any key of the same length."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        granted: set[KeyScope] = set()
        for known, scope in self.digests:
            if hmac.compare_digest(known, digest):
                granted |= {"read", "write"} if scope == "write" else {"read"}
        return frozenset(granted)


class Guard:
    """ASGI middleware: refuses requests without the right key or, where there are no keys, from web pages."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.keys = ApiKeys.parse(config.api_key)
        self.check_host = not self.keys and not config.no_auth and is_loopback(config.host)
        self.origins = frozenset(origin.rstrip("/").lower() for origin in config.cors_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def refusal(self, method: str, path: str, headers: Headers) -> EmbedServeError | None:
        """Why the request may not pass, or None."""
        if self.keys:
            needed = needed_scope(method, path)
            return self._without_key(needed, headers) if needed is not None else None
        return self._from_a_page(method, headers)

    def _without_key(self, needed: KeyScope, headers: Headers) -> EmbedServeError | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return Unauthorized(
                "This server needs an API key. Send it as 'Authorization: Bearer KEY'.",
                code="missing_api_key",
            )
        granted = self.keys.scopes(key.strip())
        if not granted:
            return Unauthorized("The API key is not one of this server's. Check it, or ask for a new one.")
        if needed not in granted:
            return Forbidden(
                "This API key may only read; writing needs a key of scope 'write'.", code="write_scope_needed"
            )
        return None

    def _from_a_page(self, method: str, headers: Headers) -> EmbedServeError | None:
        host = headers.get("host", "")
        if self.check_host and host and not is_loopback(_without_port(host)):
            return Forbidden(
                f"Host '{host}' is not this machine. Without API keys only localhost and 127.0.0.1 are "
                "answered, so that no web page can reach the server by another name. Start it with "
                "--api-key, or with --no-auth behind a proxy.",
                code="host_not_allowed",
            )
        if method in SAFE_METHODS:
            return None  # a page of another origin cannot read the answer: that takes CORS
        origin = headers.get("origin")
        if origin is not None:
            if origin.lower() in self.origins or "*" in self.origins:
                return None
            if urlsplit(origin).netloc.lower() == host.lower() and host:
                return None
        elif headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return None
        return Forbidden(
            f"A page of '{origin or 'another origin'}' may not call this server. "
            "Allow it with --cors-origin, or use an API key.",
            code="origin_not_allowed",
        )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class BodyLimit:
    """ASGI middleware: a body over `limit` bytes is a TooLarge, counted as it arrives, chunked or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        received = 0

        async def counted() -> Message:
            nonlocal received
            if announced.isdecimal() and int(announced) > self.limit:
                raise self._error(f"has {announced} bytes")
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._error("is larger")
            return message

        await self.app(scope, counted, send)

    def _error(self, size: str) -> TooLarge:
        return TooLarge(
            f"The request's body {size}; allowed are {self.limit} bytes. Send fewer or smaller items at a "
            "time, or raise --max-body-bytes.",
            code="body_too_large",
        )


class SecurityHeaders:
    """ASGI middleware: tells browsers to run nothing but our own files, and to guess no content type.

    Args:
        embeddable: Pages of other origins may show our pictures (where `cors_origin` lets them call).
    """

    def __init__(self, app: ASGIApp, *, embeddable: bool = False) -> None:
        self.app = app
        self.headers = HEADERS if embeddable else {**HEADERS, "Cross-Origin-Resource-Policy": "same-origin"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)
