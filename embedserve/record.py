"""collection.json: what a collection's folder says about itself. Written whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from embedserve.errors import EmbedServeError, InvalidField

__all__ = ["Record", "check_name", "is_name", "make", "read", "remove", "sweep", "write"]

FILE = "collection.json"
NEW, TRASH = ".new-", ".trash-"  # no name starts with a dot, so these are never taken for collections

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Record(BaseModel):
    """The contents of collection.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    description: str = ""
    metadata: Mapping[str, Any] = {}
    dim: PositiveInt
    """Numbers kept of each vector; fewer than the encoder gives where the collection was made so."""
    encoder: str
    """The bundle's name, for people."""
    fingerprint: str
    """The bundle's fingerprint, which decides whether vectors can be compared."""
    created: datetime


def is_name(name: str) -> bool:
    """Whether a collection may have this name; no other is ever joined to a path."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    if not is_name(name):
        raise InvalidField(
            f"'{name[:80]}' cannot be the name of a collection; use 1 to 64 of a-z, 0-9, '_' and '-', "
            "starting with a letter or digit.",
            param="name",
        )


def read(folder: Path) -> Record:
    """Raises EmbedServeError with code "collection_damaged"."""
    path = folder / FILE
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        why = f"is malformed at {where}: {first['msg']}"
    raise EmbedServeError(
        f"Collection '{folder.name}' is damaged: {FILE} {why}. Restore the folder from a backup, "
        "or delete the collection and index its images again.",
        code="collection_damaged",
    )


def write(folder: Path, record: Record) -> None:
    """Durable: temporary file, fsync, rename, fsync of the folder."""
    temporary = folder / f".{FILE}.{secrets.token_hex(4)}"
    try:
        with temporary.open("wb") as file:
            file.write(record.model_dump_json(indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)


def make(folder: Path, record: Record) -> None:
    """A new collection's folder; after a crash it is there with its record, or not at all."""
    new = folder.parent / f"{NEW}{folder.name}-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        write(new, record)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Deletes a collection's folder; after a crash it is there as it was, or not at all."""
    trash = folder.parent / f"{TRASH}{folder.name}-{secrets.token_hex(4)}"
    folder.rename(trash)
    _sync(folder.parent)
    shutil.rmtree(trash, ignore_errors=True)  # what is left over goes at the next start


def sweep(parent: Path) -> None:
    """Deletes what a crash in `make` or `remove` left behind."""
    for path in parent.iterdir():
        if path.name.startswith(NEW):
            with suppress(FileNotFoundError):
                # One of this minute may be another process's, at work on the same data.
                if time.time() - path.stat().st_mtime > 60:
                    shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(TRASH):
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
