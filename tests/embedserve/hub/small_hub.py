"""A model hub of one's own: what `huggingface_hub` asks of a server, for folders on this disk.

Files ending in .onnx and .onnx_data are "large": answered with a redirect to another path, with the headers
that the real hub sends, and served in ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".onnx", ".onnx_data")


@dataclass
class SmallHub:
    """Serves the folders 'owner/name' below `root`."""

    root: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    """Repositories for which it answers 503."""
    cut: bool = False
    """The next large file breaks off in the middle."""
    asked: Counter[str] = field(default_factory=Counter)
    """'METHOD path' → how often."""

    def files(self, name: str) -> dict[str, Path]:
        folder = self.root / name
        return {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }

    def commit(self, name: str) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for file, path in self.files(name).items():
            digest.update(file.encode() + path.read_bytes())
        return digest.hexdigest()

    def fetched(self) -> set[str]:
        """Files whose bytes were sent."""
        return {key.rpartition("/cdn/")[2] for key in self.asked if key.startswith("GET /cdn/")}


@contextmanager
def serve(root: Path) -> Iterator[SmallHub]:
    hub = SmallHub(root)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked[f"{self.command} {path}"] += 1
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            revision = "/".join(parts[5:]) if parts[4:5] == ["revision"] else "main"
            self._information("/".join(parts[2:4]), revision)
        elif parts[0] == "cdn":
            self._bytes(self.hub.root / "/".join(parts[1:]))
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, {})

    def _refused(self, name: str, revision: str) -> bool:
        if name in self.hub.broken:
            self._send(503, {})
        elif not (self.hub.root / name).is_dir():
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif name in self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif revision not in {"main", "v1", self.hub.commit(name)}:
            self._send(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return False
        return True

    def _information(self, name: str, revision: str) -> None:
        if self._refused(name, revision):
            return
        siblings = [{"rfilename": file} for file in self.hub.files(name)]
        answer = {
            "id": name,
            "sha": self.hub.commit(name),
            "private": False,
            "tags": [],
            "siblings": siblings,
        }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if self._refused(name, revision):
            return
        path = self.hub.files(name).get(file)
        if path is None:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": self.hub.commit(name)}
        if file.endswith(LARGE):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
            # Another host, as on the real hub: `huggingface_hub` reads the headers of the first answer then.
            headers["Location"] = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}/{file}"
            self._send(302, headers)
        else:
            headers["ETag"] = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
            self._send(200, headers, data)

    def _bytes(self, path: Path) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None and self.hub.cut:
            self.hub.cut = False
            self._send(200, headers, data, sent=len(data) // 2)
            self.close_connection = True
            return
        if asked is None:
            self._send(200, headers, data)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._send(206, headers, part)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", *, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
