"""URLs, data URIs and base64 → the bytes of an image file.

Fetching what a stranger names is how servers are made to talk to the machines behind them (server-side
request forgery, CWE-918). The guard sits where the connection is made: `_GuardedBackend` resolves the host,
checks every address it resolves to, and connects to the address that it checked. However the host was
written (decimal, octal, hexadecimal, IPv6-mapped, a name whose answers change) only that address counts, for
the first request as for each redirect. TLS still checks the certificate against the host's name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import unquote_to_bytes

import httpcore2
import httpx2

from embedserve import __version__
from embedserve.config import Limits
from embedserve.errors import BadRequest, EmbedServeError, Forbidden, InvalidField, TooLarge

__all__ = ["Fetcher", "decode_base64", "is_public", "parse_data_uri"]

Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port → its addresses as text."""

MAX_REDIRECTS = 5
MAX_URL = 8192
"""Characters."""

_HEADERS = (
    ("User-Agent", f"embedserve/{__version__}"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Fetcher:
    """Fetches images from http(s) URLs that lead to public addresses. One for each app; close it at the end.

    No proxy or credential is taken from the environment, no cookie is kept.

    Args:
        limits: `fetch_timeout` bounds the whole fetch, redirects and slow bodies included;
            `max_image_bytes` bounds what is read, counted after any content encoding.
        allowed_networks: Networks that may be reached although they are not public, such as "10.0.0.0/8".
        resolve: Host and port → addresses; the system's resolver by default.

    Raises:
        InvalidField: One of `allowed_networks` is not a network.
    """

    def __init__(
        self, limits: Limits, allowed_networks: Sequence[str] = (), *, resolve: Resolver | None = None
    ) -> None:
        self._limits = limits
        # Their own threads: names that take long to resolve must not hold up asyncio's shared ones.
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="resolve")
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpcore2.default_ssl_context(),  # certificates are read once, not per connection
            max_connections=64,
            max_keepalive_connections=16,
            keepalive_expiry=5.0,
            network_backend=_GuardedBackend(_networks(allowed_networks), resolve or self._resolve),
        )

    async def fetch(self, url: str) -> bytes:
        """The body that `url` answers with.

        Raises:
            BadRequest: Not an http(s) URL, cannot be reached, takes too long, or answers with another status.
            Forbidden: It leads to an address that is not public, or carries credentials.
            TooLarge: The body is larger than `limits.max_image_bytes`.
        """
        target = _checked(url)
        try:
            async with asyncio.timeout(self._limits.fetch_timeout):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._get(target)
                    if isinstance(answer, bytes):
                        return answer
                    target = answer
        except TimeoutError:
            raise BadRequest(
                f"'{target.host}' did not deliver the image within {self._limits.fetch_timeout:g} s "
                "(fetch_timeout). Upload the image instead.",
                code="fetch_timeout",
            ) from None
        raise _failed(target, f"redirects more than {MAX_REDIRECTS} times")

    async def close(self) -> None:
        """Closes idle connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._pool.aclose()

    async def _resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def _get(self, target: httpx2.URL) -> bytes | httpx2.URL:
        """The body, or where the answer redirects to."""
        url = httpcore2.URL(
            scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
        )
        try:
            async with self._pool.stream("GET", url, headers=_HEADERS) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in headers:
                    return _checked(headers[b"location"].decode("utf-8", "replace"), base=target)
                if response.status != 200:
                    raise _failed(target, f"answered with status {response.status}")
                declared = headers.get(b"content-length", b"")
                if declared.isdigit() and int(declared) > self._limits.max_image_bytes:
                    raise self._too_large(target)
                encoding = headers.get(b"content-encoding", b"identity").strip().lower()
                return await self._read(response.aiter_stream(), encoding, target)
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.UnsupportedProtocol) as error:
            raise _failed(target, _why(error)) from error

    async def _read(self, parts: AsyncIterator[bytes], encoding: bytes, target: httpx2.URL) -> bytes:
        limit = self._limits.max_image_bytes
        if encoding not in {b"identity", b"", b"gzip", b"x-gzip", b"deflate"}:
            # Identity was asked for; one that answers otherwise is read if the standard library can.
            raise _failed(target, "answered with a content encoding that was not asked for")
        unpack = None if encoding in {b"identity", b""} else zlib.decompressobj(wbits=47)
        body = bytearray()
        async for part in parts:
            # One byte beyond the limit proves the excess; a bomb is never unpacked further.
            try:
                body += part if unpack is None else unpack.decompress(part, limit + 1 - len(body))
            except zlib.error as error:
                raise _failed(target, "answered with damaged compression") from error
            if len(body) > limit:
                raise self._too_large(target)
        return bytes(body)

    def _too_large(self, target: httpx2.URL) -> TooLarge:
        return TooLarge(
            f"The image at '{target.host}' is larger than {self._limits.max_image_bytes:,} bytes "
            "(max_image_bytes). Use a smaller copy.",
            code="image_too_large",
        )


# -------------------------------------------------------------------------------------------- addresses


class _GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that were checked, never to a name."""

    def __init__(self, allowed: Sequence[_Network], resolve: Resolver) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature is httpcore2's
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        try:
            found = await self._resolve(host.strip("[]"), port)
        except (OSError, UnicodeError):  # unknown, no host name, no port
            found = []
        if not found:
            raise BadRequest(
                f"The host '{host}' was not found. Check the URL, or upload the image instead.",
                code="fetch_failed",
            )
        addresses = [ip_address(text.partition("%")[0]) for text in found]
        if not all(self._may_reach(address) for address in addresses):
            # Which address it was stays here: it would tell a stranger about the network inside.
            raise Forbidden(
                f"'{host}' may not be fetched: only public addresses are. Upload the image instead, or let "
                "the server's operator allow its network (fetch_networks).",
                code="address_not_allowed",
            )
        failure: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature is httpcore2's
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise Forbidden("Unix sockets are never fetched from.")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)

    def _may_reach(self, address: Address) -> bool:
        inner = _embedded(address)
        candidates = [address] if inner is None else [address, inner]
        return is_public(address) or any(one in network for network in self._allowed for one in candidates)


_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    ip_network(text)
    # What ipaddress leaves out: IETF protocol assignments (RFC 6890), retired 6to4 relays (RFC 7526),
    # documentation (RFC 9637).
    for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")
)


def is_public(address: Address) -> bool:
    """Whether an address is one that anybody on the internet could connect to.

    An IPv6 address that carries an IPv4 one (mapped, NAT64, 6to4) is as public as that one.
    """
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _NOT_PUBLIC)
    )


def _embedded(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour


def _networks(texts: Sequence[str]) -> list[_Network]:
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise InvalidField(
                f"'{text}' is not a network: {error}. Write it as 10.0.0.0/8 or fd00::/8.",
                param="fetch_networks",
            ) from None
    return networks


# ------------------------------------------------------------------------------------------------- URLs


def _checked(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """The URL that `text` means, relative to `base`, if it is one to fetch at all."""
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    where = "The URL is" if base is None else f"'{base.host}' redirects to"
    if len(text) > MAX_URL:
        raise BadRequest(f"The URL has {len(text):,} characters; the limit is {MAX_URL:,}.", code="bad_url")
    try:
        url = httpx2.URL(text.strip()) if base is None else base.join(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise BadRequest(f"{where} '{shown}', which is malformed: {error}.", code="bad_url") from None
    if url.scheme not in {"http", "https"} or not url.host:
        raise BadRequest(
            f"{where} '{shown}'; only http:// and https:// URLs with a host are fetched. "
            "Upload the image instead.",
            code="bad_url",
        )
    if url.port is not None and not 0 < url.port < 65536:
        raise BadRequest(f"{where} '{shown}', whose port {url.port} is not in 1..65535.", code="bad_url")
    if url.userinfo:
        raise Forbidden(
            f"The URL on '{url.host}' carries a user name or password, which is never sent on. "
            "Upload the image instead.",
            code="credentials_in_url",
        )
    return url


def _failed(target: httpx2.URL, what: str) -> EmbedServeError:
    return BadRequest(
        f"The image at '{target.host}' could not be fetched: it {what}. "
        "Check that the URL opens in a browser without signing in, or upload the image instead.",
        code="fetch_failed",
    )


def _why(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"has a TLS certificate that is not valid ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            return "does not speak TLS as expected"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpcore2.ConnectError):
        return "does not accept connections"
    if isinstance(error, httpcore2.ProtocolError):
        return "does not answer in HTTP"
    return "broke the connection"


# ------------------------------------------------------------------------------------ data URIs, base64


def parse_data_uri(uri: str, limits: Limits) -> bytes:
    """The bytes of a `data:` URI (RFC 2397), base64 or percent-encoded. The media type is not relied on.

    Raises:
        BadRequest: Not a data URI, or its base64 is wrong.
        TooLarge: More bytes than `limits.max_image_bytes`.
    """
    head, comma, payload = uri.lstrip().partition(",")
    if not head[:5].lower() == "data:":
        raise BadRequest(
            f"'{uri[:40]}' is not a data URI. Write data:image/png;base64,…", code="bad_data_uri"
        )
    if not comma:
        raise BadRequest(
            f"The data URI '{head[:40]}' has no comma before its data. Write data:image/png;base64,…",
            code="bad_data_uri",
        )
    if head.lower().rstrip().endswith(";base64"):
        if "%" in payload:
            payload = unquote_to_bytes(payload).decode("latin-1")
        return decode_base64(payload, limits)
    if len(payload) > 3 * limits.max_image_bytes:
        raise _data_too_large(len(payload) // 3, limits)
    data = unquote_to_bytes(payload)
    if len(data) > limits.max_image_bytes:
        raise _data_too_large(len(data), limits)
    return data


_TO_STANDARD = str.maketrans("-_", "+/")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")


def decode_base64(text: str, limits: Limits) -> bytes:
    """The bytes of base64 text (RFC 4648): standard or URL-safe, with or without padding and white space.

    Raises:
        BadRequest: Empty, cut short, or with a character that base64 does not have.
        TooLarge: More bytes than `limits.max_image_bytes`.
    """
    compact = "".join(text.split()).rstrip("=").translate(_TO_STANDARD)
    if not compact:
        raise BadRequest("The base64 data is empty.", code="empty_image")
    size = len(compact) * 3 // 4
    if size > limits.max_image_bytes:
        raise _data_too_large(size, limits)
    wrong = _NOT_BASE64.search(compact)
    if wrong is not None:
        raise BadRequest(
            f"The base64 data has {wrong[0]!r} as its character {wrong.start() + 1:,}; only A-Z, a-z, 0-9, "
            "+, / (or -, _) and a final = are allowed. Encode the file's bytes again.",
            code="bad_base64",
        )
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except binascii.Error:
        raise BadRequest(
            f"The base64 data is cut short: {len(compact):,} characters are one more than whole bytes need. "
            "Send all of it.",
            code="bad_base64",
        ) from None


def _data_too_large(size: int, limits: Limits) -> TooLarge:
    return TooLarge(
        f"The image has about {size:,} bytes; the limit is {limits.max_image_bytes:,} (max_image_bytes). "
        "Send a smaller copy.",
        code="image_too_large",
    )
