"""The server's settings: one frozen object. Flags and environment variables meet here and nowhere else.

Each field is a flag of `embedserve serve` (`--max-pixels`) and an environment variable
(`EMBEDSERVE_MAX_PIXELS`); the text under a field is its `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from embedserve.errors import InvalidField

__all__ = ["Limits", "ServeConfig", "Several", "Switch"]

Switch = Annotated[bool, Parameter(negative=())]
"""A flag that can only be switched on."""

Several = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
"""A flag that may be given several times; as a variable, its values have spaces between them."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may cost. Beyond a limit the answer names it, with status 413 or 429.

    Raises InvalidField for a limit below 1.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    """Bytes of one request."""

    max_image_bytes: int = 20 * 1024 * 1024
    """Bytes of one encoded image, uploaded or fetched."""

    max_pixels: int = 100_000_000
    """Width times height of one image, checked before it is decoded."""

    max_inputs: int = 2048
    """Images, texts or items in one request."""

    max_text_bytes: int = 64 * 1024
    """Bytes of one text, before it is cut to the encoder's context."""

    max_k: int = 1000
    """Neighbours asked for in one search."""

    queue_size: int = 4096
    """Inputs that may wait for a tower; beyond it requests are answered 429."""

    fetch_timeout: float = 10.0
    """Seconds to fetch an image from a URL, redirects included."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            _at_least(limit.name, getattr(self, limit.name), 1e-3 if limit.name == "fetch_timeout" else 1)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `create_app` needs to know. Raises InvalidField for numbers that make no sense."""

    data: Path = Path("embedserve-data")
    """Folder with the collections and label sets; made when missing."""

    encoder: str = "starter"
    """'starter' (bundled) or the folder of an encoder bundle."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs an API key or --no-auth."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    api_key: Several = ()
    """KEY, KEY:read or KEY:write; repeatable. A write key may also read. Plain KEY means write."""

    no_auth: Switch = False
    """Serve other addresses than loopback without any key."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1. auto takes the first GPU if it works, else the CPU."""

    engine_cache: Path | None = None
    """Folder where TensorRT's compiled engines are kept; ~/.cache/embedserve/tensorrt when left out."""

    threads: int = 1
    """Threads of one session.run. 1 gives the most inputs/s; more shorten the wait for a lone input."""

    workers: int = 0
    """Runs of a tower that go side by side; 0 takes as many as the cores have room for."""

    max_batch: int = 0
    """Most inputs that one session.run takes; 0 suits the device (16 on a CPU, 64 on a GPU)."""

    url_inputs: bool = True
    """Fetch images given as http(s) URLs. Only public addresses are ever connected to."""

    fetch_networks: Several = ()
    """Networks such as 10.0.0.0/8 that URL inputs may reach although they are not public; repeatable."""

    cors_origin: Several = ()
    """Origins whose pages may call the API from a browser; repeatable."""

    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _at_least("threads", self.threads, 1)
        _at_least("workers", self.workers, 0)
        _at_least("max_batch", self.max_batch, 0)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InvalidField(
            f"--{name.replace('_', '-')} is {value}; it must be at least {least:g}.", param=name
        )
