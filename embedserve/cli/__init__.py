"""The command line: `embedserve VERB`. Each verb is a few lines over `embedserve.client`.

Without --url a verb runs the app inside this process on --data; with it, it asks a server. Imports are lazy,
so that --help answers at once and training is reached only by the verb that needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from embedserve.cli import collections, encoders, pull, server, training
from embedserve.cli.base import FAILED, INTERRUPTED, OK, USAGE, Usage, app
from embedserve.cli.terminal import complain, note
from embedserve.errors import EmbedServeError

__all__ = ["app", "collections", "encoders", "main", "pull", "server", "training"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(tokens)
        sys.stdout.flush()
    except EmbedServeError as error:
        complain(error, as_json="--json" in tokens)
        if error.code == "collection_locked":
            note("Is a server running on this data? Ask it: --url http://127.0.0.1:8000")
        return USAGE if isinstance(error, Usage) else FAILED
    except KeyboardInterrupt:
        note("Interrupted; what was answered is kept.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else OK
