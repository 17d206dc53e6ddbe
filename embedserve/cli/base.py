"""What all verbs share: the app, where the work is done, exit codes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cyclopts import App, Group, Parameter
from cyclopts.config import Env

import embedserve
from embedserve.config import Limits, ServeConfig, Switch
from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    from embedserve.client import Client, ImageInput

__all__ = [
    "FAILED",
    "HERE",
    "INTERRUPTED",
    "OK",
    "PARTLY",
    "SERVE_DEFAULTS",
    "USAGE",
    "Usage",
    "Where",
    "app",
    "exit_code",
    "image_argument",
    "is_url",
]

T = TypeVar("T")

OK, FAILED, USAGE, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130

EPILOGUE = """\
Every option is also an environment variable: EMBEDSERVE_API_KEY for --api-key.

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some inputs failed; 130 interrupted.
"""

SERVE_DEFAULTS = ServeConfig()

app = App(
    name="embedserve",
    help="Image and text embeddings, similarity search and zero-shot classification.",
    help_epilogue=EPILOGUE,
    help_format="plaintext",
    version=embedserve.__version__,
    config=Env("EMBEDSERVE_", command=False),
    default_parameter=Parameter(negative_iterable=(), show_env_var=False),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


class Usage(EmbedServeError):
    """The command cannot be carried out as it was given: exit code 2."""


@Parameter(name="*", group=Group("Where", sort_key=9))
@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which server answers, and in which form."""

    url: str | None = None
    """Ask the server at this URL; without it the work is done in this process, on --data."""

    api_key: str | None = None
    """The key for the server at --url."""

    data: Path = SERVE_DEFAULTS.data
    """Folder with the collections, when there is no --url."""

    encoder: str = SERVE_DEFAULTS.encoder
    """'starter' or the folder of an encoder bundle, when there is no --url."""

    device: str = SERVE_DEFAULTS.device
    """auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1, when there is no --url."""

    json: Switch = False
    """Print JSON only, for scripts; progress and messages go to stderr."""

    def run(
        self, work: Callable[[Client], Coroutine[Any, Any, T]], *, limits: Limits = SERVE_DEFAULTS.limits
    ) -> T:
        """`work` with a connected client. Raises EmbedServeError."""
        from embedserve.client import Client

        if self.url is not None:
            client = Client(self.url, api_key=self.api_key)
        else:
            here = ServeConfig(data=self.data, encoder=self.encoder, device=self.device, limits=limits)
            client = Client.local(here)

        async def connected() -> T:
            async with client:
                return await work(client)

        return asyncio.run(connected())


HERE = Where()


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "data:"))


def image_argument(argument: str) -> ImageInput:
    if argument == "-":
        return sys.stdin.buffer.read()
    return argument if is_url(argument) else Path(argument)


def exit_code(failed: int, inputs: int) -> int:
    if not failed:
        return OK
    return FAILED if failed == inputs else PARTLY
