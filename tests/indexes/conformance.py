"""What every engine must do. An engine subclasses `Conformance` and supplies the fixture `store`.

Vectors have four numbers and can be read by eye. Ties compare as sets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexes.base import (
    Hits,
    InvalidFilter,
    InvalidId,
    InvalidMetadata,
    InvalidQuery,
    InvalidVector,
    StoreCorrupt,
    StoreError,
    Vectors,
    VectorStore,
)

DIM = 4
ODD_IDS = [
    "a/b/c.jpg",
    "with space",
    "ünïcödé",
    "日本語",
    "😀",
    "\u200f\u05e9",
    "'; DROP TABLE items;--",
    "%_*?",
    "x" * 1024,
]

Opener = Callable[[], VectorStore]


def vector(*numbers: float) -> Vectors:
    """One row."""
    return np.array([numbers], np.float32)


def fill(store: VectorStore, count: int, seed: int = 0) -> Vectors:
    """Items "0000", "0001", … with `{"n": i, "even": …}`; returns their vectors."""
    vectors = np.random.default_rng(seed).standard_normal((count, store.dim)).astype(np.float32)
    store.upsert(
        [f"{i:04}" for i in range(count)], vectors, [{"n": i, "even": i % 2 == 0} for i in range(count)]
    )
    return vectors


def assert_same_hits(got: Hits, wanted: Hits, tolerance: float = 2e-5) -> None:
    """Equal scores in order, and equal ids but for the order of ties and the choice at the last score."""
    assert len(got) == len(wanted)
    assert got.scores == pytest.approx(wanted.scores, abs=tolerance)
    if not len(got):
        return
    edge = wanted.scores[-1] + tolerance
    clear = [
        {name for name, s in zip(h.ids, h.scores, strict=True) if s > edge + tolerance} for h in (got, wanted)
    ]
    near = {name for name, s in zip(wanted.ids, wanted.scores, strict=True) if s > edge - 3 * tolerance}
    assert clear[1] <= set(got.ids)
    assert clear[0] <= near
    assert len(set(got.ids)) == len(got)


class Conformance:
    # ----------------------------------------------------------------------------- items

    def test_an_item_comes_back_as_it_was_stored(self, store: VectorStore) -> None:
        metadata = {"s": "ü😀", "i": 3, "f": 1.5, "t": True, "z": None, "l": [1, "a"], "o": {"p": {"q": 1}}}
        store.upsert(["a"], vector(3, 0, 4, 0), [metadata])
        item = store.get(["a"])["a"]
        assert item.id == "a"
        assert item.metadata == metadata
        assert item.metadata["t"] is True
        assert item.vector.dtype == np.float32
        assert item.vector.tolist() == np.array([0.6, 0, 0.8, 0], np.float16).tolist()

    def test_vectors_are_scaled_to_unit_length_and_kept_as_float16(self, store: VectorStore) -> None:
        vectors = fill(store, 20)
        unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        for i, item in enumerate(store):
            assert item.vector.tolist() == unit[i].astype(np.float32).astype(np.float16).tolist()

    def test_unknown_ids_are_left_out(self, store: VectorStore) -> None:
        fill(store, 2)
        assert set(store.get(["0001", "nobody"])) == {"0001"}
        assert store.get([]) == {}

    def test_a_known_id_is_replaced_whole(self, store: VectorStore) -> None:
        store.upsert(["a"], vector(1, 0, 0, 0), [{"old": 1}])
        store.upsert(["a"], vector(0, 1, 0, 0))
        assert store.count() == 1
        assert store.get(["a"])["a"].metadata == {}
        assert store.search(vector(0, 1, 0, 0), 5)[0].scores == (1.0,)
        assert store.count({"old": 1}) == 0

    def test_of_an_id_given_twice_the_last_wins(self, store: VectorStore) -> None:
        store.upsert(["a", "b", "a"], np.eye(3, DIM, dtype=np.float32), [{"v": 1}, {"v": 2}, {"v": 3}])
        assert store.count() == 2
        assert store.get(["a"])["a"].metadata == {"v": 3}
        assert store.search(vector(0, 0, 1, 0), 1)[0].ids == ("a",)

    def test_any_sensible_id_works_everywhere(self, store: VectorStore) -> None:
        vectors = np.random.default_rng(1).standard_normal((len(ODD_IDS), DIM)).astype(np.float32)
        store.upsert(ODD_IDS, vectors)
        assert set(store.get(ODD_IDS)) == set(ODD_IDS)
        assert [hits.ids[0] for hits in store.search(vectors, 1)] == ODD_IDS
        assert [item.id for item in store] == sorted(ODD_IDS)
        assert store.delete(ODD_IDS[:4]) == 4
        assert store.count() == len(ODD_IDS) - 4

    def test_an_empty_upsert_changes_nothing(self, store: VectorStore) -> None:
        store.upsert([], np.empty((0, DIM), np.float32))
        assert store.count() == 0

    def test_changing_what_was_passed_in_or_out_changes_nothing_stored(self, store: VectorStore) -> None:
        metadata: dict[str, Any] = {"tags": ["a"]}
        vectors = vector(1, 0, 0, 0)
        store.upsert(["a"], vectors, [metadata])
        metadata["tags"].append("b")
        vectors[:] = 9
        item = store.get(["a"])["a"]
        item.metadata["tags"].append("c")
        item.vector[:] = 0
        assert store.get(["a"])["a"].metadata == {"tags": ["a"]}
        assert store.search(vector(1, 0, 0, 0), 1)[0].scores == (1.0,)

    # -------------------------------------------------------------------------- deleting

    def test_a_deleted_item_is_gone_from_everything(self, store: VectorStore) -> None:
        vectors = fill(store, 10)
        assert store.delete(["0003", "0003", "nobody"]) == 1
        assert store.get(["0003"]) == {}
        assert store.count() == 9
        assert "0003" not in store.search(vectors[3:4], 10)[0].ids
        assert "0003" not in {item.id for item in store}
        assert store.delete(["0003"]) == 0

    def test_delete_by_filter_takes_just_what_matches(self, store: VectorStore) -> None:
        vectors = fill(store, 10)
        assert store.delete(filter={"even": True}) == 5
        assert [item.id for item in store] == ["0001", "0003", "0005", "0007", "0009"]
        assert set(store.search(vectors[:1], 10)[0].ids) == {"0001", "0003", "0005", "0007", "0009"}
        assert store.delete(filter={"even": True}) == 0

    def test_delete_takes_ids_or_a_filter_never_both_or_neither(self, store: VectorStore) -> None:
        fill(store, 3)
        with pytest.raises(InvalidQuery, match="exactly one"):
            store.delete()
        with pytest.raises(InvalidQuery, match="exactly one"):
            store.delete(["0001"], filter={})
        assert store.delete([]) == 0
        assert store.count() == 3

    def test_an_id_may_come_back_after_its_deletion(self, store: VectorStore) -> None:
        store.upsert(["a"], vector(1, 0, 0, 0))
        store.delete(["a"])
        store.upsert(["a"], vector(0, 1, 0, 0))
        assert store.search(vector(1, 0, 0, 0), 9)[0].scores == (0.0,)

    # ------------------------------------------------------------------------- searching

    def test_hits_are_the_nearest_best_first(self, store: VectorStore) -> None:
        store.upsert(["x", "xy", "y"], np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]], np.float32))
        (hits,) = store.search(vector(5, 0, 0, 0), 3)
        assert hits.ids == ("x", "xy", "y")
        assert hits.scores == pytest.approx((1, np.sqrt(0.5), 0), abs=1e-3)
        assert hits.metadata == ({}, {}, {})

    def test_every_query_gets_its_own_answer(self, store: VectorStore) -> None:
        vectors = fill(store, 300)
        answers = store.search(vectors, 2)
        assert [hits.ids[0] for hits in answers] == [f"{i:04}" for i in range(300)]
        assert all(len(hits) == 2 for hits in answers)
        assert store.search(np.empty((0, DIM), np.float32), 2) == []

    def test_fewer_than_k_only_when_there_are_fewer(self, store: VectorStore) -> None:
        assert store.search(vector(1, 0, 0, 0), 5) == [Hits()]
        vectors = fill(store, 4)
        assert len(store.search(vectors[:1], 1000)[0]) == 4

    def test_equal_vectors_are_all_found(self, store: VectorStore) -> None:
        store.upsert(list("abcdef"), np.ones((6, DIM), np.float32))
        assert set(store.search(vector(1, 1, 1, 1), 6)[0].ids) == set("abcdef")
        assert len(set(store.search(vector(1, 1, 1, 1), 3)[0].ids)) == 3

    def test_scores_stay_within_minus_one_and_one(self, store: VectorStore) -> None:
        vectors = fill(store, 200)
        assert all(-1 <= score <= 1 for hits in store.search(vectors, 200) for score in hits.scores)

    def test_hits_below_the_minimum_score_are_left_out(self, store: VectorStore) -> None:
        store.upsert(["x", "y"], np.eye(2, DIM, dtype=np.float32))
        assert store.search(vector(1, 0, 0, 0), 9, min_score=0.5)[0].ids == ("x",)
        assert store.search(vector(0, 0, 1, 0), 9, min_score=0.5)[0] == Hits()
        assert len(store.search(vector(0, 0, 1, 0), 9, min_score=0)[0]) == 2

    def test_a_filtered_search_gives_k_hits_whenever_k_items_match(self, store: VectorStore) -> None:
        vectors = fill(store, 400)
        for wanted in ({"n": {"$lt": 5}}, {"n": {"$gte": 200}}, {"even": True}, {"n": {"$ne": 7}}):
            (hits,) = store.search(vectors[:1], 5, filter=wanted)
            assert len(hits) == 5
        assert set(store.search(-vectors[2:3], 9, filter={"n": {"$in": [1, 2, 3]}})[0].ids) == {
            "0001",
            "0002",
            "0003",
        }
        assert store.search(vectors[:1], 9, filter={"n": -1}) == [Hits()]

    def test_a_filter_sees_each_write_at_once(self, store: VectorStore) -> None:
        wanted = {"colour": "red"}
        store.upsert(["a", "b"], np.eye(2, DIM, dtype=np.float32), [{"colour": "red"}, {"colour": "blue"}])
        assert store.search(vector(1, 0, 0, 0), 9, filter=wanted)[0].ids == ("a",)
        store.upsert(["b"], vector(0, 1, 0, 0), [{"colour": "red"}])
        assert set(store.search(vector(1, 0, 0, 0), 9, filter=wanted)[0].ids) == {"a", "b"}
        store.delete(["a"])
        assert store.search(vector(1, 0, 0, 0), 9, filter=wanted)[0].ids == ("b",)
        assert store.count(wanted) == 1
        assert store.count({}) == 1

    # -------------------------------------------------------------------------- scanning

    def test_a_scan_pages_through_all_items_in_order(self, store: VectorStore) -> None:
        fill(store, 25)
        seen: list[str] = []
        while page := store.scan(after=seen[-1] if seen else None, limit=10):
            seen += [item.id for item in page]
        assert seen == [f"{i:04}" for i in range(25)]

    def test_a_scan_takes_a_filter_and_an_unknown_start(self, store: VectorStore) -> None:
        fill(store, 10)
        found = store.scan(after="0003x", limit=2, filter={"even": True})
        assert [item.id for item in found] == ["0004", "0006"]

    def test_iteration_goes_on_while_items_are_deleted(self, store: VectorStore) -> None:
        fill(store, 30)
        seen = 0
        for item in store:
            store.delete([item.id])
            seen += 1
        assert seen == 30
        assert store.count() == 0

    # ------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize("bad", ["", "a\0b", "\ud800", "ü" * 513, 7, None])
    def test_an_impossible_id_is_refused(self, store: VectorStore, bad: Any) -> None:
        with pytest.raises(InvalidId):
            store.upsert(["ok", bad], np.ones((2, DIM), np.float32))
        assert store.count() == 0
        with pytest.raises(InvalidId):
            store.get([bad])
        with pytest.raises(InvalidId):
            store.delete([bad])

    @pytest.mark.parametrize(
        "bad",
        [
            np.ones((1, DIM + 1)),
            np.ones(DIM),
            np.ones((2, DIM)),
            np.zeros((1, DIM)),
            [[1, 2, 3, np.nan]],
            [[1, 2, 3, np.inf]],
            [[1, 2], [3]],
            [["a", "b", "c", "d"]],
            [[1e300, 0, 0, 0]],
            [[None, 1, 1, 1]],
        ],
    )
    def test_an_impossible_vector_is_refused(self, store: VectorStore, bad: Any) -> None:
        with pytest.raises(InvalidVector):
            store.upsert(["a"], bad)
        assert store.count() == 0

    def test_a_query_is_checked_like_a_stored_vector(self, store: VectorStore) -> None:
        for bad in (np.ones((1, DIM + 1)), np.zeros((1, DIM)), np.full((1, DIM), np.nan)):
            with pytest.raises(InvalidVector):
                store.search(bad.astype(np.float32), 1)

    @pytest.mark.parametrize(
        "bad",
        [
            "text",
            ["list"],
            None,
            {1: "key"},
            {"a": float("nan")},
            {"a": [float("inf")]},
            {"a": 2**63},
            {"a": "\0"},
            {"a\0": 1},
            {"a": "\ud800"},
            {"\udfff": 1},
            {"a": {1, 2}},
            {"a": b"bytes"},
            {"a": "x" * (1024 * 1024)},
        ],
    )
    def test_impossible_metadata_is_refused(self, store: VectorStore, bad: Any) -> None:
        with pytest.raises(InvalidMetadata):
            store.upsert(["a", "b"], np.ones((2, DIM), np.float32), [{}, bad])
        assert store.count() == 0

    def test_metadata_may_be_deep_but_not_bottomless(self, store: VectorStore) -> None:
        def nested(levels: int) -> dict[str, Any]:
            return {"a": nested(levels - 1)} if levels else {}

        store.upsert(["a"], vector(1, 0, 0, 0), [nested(31)])
        with pytest.raises(InvalidMetadata, match="deeper than 32"):
            store.upsert(["a"], vector(1, 0, 0, 0), [nested(32)])
        with pytest.raises(InvalidMetadata, match="2 metadata objects for 1 ids"):
            store.upsert(["a"], vector(1, 0, 0, 0), [{}, {}])

    @pytest.mark.parametrize("k", [0, -1, 1.5, True, "3", None])
    def test_k_and_limit_are_positive_whole_numbers(self, store: VectorStore, k: Any) -> None:
        with pytest.raises(InvalidQuery, match="at least 1"):
            store.search(vector(1, 0, 0, 0), k)
        with pytest.raises(InvalidQuery, match="at least 1"):
            store.scan(limit=k)

    def test_the_minimum_score_is_a_number(self, store: VectorStore) -> None:
        for bad in ("0.5", float("nan"), True):
            with pytest.raises(InvalidQuery, match="min_score"):
                store.search(vector(1, 0, 0, 0), 1, min_score=bad)  # type: ignore[arg-type]

    def test_a_filter_that_is_none_is_refused_everywhere(self, store: VectorStore) -> None:
        bad = {"a": {"$greater": 1}}
        for call in (
            lambda: store.search(vector(1, 0, 0, 0), 1, filter=bad),
            lambda: store.count(bad),
            lambda: store.delete(filter=bad),
            lambda: store.scan(filter=bad),
        ):
            with pytest.raises(InvalidFilter, match="unknown operator"):
                call()

    # ------------------------------------------------------------------------- snapshots

    def test_a_snapshot_brings_back_what_there_was(self, store: VectorStore, tmp_path: Path) -> None:
        vectors = fill(store, 50)
        store.delete(["0007"])
        before = list(store)
        store.snapshot(tmp_path / "deep" / "snapshot")
        store.delete(filter={"even": True})
        store.upsert(["new", "0001"], np.ones((2, DIM), np.float32))
        store.restore(tmp_path / "deep" / "snapshot")
        after = list(store)
        assert [(i.id, i.metadata, i.vector.tolist()) for i in after] == [
            (i.id, i.metadata, i.vector.tolist()) for i in before
        ]
        assert store.search(vectors[1:2], 1)[0].ids == ("0001",)
        assert store.count({"even": True}) == 25
        assert len(store.search(vectors[:1], 100)[0]) == 49
        store.upsert(["later"], vector(1, 2, 3, 4))
        assert store.search(vector(1, 2, 3, 4), 1)[0].ids == ("later",)

    def test_a_snapshot_of_an_empty_store_empties(self, store: VectorStore, tmp_path: Path) -> None:
        store.snapshot(tmp_path / "s")
        fill(store, 3)
        store.restore(tmp_path / "s")
        assert store.count() == 0
        assert list(store) == []

    def test_a_snapshot_never_overwrites(self, store: VectorStore, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="new folder"):
            store.snapshot(tmp_path)

    def test_a_damaged_or_missing_snapshot_leaves_the_store_as_it_is(
        self, store: VectorStore, tmp_path: Path
    ) -> None:
        fill(store, 5)
        store.snapshot(tmp_path / "s")
        with pytest.raises(StoreError, match="no snapshot"):
            store.restore(tmp_path / "nothing")
        database = tmp_path / "s" / "items.sqlite"
        data = bytearray(database.read_bytes())
        data[-100] ^= 1
        database.write_bytes(data)
        with pytest.raises(StoreCorrupt, match="hash"):
            store.restore(tmp_path / "s")
        (tmp_path / "s" / "snapshot.json").write_text("{")
        with pytest.raises(StoreCorrupt, match="unreadable"):
            store.restore(tmp_path / "s")
        assert store.count() == 5

    # -------------------------------------------------------------------------- the rest

    def test_stats_tell_how_much_there_is(self, store: VectorStore) -> None:
        fill(store, 12)
        stats = store.stats()
        assert stats["items"] == 12
        assert stats["dim"] == DIM
        assert stats["damaged"] == 0
        assert stats["bytes"] > 12 * DIM * 2
        assert stats["index"]["recall"] == 1.0

    def test_a_closed_store_says_so(self, store: VectorStore) -> None:
        fill(store, 2)
        store.close()
        store.close()
        for call in (
            store.count,
            store.stats,
            store.scan,
            lambda: store.get(["a"]),
            lambda: store.delete(["a"]),
            lambda: store.upsert(["a"], vector(1, 0, 0, 0)),
            lambda: store.search(vector(1, 0, 0, 0), 1),
        ):
            with pytest.raises(StoreError, match="closed"):
                call()

    def test_threads_that_write_and_search_never_see_half_a_write(self, store: VectorStore) -> None:
        """Each item's metadata says which axis its vector is on; replaced items move both together."""
        axes = np.eye(DIM, dtype=np.float32)
        ids = [f"{i}" for i in range(12)]
        store.upsert(ids, axes[[0] * 12], [{"axis": 0}] * 12)
        stop = threading.Event()
        wrong: list[str] = []

        def write(own: list[str]) -> None:
            for turn in range(25):
                axis = turn % DIM
                store.upsert(own, axes[[axis] * len(own)], [{"axis": axis}] * len(own))
                own_hits = store.search(axes[axis : axis + 1], 12, min_score=0.9)[0]
                if not set(own) <= set(own_hits.ids):
                    wrong.append(f"{own} not seen right after their write")

        def read() -> None:
            while not stop.is_set():
                for axis, hits in enumerate(store.search(axes, 12)):
                    if len(set(hits.ids)) != 12:
                        wrong.append(f"{len(hits)} of 12 items")
                    for found, score in zip(hits.metadata, hits.scores, strict=True):
                        if (score == 1.0) != (found["axis"] == axis):
                            wrong.append(f"score {score} on axis {axis} with {found}")
                (filtered,) = store.search(axes[:1], 12, filter={"axis": {"$gte": 0}})
                if len(set(filtered.ids)) != 12:
                    wrong.append(f"{len(filtered)} of 12 items with a filter")

        readers = [threading.Thread(target=read) for _ in range(2)]
        writers = [threading.Thread(target=write, args=(ids[i::3],)) for i in range(3)]
        for thread in readers + writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        assert wrong == []
