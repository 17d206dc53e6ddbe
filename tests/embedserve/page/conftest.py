"""A real Chromium in front of real servers.

Each test gets a fresh browser context. When it ends, the page must have logged no error and asked nobody but
its own server for anything.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from embedserve.bundle import open_bundle, seal
from tests.tiny_bundle import OUTPUTS, write_tiny_bundle

ROOT = Path(__file__).parents[3]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

WRITE_KEY, READ_KEY = "write-key-1", "read-key-1"
HOSTILE = '<img src=x onerror="window.hacked=1">'
COLOURS = {
    "red": (255, 0, 0),
    "orange": (255, 140, 0),
    "dark red": (110, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
} | {f"gray {shade}": (shade, shade, shade) for shade in range(100, 250, 5)}


def find_chromium() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


@dataclass
class Servers:
    """The servers by name: open, locked (keys), bare (no collection), wordless (no text tower), seeing (heat
    maps), mortal."""

    process: subprocess.Popen[str]
    urls: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.urls[name]

    def _tell(self, verb: str, name: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{verb} {name}\n")
        self.process.stdin.flush()
        answered, self.urls[name] = self.process.stdout.readline().split()
        assert answered == name

    def start(self, name: str) -> None:
        self._tell("start", name)

    def stop(self, name: str) -> None:
        self._tell("stop", name)


@pytest.fixture(scope="session")
def servers(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    root = tmp_path_factory.mktemp("servers")
    wordless = _without_text(tiny_folder, root / "wordless-bundle")
    seeing = write_tiny_bundle(root / "seeing-bundle", name="seeing", outputs=OUTPUTS).folder
    names = ("open", "locked", "bare", "wordless", "seeing", "mortal")
    for name in names:
        (root / name).mkdir()
        settings = {
            "encoder": str({"wordless": wordless, "seeing": seeing}.get(name, tiny_folder)),
            "api_key": [WRITE_KEY, f"{READ_KEY}:read"] if name == "locked" else [],
        }
        (root / name / "serve.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tests.embedserve.page.servers", str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as process:
        running = Servers(process)
        for name in names:
            running.start(name)
            if name != "bare":
                _fill(running[name])
        yield running
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == 0


def _without_text(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    described = open_bundle(folder).description
    assert described.text
    for name in (described.text.file, described.text.tokenizer):
        (out / name).unlink()
    seal(out, described.model_copy(update={"name": "wordless", "text": None}))
    return out


def _fill(url: str) -> None:
    """The collections `colours`, `hostile` and `nothing`."""
    notes = [
        {"id": f"paint/{name}.png", "metadata": {"caption": name, "level": n}}
        for n, name in enumerate(COLOURS)
    ]
    hostile = {"id": HOSTILE, "metadata": {"caption": HOSTILE, HOSTILE: [HOSTILE]}}
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {WRITE_KEY}"}) as client:
        for collection, colours, items in [
            ("colours", list(COLOURS.values()), notes),
            ("hostile", [(255, 0, 0)], [hostile]),
            ("nothing", [], []),
        ]:
            client.put(f"/v1/collections/{collection}", json={"description": "Paint."}).raise_for_status()
            files = [("file", ("a.png", png(colour), "image/png")) for colour in colours]
            if files:
                path = f"/v1/collections/{collection}/items"
                client.post(path, files=files, data={"items": json.dumps(items)}).raise_for_status()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Of the module, not the session: while it lives, Playwright's loop counts as running in this thread, and
    # no other test could start its own.
    path = find_chromium()
    if path is None:
        pytest.skip(f"no browser: set CHROMIUM, or put one of {', '.join(NAMES)} on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """One browser context with its page, and what it may complain about."""

    def __init__(self, browser: Browser, servers: Servers, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **context})
        self.servers = servers
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda said: said.type in ("error", "warning") and self.errors.append(said.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, name: str, place: str = "/") -> Page:
        self.page.goto(self.servers[name] + place)
        return self.page

    def excuse(self, pattern: str) -> None:
        """Forgets complaints of Chromium's network log that the journey is about, which must be there."""
        assert any(re.search(pattern, error) for error in self.errors), self.errors
        self.errors = [error for error in self.errors if not re.search(pattern, error)]

    def close(self) -> None:
        self.context.close()

    def check(self) -> None:
        assert self.errors == []
        foreign = [
            url
            for url in self.requests
            if not url.startswith((*self.servers.urls.values(), "blob:", "data:"))
        ]
        assert foreign == []


@pytest.fixture
def visitor(browser: Browser, servers: Servers) -> Iterator[Any]:
    """Makes visits: `visitor(color_scheme="dark")`."""
    expect.set_options(timeout=15_000)
    visits: list[Visit] = []

    def make(**context: Any) -> Visit:
        visits.append(Visit(browser, servers, **context))
        return visits[-1]

    yield make
    for visit in visits:
        visit.close()
    for visit in visits:
        visit.check()


@pytest.fixture
def visit(visitor: Any) -> Visit:
    made: Visit = visitor()
    return made
