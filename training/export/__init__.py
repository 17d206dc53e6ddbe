"""Networks become encoder bundles: `embedserve export SOURCE --out FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from embedserve.bundle import Bundle
from embedserve.errors import InvalidField, closest

__all__ = ["SOURCES", "export"]


def _starter(out: Path) -> Bundle:
    from training.starter.build import build

    return build(out)


SOURCES: dict[str, Callable[[Path], Bundle]] = {"starter": _starter}
"""Source name → what writes its bundle to a folder."""


def export(source: str, out: Path) -> Bundle:
    """Writes the encoder bundle of `source` to the folder `out`, replacing a bundle that is there.

    Args:
        source: A key of `SOURCES`.
        out: New, empty, or the folder of a bundle. It is replaced only once the new bundle is complete.

    Raises:
        InvalidField: The source is unknown.
        BundleError: `out` holds something else, or an ingredient is missing.
        ModuleNotFoundError: torch or another package of the extra `train` is not installed.
    """
    if source not in SOURCES:
        raise InvalidField(
            f"'{source}' cannot be exported; {closest(source, SOURCES)}",
            param="source",
            code="unknown_source",
        )
    return SOURCES[source](Path(out))
