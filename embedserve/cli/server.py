"""The verb `serve`."""

from __future__ import annotations

from typing import Literal

import embedserve
from embedserve.cli.base import OK, SERVE_DEFAULTS, app
from embedserve.config import ServeConfig, Switch


@app.command
def serve(
    config: ServeConfig = SERVE_DEFAULTS,
    *,
    log_level: Literal["debug", "info", "warning", "error"] = "warning",
    access_log: Switch = False,
) -> int:
    """Serve the API and the page until Ctrl-C or SIGTERM.

    Args:
        log_level: How much goes to stderr.
        access_log: One line for each request.
    """
    from embedserve.serve import serve as serve_config

    def ready(url: str) -> None:
        print(
            f"EmbedServe {embedserve.__version__} serves '{config.encoder}' at {url} (Ctrl-C stops)",
            flush=True,
        )

    serve_config(config, log_level=log_level, access_log=access_log, ready=ready)
    return OK
