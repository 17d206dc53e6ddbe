"""fetch: a real server on loopback, and every way to be led to an address that must not be reached."""

from __future__ import annotations

import asyncio
import base64
import gzip
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest

from embedserve import __version__
from embedserve.config import Limits
from embedserve.errors import BadRequest, Forbidden, InvalidField, TooLarge
from embedserve.fetch import Fetcher, decode_base64, is_public, parse_data_uri

LOOPBACK = ("127.0.0.0/8", "::1/128")
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20
LIMITS = Limits(max_image_bytes=100_000, fetch_timeout=5.0)


class Site(BaseHTTPRequestHandler):
    """Answers by the path; remembers the requests."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, dict[str, str]]]
    released: threading.Event

    def do_GET(self) -> None:
        self.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        route, _, argument = self.path.lstrip("/").partition("/")
        getattr(self, f"answer_{route}", self.answer_missing)(argument)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_picture(self, _: str) -> None:
        self.send(PICTURE, Set_Cookie="session=1")

    def answer_missing(self, _: str) -> None:
        self.send(b"<html>no</html>", 404)

    def answer_status(self, status: str) -> None:
        self.send(b"", int(status))

    def answer_to(self, location: str) -> None:
        self.send(b"", 302, Location=location)

    def answer_loop(self, _: str) -> None:
        self.send(b"", 301, Location="/loop/")

    def answer_hops(self, left: str) -> None:
        self.send(b"", 307, Location="/picture" if left == "1" else f"/hops/{int(left) - 1}")

    def answer_zipped(self, _: str) -> None:
        self.send(gzip.compress(PICTURE), Content_Encoding="gzip")

    def answer_bomb(self, _: str) -> None:
        self.send(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")

    def answer_brotli(self, _: str) -> None:
        self.send(b"....", Content_Encoding="br")

    def answer_torn(self, _: str) -> None:
        self.send(b"not gzip at all", Content_Encoding="gzip")

    def answer_declared(self, size: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", size)
        self.end_headers()  # and never a byte: the header alone decides
        self.released.wait(10)

    def answer_endless(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while not self.released.is_set():
                self.wfile.write(b"2710\r\n" + bytes(10_000) + b"\r\n")
        except OSError:
            self.close_connection = True

    def answer_drip(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            while not self.released.wait(0.02):
                self.wfile.write(b".")
                self.wfile.flush()
        except OSError:
            self.close_connection = True

    def answer_cut(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half")
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Running:
    def __init__(self, port: int, requests: list[tuple[str, dict[str, str]]]) -> None:
        self.port = port
        self.requests = requests

    def __call__(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"


@pytest.fixture
def site() -> Iterator[Running]:
    handler = type("Handler", (Site,), {"requests": [], "released": threading.Event()})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Running(server.server_address[1], handler.requests)
        handler.released.set()
        server.shutdown()
        thread.join()


def fetch(url: str, allowed: Sequence[str] = LOOPBACK, limits: Limits = LIMITS, **options: object) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(limits, allowed, **options)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    return asyncio.run(run())


# --------------------------------------------------------------------------------------------- answers


def test_a_picture_comes_as_it_is(site: Running) -> None:
    assert fetch(site("picture")) == PICTURE


def test_a_request_says_who_asks_and_nothing_more(site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    async def twice() -> None:
        fetcher = Fetcher(LIMITS, LOOPBACK)
        await fetcher.fetch(site("picture"))
        await fetcher.fetch(site("picture"))  # the first answer set a cookie
        await fetcher.close()

    asyncio.run(twice())
    for _, headers in site.requests:
        assert headers == {
            "host": f"127.0.0.1:{site.port}",
            "user-agent": f"embedserve/{__version__}",
            "accept": "image/*",
            "accept-encoding": "identity",
        }


def test_compression_that_was_not_asked_for_is_undone(site: Running) -> None:
    assert fetch(site("zipped")) == PICTURE


@pytest.mark.parametrize("path", ["brotli", "torn"])
def test_compression_that_cannot_be_undone_is_refused(site: Running, path: str) -> None:
    with pytest.raises(BadRequest, match="could not be fetched: it answered with"):
        fetch(site(path))


@pytest.mark.parametrize("status", [204, 206, 304, 401, 403, 404, 500, 503])
def test_any_other_status_is_named(site: Running, status: int) -> None:
    with pytest.raises(BadRequest, match=f"answered with status {status}"):
        fetch(site(f"status/{status}"))


def test_a_connection_that_breaks_is_refused(site: Running) -> None:
    with pytest.raises(BadRequest, match="could not be fetched"):
        fetch(site("cut"))


def test_a_port_where_nothing_listens_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(BadRequest, match="does not accept connections"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/")


def test_a_server_that_does_not_speak_tls_is_refused(site: Running) -> None:
    with pytest.raises(BadRequest, match="TLS"):
        fetch(site("picture").replace("http:", "https:"))


def test_a_host_that_does_not_resolve_is_refused() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(BadRequest, match=r"host 'no-such-host\.invalid' was not found"):
        fetch("http://no-such-host.invalid/", resolve=unknown)
    with pytest.raises(BadRequest, match="was not found"):
        fetch(f"http://{'a' * 70}.example/")


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("path", ["declared/100001", "endless", "bomb"])
def test_more_bytes_than_the_limit_are_refused(site: Running, path: str) -> None:
    with pytest.raises(TooLarge, match="larger than 100,000 bytes"):
        fetch(site(path))


def test_a_picture_of_exactly_the_limit_passes(site: Running) -> None:
    assert fetch(site("picture"), limits=Limits(max_image_bytes=len(PICTURE))) == PICTURE
    with pytest.raises(TooLarge):
        fetch(site("picture"), limits=Limits(max_image_bytes=len(PICTURE) - 1))


@pytest.mark.parametrize("path", ["drip", "declared/1000"])
def test_a_slow_answer_is_given_up_in_time(site: Running, path: str) -> None:
    with pytest.raises(BadRequest, match=r"did not deliver the image within 0\.3 s") as caught:
        fetch(site(path), limits=Limits(fetch_timeout=0.3))
    assert caught.value.code == "fetch_timeout"


def test_a_name_that_never_resolves_is_given_up_in_time() -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(BadRequest, match=r"within 0\.1 s"):
        fetch("http://slow.example/", limits=Limits(fetch_timeout=0.1), resolve=never)


# ----------------------------------------------------------------------------------------- URLs, redirects


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com/a.jpg", "gopher://example.com", "data:image/png;base64,AA==",
     "//example.com/a.jpg", "example.com/a.jpg", "http://", "http:///a.jpg", "https://:80/", "", "unix:/x"],
)  # fmt: skip
def test_only_http_urls_with_a_host_are_fetched(url: str) -> None:
    with pytest.raises(BadRequest, match="only http:// and https://"):
        fetch(url)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://a\nb/", "http://example.com:port/", "http://a\0b/", "http://exa mple/"]
)
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        fetch(url)


def test_a_port_that_is_none_is_refused() -> None:
    for port in (0, 99999):
        with pytest.raises(BadRequest, match=f"port {port} is not in 1..65535"):
            fetch(f"http://127.0.0.1:{port}/")


def test_an_endless_url_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"9,019 characters; the limit is 8,192"):
        fetch("http://example.com/" + "a" * 9000)


def test_a_url_with_credentials_is_refused_without_repeating_them() -> None:
    with pytest.raises(Forbidden, match="carries a user name or password") as caught:
        fetch("http://admin:hunter2@example.com/a.jpg")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("hops", [1, 5])
def test_a_few_redirects_are_followed(site: Running, hops: int) -> None:
    assert fetch(site(f"hops/{hops}")) == PICTURE


@pytest.mark.parametrize("path", ["hops/6", "loop/"])
def test_more_redirects_are_not(site: Running, path: str) -> None:
    with pytest.raises(BadRequest, match="redirects more than 5 times"):
        fetch(site(path))


def test_a_redirect_is_checked_like_the_first_url(site: Running) -> None:
    with pytest.raises(BadRequest, match=r"redirects to 'file:///etc/passwd'; only http"):
        fetch(site("to/file:///etc/passwd"))
    with pytest.raises(Forbidden, match="carries a user name"):
        fetch(site("to/http://user:pass@127.0.0.1/"))
    with pytest.raises(Forbidden, match="only public addresses"):
        fetch(site("to/http://169.254.169.254/latest/meta-data/"))
    with pytest.raises(Forbidden, match="only public addresses"):
        fetch(site(f"to/http://[::1]:{site.port}/picture"), allowed=["127.0.0.0/8"])
    assert [path for path, _ in site.requests if path == "/picture"] == []


# ------------------------------------------------------------------------------------------- addresses

INSIDE = [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.0.0.1.", "0", "0.0.0.0",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "\u2460\u2461\u2466.0.0.1", "127\u30020\u30020\u30021",
    "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "[ff02::1]", "[fec0::1]", "192.0.2.1",
]  # fmt: skip


@pytest.mark.parametrize("host", INSIDE)
def test_no_address_inside_is_reached_however_it_is_written(site: Running, host: str) -> None:
    with pytest.raises((Forbidden, BadRequest)) as caught:
        fetch(site("picture", host), allowed=())
    assert site.requests == []
    if isinstance(caught.value, BadRequest):  # a form that this system does not take for an address
        assert "was not found" in str(caught.value) or "malformed" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "169.254.169.254"])
def test_the_refusal_says_how_to_allow_a_network(site: Running, host: str) -> None:
    with pytest.raises(
        Forbidden, match=r"only public addresses are\. Upload .* \(fetch_networks\)"
    ) as caught:
        fetch(site("picture", host), allowed=())
    assert caught.value.code == "address_not_allowed"


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_an_allowed_network_is_reached(site: Running, host: str) -> None:
    if host.startswith("[") and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert fetch(site("picture", host), allowed=["127.0.0.0/8"]) == PICTURE


def test_what_a_name_leads_to_is_not_told() -> None:
    async def inside(host: str, port: int) -> list[str]:
        return ["10.20.30.40"]

    with pytest.raises(Forbidden, match=r"'wiki\.example' may not be fetched") as caught:
        fetch("http://wiki.example/", resolve=inside)
    assert "10.20" not in str(caught.value)


def test_one_private_address_among_public_ones_refuses_the_name() -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "192.168.0.1"]

    with pytest.raises(Forbidden):
        fetch("http://mixed.example/", resolve=mixed)


def test_the_address_that_was_checked_is_the_one_connected_to(site: Running) -> None:
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    # No other resolver knows this name: only the checked address can have led to the server.
    assert fetch(site("picture", "rebinding.invalid"), resolve=rebinding) == PICTURE
    assert asked == ["rebinding.invalid"]
    assert site.requests[0][1]["host"] == f"rebinding.invalid:{site.port}"


def test_a_name_is_checked_again_for_each_connection(site: Running) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    async def rebinding(host: str, port: int) -> list[str]:
        return next(answers)

    with pytest.raises(Forbidden):
        fetch(site("to/https://rebinding.invalid/", "rebinding.invalid"), resolve=rebinding)


def test_tls_asks_for_the_name_and_not_for_the_address() -> None:
    async def run() -> bytes:
        greeting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            greeting.set_result(await reader.read(4096))
            writer.close()

        async def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        fetcher = Fetcher(LIMITS, LOOPBACK, resolve=resolve)
        async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(BadRequest, match="could not be fetched"):
                await fetcher.fetch(f"https://pictures.invalid:{port}/")
        await fetcher.close()
        return await greeting

    assert b"pictures.invalid" in asyncio.run(run())


def test_the_next_address_is_tried_when_one_does_not_answer(site: Running) -> None:
    async def two(host: str, port: int) -> list[str]:
        return ["127.99.99.99", "127.0.0.1"]  # the server listens on the second alone

    assert fetch(site("picture", "two.invalid"), resolve=two) == PICTURE


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("93.184.216.34", True), ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True), ("2002:808:808::", True), ("64:ff9b:1::808:808", False),
        ("64:ff9b::a00:1", False), ("2002:c0a8:1::", False), ("::ffff:10.0.0.1", False), ("::8.8.8.8", False),
        ("240.0.0.1", False), ("198.18.0.1", False), ("192.88.99.1", False), ("2001:db8::1", False),
        ("2001::1", False), ("3fff::1", False), ("5f00::1", False), ("fe80::1", False), ("fc00::1", False),
        ("100::1", False), ("ff0e::1", False), ("0.1.2.3", False), ("192.0.0.8", False),
    ],
)  # fmt: skip
def test_what_counts_as_public(text: str, public: bool) -> None:
    assert is_public(ip_address(text)) is public


def test_a_network_that_is_none_is_refused_at_the_start() -> None:
    with pytest.raises(InvalidField, match=r"'10\.0\.0\.1/8' is not a network") as caught:
        Fetcher(LIMITS, ["10.0.0.1/8"])
    assert caught.value.param == "fetch_networks"


# ---------------------------------------------------------------------------------- data URIs and base64

BYTES = bytes(range(256))
STANDARD = base64.b64encode(BYTES).decode()


@pytest.mark.parametrize(
    "text",
    [
        STANDARD,
        STANDARD.rstrip("="),
        base64.urlsafe_b64encode(BYTES).decode(),
        f" {STANDARD[:99]}\r\n{STANDARD[99:]}\n",
    ],
)
def test_base64_in_any_of_its_forms_is_read(text: str) -> None:
    assert decode_base64(text, LIMITS) == BYTES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n=", "is empty"),
        ("AAAA!AAA", "'!' as its character 5"),
        ("AAAAé", "'é' as its character 5"),
        ("AA=AA", "'=' as its character 3"),
        ("AAAAA", "cut short: 5 characters"),
        ("https://example.com/a.jpg", "':' as its character 6"),
    ],
)
def test_wrong_base64_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        decode_base64(text, LIMITS)


def test_base64_beyond_the_limit_is_not_decoded() -> None:
    exact = base64.b64encode(bytes(100_000)).decode()
    assert len(decode_base64(exact, LIMITS)) == 100_000
    with pytest.raises(TooLarge, match=r"100,001 bytes; the limit is 100,000"):
        decode_base64(base64.b64encode(bytes(100_001)).decode(), LIMITS)


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{STANDARD}",
        f"DATA:image/png;name=a.png;BASE64,{STANDARD}",
        f"\n data:;base64,{STANDARD[:50]}\n{STANDARD[50:]}",
        "data:image/png;base64," + STANDARD.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in BYTES),
    ],
)
def test_a_data_uri_in_any_of_its_forms_is_read(uri: str) -> None:
    assert parse_data_uri(uri, LIMITS) == BYTES


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://example.com/", "is not a data URI"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,A*", r"'\*' as its character 2"),
    ],
)
def test_a_wrong_data_uri_says_what_is_wrong(uri: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse_data_uri(uri, LIMITS)


@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:image/png,", "data:,"])
def test_a_data_uri_beyond_the_limit_is_refused(start: str) -> None:
    with pytest.raises(TooLarge, match="the limit is 100,000"):
        parse_data_uri(start + "A" * 400_000, LIMITS)
