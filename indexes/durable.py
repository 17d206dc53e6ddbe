"""Files that survive a crash, and a lock on a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from indexes.base import StoreLocked

__all__ = ["FolderLock", "fsync_file", "fsync_folder", "sha256_of", "write_durably"]


def fsync_file(path: Path) -> None:
    """Makes a file that another library wrote durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Makes the names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, chunks: Iterable[bytes]) -> None:
    """Temporary file → fsync → rename → fsync of the folder: `path` is either whole or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FolderLock:
    """One process at a time. The kernel drops the lock when its holder ends, however it ends.

    Raises StoreLocked at once where another holder, in this process or another, is alive.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read(20).strip() or "unknown"
            self._file.close()
            raise StoreLocked(
                f"the store in '{folder}' is open in another process (pid {holder}), and one at a time may "
                "have it. Stop that process first."
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Lets the next one in. Releasing twice is harmless."""
        self._file.close()
