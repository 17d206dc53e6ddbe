"""Vector stores: one protocol, several engines.

    with open_store("file:data/store", dim=640) as store: ...

`ENGINES` is the list of engines; a new one is a line there and a subclass of the conformance suite.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from urllib.parse import unquote

from indexes.base import StoreError, VectorStore

__all__ = ["ENGINES", "open_store"]


def _local(place: str, dim: int) -> VectorStore:
    from indexes.local import LocalStore

    return LocalStore(unquote(place.removeprefix("//localhost").removeprefix("//")), dim)


def _memory(place: str, dim: int) -> VectorStore:
    from indexes.exact import ExactStore

    if place.strip("/"):
        raise StoreError(f"memory: keeps nothing and takes no name, but got '{place}'; use file:{place}.")
    return ExactStore(dim)


ENGINES: dict[str, Callable[[str, int], VectorStore]] = {
    "file": _local,
    "memory": _memory,
}
"""Scheme → opener, which gets what follows the colon, and the dimension."""


def open_store(url_or_path: object, dim: int) -> VectorStore:
    """Opens a store: `file:FOLDER` or a bare path for the embedded one, `memory:` for a fleeting one.

    Raises StoreError for an unknown scheme, and what the engine raises.
    """
    text = str(url_or_path)
    # One letter before the colon is a Windows drive; a scheme is longer (RFC 3986, 3.1).
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    if scheme is None:
        from indexes.local import LocalStore

        return LocalStore(text, dim)
    name = scheme[1].lower()
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f"did you mean '{near[0]}:'? " if near else ""
        known = ", ".join(f"'{each}:'" for each in sorted(ENGINES))
        raise StoreError(
            f"unknown store '{name}:'; {hint}Known are {known} and a bare path. For a folder whose name "
            f"holds a colon write 'file:{text}'."
        )
    return ENGINES[name](text[scheme.end() :], dim)
