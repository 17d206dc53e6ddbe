"""What only the embedded store does: durable files, a cache that may be lost, one writer, one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexes.base import InvalidId, InvalidVector, StoreCorrupt, StoreError, StoreLocked
from indexes.local import LocalStore
from tests.indexes.conformance import DIM, fill, vector

ROWS = 120


def open_small(folder: Path) -> LocalStore:
    """Segments of some 32 rows, so that small tests have several."""
    return LocalStore(folder, DIM, tail_rows=32)


def write_store(folder: Path) -> np.ndarray:
    with open_small(folder) as store:
        vectors = np.concatenate([_filled(store, start) for start in range(0, ROWS, 30)])
        store.delete(["0005"])
    return vectors


def _filled(store: LocalStore, start: int) -> np.ndarray:
    vectors = np.random.default_rng(start).standard_normal((30, DIM)).astype(np.float32)
    numbers = range(start, start + 30)
    store.upsert([f"{i:04}" for i in numbers], vectors, [{"n": i} for i in numbers])
    return vectors


def cache_state(store: LocalStore) -> str:
    return str(store.stats()["index"]["cache"])


def assert_whole(store: LocalStore, vectors: np.ndarray) -> None:
    """All rows but the deleted one, each found by its own vector."""
    assert store.count() == ROWS - 1
    answers = store.search(vectors, ROWS)
    for i, hits in enumerate(answers):
        assert len(set(hits.ids)) == ROWS - 1
        assert "0005" not in hits.ids
        if i != 5:
            assert hits.ids[0] == f"{i:04}"
            assert hits.metadata[0] == {"n": i}


# ------------------------------------------------------------------------------------- the cache


def test_a_reopened_store_loads_its_index(tmp_path: Path) -> None:
    vectors = write_store(tmp_path)
    with open_small(tmp_path) as store:
        assert cache_state(store) == "loaded"
        assert_whole(store, vectors)


def _first_segment(folder: Path) -> Path:
    return min((folder / "index").glob("*.segment"), key=lambda path: path.stat().st_size)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def _manifest(folder: Path, **changes: object) -> None:
    path = folder / "index" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(_first_segment(folder), 100),
    "emptied": lambda folder: os.truncate(_first_segment(folder), 0),
    "byte flipped in the numbers": lambda folder: _flip(_first_segment(folder), 3),
    "byte flipped in the vectors": lambda folder: _flip(_first_segment(folder), -9),
    "segment missing": lambda folder: _first_segment(folder).unlink(),
    "manifest missing": lambda folder: (folder / "index" / "manifest.json").unlink(),
    "manifest is no JSON": lambda folder: (folder / "index" / "manifest.json").write_text("{"),
    "manifest is a list": lambda folder: (folder / "index" / "manifest.json").write_text("[]"),
    "another format": lambda folder: _manifest(folder, format=99),
    "another dimension": lambda folder: _manifest(folder, dim=7),
    "covers too much": lambda folder: _manifest(folder, covered=10**6),
    "lists nothing but covers all": lambda folder: _manifest(folder, segments=[]),
    "folder missing": lambda folder: shutil.rmtree(folder / "index"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_rebuilt_from_the_truth(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    vectors = write_store(tmp_path)
    damage(tmp_path)
    with open_small(tmp_path) as store:
        assert cache_state(store) in ("rebuilt", "none")
        assert_whole(store, vectors)
    with open_small(tmp_path) as store:
        assert cache_state(store) == "loaded"
        assert_whole(store, vectors)


def test_a_cache_older_than_the_truth_is_brought_up_to_it(tmp_path: Path) -> None:
    """As after a kill: rows were added, replaced and deleted after the cache was last written."""
    folder, old = tmp_path / "store", tmp_path / "old"
    vectors = write_store(folder)
    shutil.copytree(folder / "index", old)
    with open_small(folder) as store:
        store.upsert(["new", "0001"], np.eye(2, DIM, dtype=np.float32))
        store.delete(["0002", "0003"])
    shutil.rmtree(folder / "index")
    shutil.copytree(old, folder / "index")
    with open_small(folder) as store:
        assert cache_state(store) == "loaded"
        assert store.count() == ROWS - 2
        (hits,) = store.search(vector(1, 0, 0, 0), ROWS)
        assert hits.ids[0] == "new"
        assert not {"0002", "0003", "0005"} & set(hits.ids)
        assert store.search(vectors[1:2], ROWS)[0].scores[0] < 1 or np.allclose(vectors[1, [0, 2, 3]], 0)
        assert store.search(vector(0, 1, 0, 0), 1)[0].ids == ("0001",)


def test_a_cache_newer_than_the_truth_is_not_believed(tmp_path: Path) -> None:
    """As after someone put back yesterday's database by hand, next to today's index."""
    folder, old = tmp_path / "store", tmp_path / "old.sqlite"
    vectors = write_store(folder)
    shutil.copy(folder / "items.sqlite", old)
    with open_small(folder) as store:
        store.upsert([f"late{i}" for i in range(40)], np.ones((40, DIM), np.float32))
    shutil.copy(old, folder / "items.sqlite")
    with open_small(folder) as store:
        assert cache_state(store) == "rebuilt"
        assert_whole(store, vectors)
        store.upsert(["next"], vector(1, 2, 3, 4), [{"n": -1}])
        assert store.search(vector(1, 2, 3, 4), 1, filter={"n": -1})[0].ids == ("next",)


def test_a_cache_of_another_store_is_not_believed(tmp_path: Path) -> None:
    vectors = write_store(tmp_path / "one")
    with open_small(tmp_path / "two") as store:
        store.upsert([f"{i}" for i in range(ROWS)], np.ones((ROWS, DIM), np.float32))
    shutil.rmtree(tmp_path / "one" / "index")
    shutil.copytree(tmp_path / "two" / "index", tmp_path / "one" / "index")
    with open_small(tmp_path / "one") as store:
        assert cache_state(store) == "rebuilt"
        assert_whole(store, vectors)


def test_files_that_nothing_names_are_removed(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "index" / "abc.segment.tmp").write_bytes(b"left by a crash")
    open_small(tmp_path).close()
    named = {
        f"{s['sha256']}.segment"
        for s in json.loads((tmp_path / "index/manifest.json").read_text())["segments"]
    }
    assert {path.name for path in (tmp_path / "index").iterdir()} == named | {"manifest.json"}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    vectors = write_store(tmp_path)
    shutil.rmtree(tmp_path / "index")
    store = open_small(tmp_path)
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").write_text("a file where the folder was")
    store.close()
    (tmp_path / "index").unlink()
    with open_small(tmp_path) as store:
        assert_whole(store, vectors)


def test_small_stores_open_quickly(tmp_path: Path) -> None:
    with LocalStore(tmp_path, 640) as store:
        vectors = np.random.default_rng(0).standard_normal((1000, 640)).astype(np.float32)
        store.upsert([str(i) for i in range(1000)], vectors)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        store = LocalStore(tmp_path, 640)
        times.append(time.perf_counter() - start)
        store.close()
    assert min(times) < 0.05


def test_deleting_and_replacing_for_long_keeps_the_index_compact(tmp_path: Path) -> None:
    with open_small(tmp_path) as store:
        for turn in range(12):
            fill(store, 100, seed=turn)
            store.delete(filter={"even": True})
        index = store.stats()["index"]
        assert store.count() == 50
        assert index["deleted"] <= 50
        assert index["segments"] <= 5


# ------------------------------------------------------------------------------ damage to the truth


def _damage_row(folder: Path, sql: str) -> None:
    connection = sqlite3.connect(folder / "items.sqlite")
    with connection:
        assert connection.execute(sql).rowcount == 1
    connection.close()


ROW_DAMAGE = {
    "vector changed": "UPDATE vectors SET vector = zeroblob(8) WHERE n = 8",
    "vector too short": "UPDATE vectors SET vector = x'00' WHERE n = 8",
    "vector gone": "DELETE FROM vectors WHERE n = 8",
    "metadata changed": "UPDATE items SET metadata = '{\"n\":1}' WHERE n = 8",
    "metadata no JSON": "UPDATE items SET metadata = '{' WHERE n = 8",
    "metadata no Unicode": "UPDATE items SET metadata = CAST(x'7BFF7D' AS TEXT) WHERE n = 8",
    "checksum changed": "UPDATE items SET crc = crc + 1 WHERE n = 8",
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("sql", ROW_DAMAGE.values(), ids=ROW_DAMAGE.keys())
def test_a_damaged_item_is_reported_and_never_returned(tmp_path: Path, sql: str, cached: bool) -> None:
    vectors = write_store(tmp_path)
    _damage_row(tmp_path, sql)
    if not cached:
        shutil.rmtree(tmp_path / "index")
    with open_small(tmp_path) as store:
        for wanted in (None, {"n": {"$gte": 0}}, {"n": 1}):
            (hits,) = store.search(vectors[7:8], ROWS, filter=wanted)
            assert "0007" not in hits.ids
        assert len(store.search(vectors[7:8], ROWS)[0]) == ROWS - 2
        assert store.stats()["damaged"] == 1
        assert store.count() == ROWS - 2
        with pytest.raises(StoreCorrupt, match="'0007' is damaged"):
            store.get(["0006", "0007"])
        assert set(store.get(["0006"])) == {"0006"}
        assert [item.id for item in store.scan(limit=8)][-2:] == ["0008", "0009"]
        assert len(list(store)) == ROWS - 2
        store.upsert(["0007"], vectors[7:8], [{"n": 7}])
        assert store.stats()["damaged"] == 0
    with open_small(tmp_path) as store:
        assert_whole(store, vectors)


def test_a_damaged_item_can_be_deleted(tmp_path: Path) -> None:
    write_store(tmp_path)
    _damage_row(tmp_path, ROW_DAMAGE["metadata no JSON"])
    with open_small(tmp_path) as store:
        assert store.delete(["0007"]) == 1
        assert store.get(["0007"]) == {}


def test_a_snapshot_leaves_damaged_items_out(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    _damage_row(tmp_path / "store", ROW_DAMAGE["vector changed"])
    with open_small(tmp_path / "store") as store:
        store.snapshot(tmp_path / "copy")
        store.restore(tmp_path / "copy")
        assert store.count() == len(list(store)) == ROWS - 2
        assert store.stats()["damaged"] == 0


def test_a_file_that_is_no_database_is_named_corrupt(tmp_path: Path) -> None:
    (tmp_path / "items.sqlite").write_bytes(b"this is no SQLite file" * 1000)
    with pytest.raises(StoreCorrupt, match="Restore a snapshot"):
        LocalStore(tmp_path, DIM)


def test_a_database_with_a_broken_page_is_named_corrupt(tmp_path: Path) -> None:
    write_store(tmp_path)
    database = tmp_path / "items.sqlite"
    database.write_bytes(database.read_bytes()[: 8192 * 2])
    with pytest.raises(StoreCorrupt), open_small(tmp_path) as store:
        store.get(["0001"])


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "items.sqlite")
    connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    with pytest.raises(StoreError, match="another program"):
        LocalStore(tmp_path, DIM)


def test_another_dimension_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    with pytest.raises(StoreError, match=r"vectors of 4 numbers, and 8 were asked for. Open it with dim=4"):
        LocalStore(tmp_path, 8)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    connection = sqlite3.connect(tmp_path / "items.sqlite")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreError, match="has schema 99, and this version reads schema 1"):
        LocalStore(tmp_path, DIM)
    with pytest.raises(StoreError, match="schema 99"):  # and not "locked": the lock was given back
        LocalStore(tmp_path, DIM)


def test_a_snapshot_of_another_dimension_is_refused(tmp_path: Path) -> None:
    with LocalStore(tmp_path / "a", 3) as store:
        store.snapshot(tmp_path / "copy")
    with LocalStore(tmp_path / "b", DIM) as store, pytest.raises(StoreError, match="vectors of 3 numbers"):
        store.restore(tmp_path / "copy")


# --------------------------------------------------------------------------------- one at a time


def test_a_second_holder_is_told_what_to_do(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        with pytest.raises(StoreLocked, match=rf"pid {os.getpid()}.*Stop that process"):
            LocalStore(tmp_path, DIM)
        store.upsert(["a"], vector(1, 0, 0, 0))
    LocalStore(tmp_path, DIM).close()


HOLDER = """
import sys
from indexes.local import LocalStore
store = LocalStore(sys.argv[1], 4)
print("open", flush=True)
sys.stdin.read()
"""


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(StoreLocked, match=f"pid {holder.pid}"):
            LocalStore(tmp_path, DIM)
        holder.send_signal(signal.SIGKILL)
    LocalStore(tmp_path, DIM).close()


# ---------------------------------------------------------------------------------- group commit


def _in_one_group(store: LocalStore, *calls: Callable[[], object]) -> list[BaseException | None]:
    """Runs the calls in threads of their own, queued in this order behind a held commit; what each raised."""
    writer: Any = store._writer
    raised: list[BaseException | None] = [None] * (len(calls) + 1)
    holding, release = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> object:
        holding.set()
        release.wait()
        raise StoreError("held")

    def run(at: int, call: Callable[[], object]) -> None:
        try:
            call()
        except StoreError as error:
            raised[at] = error

    threads = [threading.Thread(target=run, args=(-1, lambda: writer.submit(hold)))]
    threads[0].start()
    holding.wait()
    for at, call in enumerate(calls):
        threads.append(threading.Thread(target=run, args=(at, call)))
        with writer._wake:
            threads[-1].start()
            writer._wake.wait_for(lambda: len(writer._queue) > at)  # noqa: B023 - called at once
    release.set()
    for thread in threads:
        thread.join()
    return raised[:-1]


def test_callers_who_wait_share_one_commit(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        before = store.stats()["commits"]
        calls = [lambda i=i: store.upsert([f"id{i}"], vector(1, i, 0, 0), [{"i": i}]) for i in range(40)]
        assert _in_one_group(store, *calls) == [None] * 40
        assert store.stats()["commits"] == before + 1
        assert store.count() == 40
        assert store.count({"i": {"$lt": 10}}) == 10


def test_writes_of_one_commit_keep_their_order(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        removed: list[int] = []
        _in_one_group(
            store,
            lambda: store.upsert(["a"], vector(1, 0, 0, 0), [{"v": 1}]),
            lambda: removed.append(store.delete(["a"])),
            lambda: store.upsert(["a"], vector(0, 1, 0, 0), [{"v": 2}]),
            lambda: store.upsert(["a"], vector(0, 0, 1, 0), [{"v": 3}]),
        )
        assert removed == [1]
        assert store.count() == 1
        assert store.search(vector(0, 0, 1, 0), 5)[0].metadata == ({"v": 3},)


def test_a_caller_whose_write_fails_fails_alone(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:

        def bad() -> None:
            def work(connection: sqlite3.Connection) -> object:
                connection.execute("DELETE FROM items")
                connection.execute("INSERT INTO items VALUES (NULL, NULL, NULL, NULL)")
                raise AssertionError("unreachable")

            store._writer.submit(work)  # type: ignore[arg-type]

        good = [lambda i=i: store.upsert([f"id{i}"], vector(1, i, 0, 0)) for i in range(6)]
        raised = _in_one_group(store, *good[:3], bad, *good[3:])
        assert [error is None for error in raised] == [True] * 3 + [False] + [True] * 3
        assert "NOT NULL" in str(raised[3])
        assert store.count() == 6
        assert len(store.search(vector(1, 0, 0, 0), 9)[0]) == 6


def test_input_is_checked_before_anyone_waits(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        with pytest.raises(InvalidVector):
            store.upsert(["a"], vector(0, 0, 0, 0))
        assert store.stats()["writes"] == 0


# ------------------------------------------------------------------------------------- disk full


def _limit_pages(store: LocalStore, more: int | None) -> None:
    """SQLite answers "disk full" beyond this size; None lifts the limit."""
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(
        f"PRAGMA max_page_count={pages + more if more is not None else 2**30}"
    ).fetchone()


def test_a_full_disk_fails_the_write_and_not_the_store(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        vectors = fill(store, 50)
        _limit_pages(store, 2)
        large = [{"text": "x" * 5000}] * 20
        with pytest.raises(StoreError, match="disk is full, so nothing of this request was stored"):
            store.upsert([f"0{i}" for i in range(20)], np.ones((20, DIM), np.float32), large)
        assert store.count() == 50
        assert store.search(vectors[:1], 100)[0].ids[0] == "0000"
        assert store.delete(["0001"]) == 1
        _limit_pages(store, None)
        store.upsert([f"0{i}" for i in range(20)], np.ones((20, DIM), np.float32), large)
        assert store.count() == 69
    with LocalStore(tmp_path, DIM) as store:
        assert store.count() == len(list(store)) == 69


def test_one_write_too_large_for_the_disk_does_not_fail_the_small_ones_beside_it(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        fill(store, 10)
        _limit_pages(store, 2)
        small = [lambda i=i: store.upsert([f"small{i}"], vector(1, i, 0, 0)) for i in range(4)]
        raised = _in_one_group(
            store,
            *small[:2],
            lambda: store.upsert(["large"], vector(1, 0, 0, 0), [{"text": "x" * 500_000}]),
            *small[2:],
        )
        assert [error is None for error in raised] == [True, True, False, True, True]
        assert "disk is full" in str(raised[2])
        assert store.count() == 14


# ------------------------------------------------------------------------------- the index lags


def test_an_index_that_could_not_follow_a_commit_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalStore(tmp_path, DIM) as store:
        vectors = fill(store, 20)

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(store._index, "apply", fail)
        store.upsert(["new"], vector(1, 0, 0, 0))
        store.delete(["0003"])
        monkeypatch.undo()
        assert store.search(vector(1, 0, 0, 0), 1)[0].ids == ("new",)
        assert "0003" not in store.search(vectors[3:4], 50)[0].ids
        assert store.count() == 20


# ---------------------------------------------------------------------- reads while writing


def test_a_snapshot_is_consistent_while_writes_go_on(tmp_path: Path) -> None:
    """Each write gives all items the same version, so a snapshot with two versions would be torn."""
    ids = [f"{i}" for i in range(50)]
    with LocalStore(tmp_path / "store", DIM) as store:
        store.upsert(ids, np.ones((50, DIM), np.float32), [{"v": 0}] * 50)
        stop = threading.Event()

        def write() -> None:
            version = 0
            while not stop.is_set():
                version += 1
                store.upsert(ids, np.ones((50, DIM), np.float32), [{"v": version}] * 50)

        writer = threading.Thread(target=write)
        writer.start()
        for i in range(5):
            store.snapshot(tmp_path / f"copy{i}")
        stop.set()
        writer.join()
    for i in range(5):
        with LocalStore(tmp_path / f"restored{i}", DIM) as restored:
            restored.restore(tmp_path / f"copy{i}")
            assert len({item.metadata["v"] for item in restored}) == 1
            assert restored.count() == 50


def test_closing_waits_for_those_at_work(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, DIM)
    vectors = fill(store, 500)
    answered = threading.Semaphore(0)
    ends: list[str] = []

    def use() -> None:
        try:
            while True:
                assert len(store.search(vectors[:4], 3)) == 4
                store.upsert(["more"], vectors[:1])
                answered.release()
        except StoreError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        answered.acquire()
    store.close()
    for thread in threads:
        thread.join()
    assert ends == ["the store is closed; open it again."] * 4


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot hold a store: Not a directory"):
        LocalStore(tmp_path / "file" / "store", DIM)


def test_the_write_ahead_log_stays_bounded_although_someone_always_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexes.local.LOG_BYTES", 100_000)
    with LocalStore(tmp_path, DIM) as store:
        log = tmp_path / "items.sqlite-wal"
        with store._pinned():
            fill(store, 2000)
            assert log.stat().st_size > 100_000
            assert store.count() == 2000
        fill(store, 2000)
        store.upsert(["last"], vector(1, 0, 0, 0))
        assert log.stat().st_size < 100_000
        assert store.count() == 2001


def test_a_string_is_not_a_list_of_ids(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        store.upsert(list("abc"), np.eye(3, DIM, dtype=np.float32))
        with pytest.raises(InvalidId, match="give a list"):
            store.delete("abc")
        assert store.count() == 3


def test_of_many_equal_new_items_the_oldest_are_found(tmp_path: Path) -> None:
    with LocalStore(tmp_path, DIM) as store:
        for i in range(300):
            store.upsert([f"{i:03}"], vector(1, 2, 3, 4))
        for hits in store.search(np.repeat(vector(1, 2, 3, 4), 2, axis=0), 5):
            assert hits.ids == ("000", "001", "002", "003", "004")
