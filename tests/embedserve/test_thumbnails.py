"""Thumbnails: content-addressed, durable before their items, and collected only when nobody shows them."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedserve.thumbnails import Thumbnails, ThumbnailsDamaged


def sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


class Items(dict[str, str]):
    """Which picture each item shows: what the store knows in earnest."""

    def shown(self, ids: Sequence[str]) -> dict[str, str]:
        return {name: self[name] for name in ids if name in self}


@pytest.fixture
def items() -> Items:
    return Items()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "thumbnails.sqlite"


@pytest.fixture
def thumbnails(path: Path) -> Iterator[Thumbnails]:
    box = Thumbnails(path)
    yield box
    box.close()


def write(box: Thumbnails, items: Items, name: str, content: str | None) -> None:
    picture = sha(content) if content else None
    with box.writing({name: picture}):
        if content and picture:
            box.put({picture: content.encode()}, [(name, picture)])
            items[name] = picture
        else:
            items.pop(name, None)


def collect(box: Thumbnails, items: Items) -> None:
    while box.collect(items.shown):
        pass


def test_a_picture_comes_back_as_it_was(thumbnails: Thumbnails, items: Items) -> None:
    write(thumbnails, items, "a", "cat")
    assert thumbnails.get(sha("cat")) == b"cat"
    assert thumbnails.get(sha("dog")) is None


def test_two_items_share_one_picture_until_the_last_has_gone(thumbnails: Thumbnails, items: Items) -> None:
    write(thumbnails, items, "a", "cat")
    write(thumbnails, items, "b", "cat")
    assert thumbnails.stats()["count"] == 1
    write(thumbnails, items, "a", None)
    collect(thumbnails, items)
    assert thumbnails.get(sha("cat")) == b"cat"
    write(thumbnails, items, "b", None)
    collect(thumbnails, items)
    assert thumbnails.get(sha("cat")) is None


def test_a_replaced_picture_goes_and_the_new_one_stays(thumbnails: Thumbnails, items: Items) -> None:
    write(thumbnails, items, "a", "cat")
    write(thumbnails, items, "a", "dog")
    collect(thumbnails, items)
    assert thumbnails.get(sha("cat")) is None
    assert thumbnails.get(sha("dog")) == b"dog"


def test_a_picture_whose_item_failed_is_collected(thumbnails: Thumbnails, items: Items) -> None:
    def fail() -> None:
        with thumbnails.writing({"a": sha("cat")}):
            thumbnails.put({sha("cat"): b"cat"}, [("a", sha("cat"))])
            raise RuntimeError("the store is full")

    with pytest.raises(RuntimeError, match="the store is full"):
        fail()
    collect(thumbnails, items)
    assert thumbnails.get(sha("cat")) is None


def test_a_picture_that_is_being_written_is_left_alone(thumbnails: Thumbnails, items: Items) -> None:
    write(thumbnails, items, "a", "cat")
    write(thumbnails, items, "a", None)  # leaves "a" in doubt
    with thumbnails.writing({"a": sha("cat")}):
        thumbnails.put({sha("cat"): b"cat"}, [("a", sha("cat"))])
        collect(thumbnails, items)  # the store does not know the item yet
        thumbnails.sweep(items.shown)
        assert thumbnails.get(sha("cat")) == b"cat"
        items["a"] = sha("cat")
    collect(thumbnails, items)
    assert thumbnails.get(sha("cat")) == b"cat"


def test_after_a_crash_a_sweep_is_due_and_finds_the_orphans(path: Path, items: Items) -> None:
    crashed = Thumbnails(path)
    write(crashed, items, "kept", "cat")
    with crashed.writing({"lost": sha("dog")}):
        crashed.put({sha("dog"): b"dog"}, [("lost", sha("dog"))])
    del crashed  # as a killed process would: no close

    box = Thumbnails(path)
    assert box.sweep_due
    box.sweep_due = False
    assert box.sweep(items.shown) is None
    assert (box.get(sha("cat")), box.get(sha("dog"))) == (b"cat", None)
    box.close()

    again = Thumbnails(path)
    assert not again.sweep_due
    again.close()


def test_closing_with_doubts_left_makes_a_sweep_due(path: Path, items: Items) -> None:
    box = Thumbnails(path)
    write(box, items, "a", "cat")
    write(box, items, "a", None)
    box.close()
    again = Thumbnails(path)
    assert again.sweep_due
    again.close()


def test_a_sweep_goes_through_many_ids_in_pages(thumbnails: Thumbnails, items: Items) -> None:
    names = [f"id/{i}" for i in range(700)]
    with thumbnails.writing({name: sha(name) for name in names}):
        thumbnails.put({sha(name): name.encode() for name in names}, [(name, sha(name)) for name in names])
    items.update({name: sha(name) for name in names[::2]})
    after, rounds = "", 0
    while (page := thumbnails.sweep(items.shown, after)) is not None:
        after, rounds = page, rounds + 1
    assert rounds == 2
    assert thumbnails.stats()["count"] == 350


def test_a_damaged_file_is_told_with_its_fix(path: Path) -> None:
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(ThumbnailsDamaged, match="Move the file away"):
        Thumbnails(path)


def test_a_failed_commit_fails_the_write_and_leaves_the_box_usable(path: Path, items: Items) -> None:
    box = Thumbnails(path)
    write(box, items, "a", "cat")
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute(
        "CREATE TRIGGER full BEFORE INSERT ON pictures BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with pytest.raises(sqlite3.DatabaseError, match="disk full"):
        write(box, items, "b", "dog")
    blocker.execute("DROP TRIGGER full")
    blocker.close()
    write(box, items, "b", "dog")
    assert box.get(sha("dog")) == b"dog"
    box.close()


def test_no_shown_picture_is_ever_missing_while_threads_write_delete_and_collect(
    thumbnails: Thumbnails, items: Items
) -> None:
    """Six threads on few ids and fewer pictures; each looks at what it wrote before another may delete it."""
    locks = {name: threading.Lock() for name in "abcd"}
    missing: list[str] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            name, content = str(rng.choice(list("abcd"))), str(rng.choice(["cat", "dog", "cow"]))
            with locks[name]:
                write(thumbnails, items, name, content if rng.random() < 0.6 else None)
            with locks[name]:
                if name in items and thumbnails.get(items[name]) is None:
                    missing.append(name)

    def tidy() -> None:
        while not stop.is_set():
            collect(thumbnails, items)
            thumbnails.sweep(items.shown)

    collector = threading.Thread(target=tidy)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in [collector, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    collector.join()
    assert missing == []
    collect(thumbnails, items)
    assert thumbnails.stats()["count"] == len(set(items.values()))
