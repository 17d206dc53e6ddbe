"""The cache of decoded pixels: reused, made anew where it must be; crashes, races and full disks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedserve.errors import BadRequest, EmbedServeError, TooLarge
from tests.training.data.samples import NOBODY, encoded, folder_of, in_child, picture
from training.data import Source, open_source
from training.data.cache import Entry, default_folder, load_or_build

NAMES = [f"{number}.png" for number in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "images", NAMES)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def built(source: Source, cache: Path, size: int = 6, threads: int = 2) -> Entry:
    return load_or_build(source, size, cache, threads=threads, progress=lambda done, total: None)


def watched(source: Source, before: Callable[[int], None]) -> Source:
    """The source, with something to do before each image is fetched."""
    fetch = source.fetch

    def watching(row: int) -> Any:
        before(row)
        return fetch(row)

    return replace(source, fetch=watching)


def never(source: Source) -> Source:
    def fetch(row: int) -> bytes:
        raise AssertionError("the cache was not used")

    return replace(source, fetch=fetch)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def same(one: Entry, other: Entry) -> bool:
    assert one.pixels is not None
    assert other.pixels is not None
    return bool(np.array_equal(one.pixels, other.pixels) and np.array_equal(one.aspect, other.aspect))


# --------------------------------------------------------------------------------------------- reuse


def test_the_second_time_nothing_is_decoded(folder: Path, cache: Path) -> None:
    first = built(open_source(folder), cache)
    again = built(never(open_source(folder, label_by="name", group_by="folder")), cache)
    assert same(first, again)
    assert isinstance(again.pixels, np.memmap)
    [entry] = cache.iterdir()
    assert {file.name for file in entry.iterdir()} == {"pixels.npy", "aspect.npy", "index.json"}
    assert json.loads((entry / "index.json").read_text())["images"] == 8


def test_the_shapes_alone_take_no_pixels(folder: Path, cache: Path) -> None:
    entry = built(open_source(folder), cache, size=0)
    assert entry.pixels is None
    assert entry.aspect.tolist() == [np.float32(24 / 18)] * 8
    assert built(never(open_source(folder)), cache, size=0).aspect.tolist() == entry.aspect.tolist()
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 1000


def test_another_size_another_image_and_a_changed_file_are_decoded_anew(folder: Path, cache: Path) -> None:
    built(open_source(folder), cache)
    built(open_source(folder), cache, size=7)
    assert len(entries(cache)) == 2
    os.utime(folder / "3.png", (1, 1))
    built(open_source(folder), cache)
    assert len(entries(cache)) == 3
    built(open_source(folder).select(np.arange(5)), cache)
    assert len(entries(cache)) == 4


@pytest.mark.parametrize("file", ["pixels.npy", "aspect.npy", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_entry_is_made_anew(folder: Path, cache: Path, file: str, damage: str) -> None:
    source = open_source(folder)
    first = built(source, cache)
    pixels = np.array(first.pixels)
    [entry] = cache.iterdir()
    path = entry / file
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 5)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"[]")
    again = built(source, cache)
    assert again.pixels is not None
    assert np.array_equal(pixels, again.pixels)
    assert len(entries(cache)) == 1


def test_an_image_that_can_be_read_again_is_taken_in(folder: Path, cache: Path) -> None:
    source = open_source(folder)

    def out_of_reach(row: int) -> None:
        if row == 3:
            raise OSError(errno.EIO, "Input/output error")

    first = built(watched(source, out_of_reach), cache)
    assert [(one.row, one.reason) for one in first.failures] == [(3, "cannot be read: Input/output error")]
    assert len(built(watched(source, out_of_reach), cache).failures) == 1
    again = built(source, cache)
    assert again.failures == []
    assert len(again.aspect) == 8


def test_a_broken_image_is_not_tried_again(folder: Path, cache: Path) -> None:
    (folder / "3.png").write_bytes(encoded(picture(3))[:50])
    assert [one.row for one in built(open_source(folder), cache).failures] == [3]
    assert [one.row for one in built(never(open_source(folder)), cache).failures] == [3]


def test_the_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "pixels"
    monkeypatch.delenv("EMBEDSERVE_CACHE")
    assert default_folder() == Path.home() / ".cache" / "embedserve" / "pixels"


# ----------------------------------------------------------------------------- crashes and companions


def test_a_killed_build_leaves_nothing_that_counts_and_the_next_removes_it(folder: Path, cache: Path) -> None:
    source = open_source(folder)

    def killed(row: int) -> None:
        if row == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="SIGKILL"):
        in_child(lambda: built(watched(source, killed), cache, threads=1))
    assert any(name.endswith(".part") for name in entries(cache))
    entry = built(source, cache)
    assert same(entry, built(source, cache / "fresh"))
    [left] = [name for name in entries(cache) if name != "fresh"]
    assert (cache / left / "index.json").exists()


def test_an_interrupted_build_cleans_up(folder: Path, cache: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_build(open_source(folder), 6, cache, threads=2, progress=interrupt)
    assert entries(cache) == []


def build_at_once(source: Source, cache: Path, log: Path, count: int) -> list[np.ndarray]:
    """What `count` processes get that begin together. `log` receives one byte per image that any decodes."""

    def slowly(row: int) -> None:
        time.sleep(0.02)
        with log.open("ab", buffering=0) as file:
            file.write(b".")

    def build() -> np.ndarray:
        while time.monotonic() < start:
            time.sleep(0.001)
        return np.array(built(watched(source, slowly), cache, threads=1).pixels)

    start = time.monotonic() + 0.2
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: in_child(build), range(count)))


def test_of_processes_that_begin_together_one_builds_and_the_others_wait(folder: Path, cache: Path) -> None:
    source = open_source(folder)
    got = build_at_once(source, cache, folder.parent / "log", 3)
    assert all(np.array_equal(got[0], one) for one in got[1:])
    assert (folder.parent / "log").stat().st_size == 8
    assert len(entries(cache)) == 1  # and no lock is left


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before removes it on its way out, and a third one may already hold its successor."""
    flock, taken = fcntl.flock, []

    def waiting(file: Any, operation: int) -> None:
        flock(file, operation)
        taken.append(file.name)
        if len(taken) == 1:
            Path(file.name).unlink()

    monkeypatch.setattr(fcntl, "flock", waiting)
    built(open_source(folder), cache)
    assert len(taken) == 2


def test_on_a_disk_without_locks_the_first_to_end_wins(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    got = build_at_once(open_source(folder), cache, folder.parent / "log", 2)
    assert np.array_equal(got[0], got[1])
    assert (folder.parent / "log").stat().st_size == 16
    assert len(entries(cache)) == 1


# ----------------------------------------------------------------------------------------- full disks


def test_a_disk_without_room_is_refused_beforehand(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    decoded: list[int] = []
    with pytest.raises(
        TooLarge, match=r"8 images, 6 × 6 each, needs 66,432 bytes; .* has 1,000 bytes free\. .*'stream'"
    ):
        built(watched(open_source(folder), decoded.append), cache)
    assert decoded == []
    assert entries(cache) == []


def test_a_disk_that_fills_up_is_an_error_and_not_a_bus_error(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = Path.open

    def onto_a_full_disk(path: Path, *args: Any, **options: Any) -> Any:
        return plain_open(Path("/dev/full") if path.name == "pixels.npy" else path, *args, **options)

    monkeypatch.setattr(Path, "open", onto_a_full_disk)
    with pytest.raises(TooLarge, match=r"bytes free \(No space left on device\)\. Make room"):
        built(open_source(folder), cache, size=200)
    assert entries(cache) == []


def test_a_limit_on_file_sizes_is_told_as_a_full_disk(folder: Path, cache: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        built(open_source(folder), cache, size=200)

    with pytest.raises(EmbedServeError, match=r"needs 1,025,\d+ bytes; .*\(File too large\)"):
        in_child(limited)
    assert entries(cache) == []


def test_a_cache_that_may_not_be_written_is_refused(folder: Path) -> None:
    source = open_source(folder)
    with pytest.raises(BadRequest, match=r"cannot be written: .*Set EMBEDSERVE_CACHE"):
        in_child(lambda: built(source, Path("/proc/self/cache")), user=NOBODY if os.geteuid() == 0 else None)


def test_a_file_where_the_cache_should_be_is_refused(folder: Path, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(BadRequest, match="File exists"):
        built(open_source(folder), cache)
