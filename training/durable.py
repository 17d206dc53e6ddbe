"""Files of a run that are either whole or as they were before, whenever the process or the machine dies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from embedserve.errors import EmbedServeError
from indexes.durable import fsync_folder

__all__ = ["TEMPORARY", "replacing"]

TEMPORARY = ".tmp"
"""How the name of a file ends that is being written; a killed process leaves at most such a file behind."""

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than allowed",
}


@contextmanager
def replacing(path: Path, *, needed: int = 0) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends: written, flushed to the disk, renamed.

    Args:
        path: In a folder that exists.
        needed: Bytes that will be written, for the message; 0 where nobody knows.

    Raises:
        EmbedServeError: It cannot be written. `path` is as it was, and nothing is left beside it. When the
            disk is full, the message has the free and the needed bytes and the code is 'disk_full'.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # first: free bytes are those that the next attempt will find
        raise _refused(path, error, needed) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refused(path: Path, error: OSError, needed: int) -> EmbedServeError:
    if error.errno not in FULL:
        return EmbedServeError(
            f"'{path}' cannot be written: {error.strerror or error}. Check the folder and its disk."
        )
    free = shutil.disk_usage(path.parent).free
    room = f"{free:,} bytes are free" + (f" and about {needed:,} are needed" if needed else "")
    return EmbedServeError(
        f"'{path}' cannot be written: {FULL[error.errno]}; {room}. What was there before is unharmed. "
        "Free some space, keep fewer checkpoints, or write the run to another disk.",
        code="disk_full",
    )
