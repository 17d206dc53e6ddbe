"""Decoded pixels on disk, made once per data set and size.

    <cache>/<key>/pixels.npy     uint8 [N, S, S, 3]; absent where only the shapes were asked for
                  aspect.npy     float32 [N], width ÷ height of the originals
                  index.json     which images were skipped, and why

An entry is renamed into place once all of it is on the disk, so it is whole or not there. One process at a
time builds it, under a lock that ends with the process; what a killed one left, the next to build removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest, TooLarge
from training.data.ahead import in_order
from training.data.listing import shown
from training.data.source import Source
from training.data.squares import Decoded, Failure, decode_rows

__all__ = ["Entry", "default_folder", "load_or_build"]

FORMAT = 1
"""Raised whenever the same image would come out with other pixels."""

CHUNK_BYTES = 4 * 2**20
"""Pixels that one thread decodes before it hands them over."""

Progress = Callable[[int, int], None]
"""Called with (images finished, images in all)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the cache knows of a source."""

    pixels: NDArray[np.uint8] | None
    """[N, S, S, 3], mapped from the disk; None where only the shapes were asked for."""
    aspect: NDArray[np.float32]
    """[N]"""
    failures: list[Failure]
    """The images of the source that are not among the N."""


def default_folder() -> Path:
    """`$EMBEDSERVE_CACHE/pixels`, or `~/.cache/embedserve/pixels`."""
    home = os.environ.get("EMBEDSERVE_CACHE")
    return Path(home).expanduser() / "pixels" if home else Path.home() / ".cache" / "embedserve" / "pixels"


def load_or_build(source: Source, size: int, folder: Path, *, threads: int, progress: Progress) -> Entry:
    """The entry of a source at a size, decoded now if there is none yet. A bad image is one of its failures.

    Args:
        size: Pixels of a side; 0 for the shapes alone, which takes next to no disk.

    Raises BadRequest when no image could be decoded or the folder not be written, TooLarge when the disk is
    full.
    """
    key = hashlib.sha256(f"{FORMAT} {size} {source.content}".encode()).hexdigest()[:32]
    place = folder / key
    entry = _load(place, source, size)
    if entry is not None:
        return entry
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock") as alone:
            if alone:
                entry = _load(place, source, size)  # another process may have made it while this one waited
                if entry is not None:
                    return entry
                for leftover in (place, *folder.glob(f"{key}.*.part")):
                    shutil.rmtree(leftover, ignore_errors=True)
            _check_space(folder, source, size)
            _build(source, size, place, threads, progress)
    except OSError as error:
        raise _explained(error, folder, source, size) from error
    entry = _load(place, source, size)
    if entry is None:
        raise BadRequest(f"The cache '{place}' changes while it is read; remove that folder and try again.")
    return entry


# --------------------------------------------------------------------------------------------- reading


def _load(place: Path, source: Source, size: int) -> Entry | None:
    """None where there is no entry, it is damaged, or an image that was out of reach can be had again."""
    try:
        index = json.loads((place / "index.json").read_text("utf-8"))
        failures = [Failure(**one) for one in index["failures"]]
        aspect: NDArray[np.float32] = np.load(place / "aspect.npy")
        pixels = np.load(place / "pixels.npy", mmap_mode="r") if size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    images = len(source) - len(failures)
    if aspect.shape != (images,) or (pixels is not None and pixels.shape != (images, size, size, 3)):
        return None
    if any(_can_be_had(source, one.row) for one in failures if one.unread):
        return None
    return Entry(pixels, aspect, failures)


def _can_be_had(source: Source, row: int) -> bool:
    try:
        source.fetch(row)
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------- building


def _build(source: Source, size: int, place: Path, threads: int, progress: Progress) -> None:
    """Decodes everything into a folder beside `place`, then renames it."""
    part = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        _write(source, size, part, threads, progress)
        _sync(part)
        try:
            part.rename(place)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            # Without locks (some network disks have none) another process was faster; its entry is as good.
        _sync(place.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(source: Source, size: int, part: Path, threads: int, progress: Progress) -> None:
    """Pixels are appended, never mapped: a full disk is then an error instead of a bus error."""
    total = len(source)
    step = max(1, min(256, CHUNK_BYTES // max(1, size * size * 3)))
    chunks = [range(start, min(start + step, total)) for start in range(0, total, step)]
    aspects: list[NDArray[np.float32]] = []
    failures: list[Failure] = []
    with contextlib.ExitStack() as stack:
        out = stack.enter_context((part / "pixels.npy").open("wb")) if size else None
        if out is not None:
            _write_header(out, total, size)
        if not source.encoded:
            threads = 1  # microseconds an image: more would only wait for each other's interpreter lock
        decoded = in_order(partial(_decode, source, size), chunks, threads=threads, ahead=2 * threads)
        stack.callback(decoded.close)
        progress(0, total)
        for rows, some in zip(chunks, decoded, strict=True):
            if out is not None:
                out.write(some.pixels.data)
            aspects.append(some.aspect)
            failures += some.failures
            progress(rows.stop, total)
        if len(failures) == total:
            raise BadRequest(_nothing_decoded(source, failures))
        if out is not None:
            _write_header(out, total - len(failures), size)
            out.flush()
            os.fsync(out.fileno())
    _write_durably(part / "aspect.npy", lambda file: np.save(file, np.concatenate(aspects)))
    index = {"format": FORMAT, "source": source.location, "size": size, "images": total - len(failures)}
    text = json.dumps({**index, "failures": [asdict(one) for one in failures]}, indent=1)
    _write_durably(part / "index.json", lambda file: file.write(text.encode()))


def _decode(source: Source, size: int, rows: range) -> Decoded:
    return decode_rows(source, rows, size)


def _write_header(out: BinaryIO, images: int, size: int) -> None:
    """NumPy leaves room for the first dimension, so the header can be corrected at the end."""
    out.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (images, size, size, 3)}
    np.lib.format.write_array_header_1_0(out, header)


def _write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits until no other process is in here. False where the disk has no locks."""
    try:
        file = _locked(path)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        yield False
        return
    with file:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # the process before this one removed it on its way out, so another may make it anew
        except BaseException:
            file.close()
            raise
        file.close()


# ---------------------------------------------------------------------------------------------- errors


def _needed(source: Source, size: int) -> int:
    return len(source) * (size * size * 3 + 4) + 2**16


def _check_space(folder: Path, source: Source, size: int) -> None:
    if shutil.disk_usage(folder).free < _needed(source, size):
        raise _full(folder, source, size)


def _explained(error: OSError, folder: Path, source: Source, size: int) -> BadRequest | TooLarge:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return _full(folder, source, size, f" ({error.strerror})")
    return BadRequest(
        f"The cache of decoded images in '{folder}' cannot be written: {error.strerror or error}. "
        "Set EMBEDSERVE_CACHE to a folder that can."
    )


def _full(folder: Path, source: Source, size: int, why: str = "") -> TooLarge:
    what = f"pixels of {len(source):,} images, {size} × {size} each," if size else f"{len(source):,} shapes"
    needed, free = _needed(source, size), shutil.disk_usage(folder).free
    return TooLarge(
        f"The cache of {what} needs {needed:,} bytes; '{folder}' has {free:,} bytes free{why}. "
        "Make room, set EMBEDSERVE_CACHE to a folder on a larger disk, or use the residence 'stream', which "
        "decodes anew each time and stores no pixels."
    )


def _nothing_decoded(source: Source, failures: list[Failure]) -> str:
    reasons = shown((f"{source.keys[one.row]}: {one.reason}" for one in failures), most=3)
    return f"None of the {len(source):,} images of '{source.name}' can be decoded: {reasons}."
