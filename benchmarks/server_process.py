"""`embedserve serve` as a user starts it, for measuring from outside."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    seconds_to_ready: float
    """From the start of the process to the first 200 of /readyz, which computes an embedding."""


@contextmanager
def server(*flags: str, data: Path | None = None) -> Iterator[Server]:
    """A server on a free port and, unless `data` is given, an empty data folder; it is stopped at the end."""
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-m", "embedserve", "serve", "--port", "0", "--data", str(data or empty)]
        start = time.perf_counter()
        with subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                port = _printed_port(process)
                while not _ready(port):
                    time.sleep(0.005)
                seconds = time.perf_counter() - start
                yield Server(port, process.pid, seconds)
            finally:
                process.terminate()
                process.wait(20)


def _printed_port(process: subprocess.Popen[str]) -> int:
    printed = []
    for line in process.stdout or ():
        printed.append(line)
        if found := re.search(r"http://[\w.]+:(\d+)", line):
            # The rest is read too, or a full pipe would stop the server.
            threading.Thread(target=process.communicate, daemon=True).start()
            return int(found[1])
    raise RuntimeError("the server did not start:\n" + "".join(printed))


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
            return bool(answer.status == 200)
    except (urllib.error.HTTPError, ConnectionError):
        return False
