"""The conformance suite for each engine, and the stores agreeing with the oracle on random histories."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from indexes import ENGINES, open_store
from indexes.base import StoreError, VectorStore
from indexes.exact import ExactStore
from indexes.local import LocalStore
from tests.indexes.conformance import DIM, Conformance, assert_same_hits


class TestMemory(Conformance):
    @pytest.fixture
    def store(self) -> VectorStore:
        return open_store("memory:", DIM)


class TestLocal(Conformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = LocalStore(tmp_path / "store", DIM)
        yield store
        store.close()


class TestLocalWithTinySegments(Conformance):
    """Every few rows make a segment, so merging, compacting and saving go on all the time."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = LocalStore(tmp_path / "store", DIM, tail_rows=8, save_rows=16)
        yield store
        store.close()


NAMES = [f"id{i}" for i in range(12)]
AXES = st.lists(st.integers(-3, 3), min_size=3, max_size=3).filter(any)
METADATA = st.fixed_dictionaries(
    {}, optional={"a": st.integers(0, 3), "b": st.sampled_from(["x", "y", None, True])}
)
FILTERS = st.sampled_from(
    [{"a": 1}, {"a": {"$gte": 2}}, {"b": None}, {"$not": {"b": "x"}}, {"$or": [{"a": 0}, {"b": True}]}, {}]
)


class StoreMachine(RuleBasedStateMachine):
    """The embedded store and the oracle get the same calls, with reopening and restoring in between."""

    snapshots: Bundle[tuple[Path, Path]] = Bundle("snapshots")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.local = self.open()
        self.oracle = ExactStore(3)
        self.copies = 0

    def open(self) -> LocalStore:
        return LocalStore(self.path / "store", 3, tail_rows=4, save_rows=8)

    def teardown(self) -> None:
        self.local.close()
        self.folder.cleanup()

    @rule(items=st.lists(st.tuples(st.sampled_from(NAMES), AXES, METADATA), min_size=1, max_size=14))
    def upsert(self, items: list[tuple[str, list[int], dict[str, Any]]]) -> None:
        names, vectors, metadata = zip(*items, strict=True)
        for store in (self.local, self.oracle):
            store.upsert(list(names), np.array(vectors, np.float32), list(metadata))

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=5))
    def delete(self, names: list[str]) -> None:
        assert self.local.delete(names) == self.oracle.delete(names)

    @rule(wanted=FILTERS.filter(bool))
    def delete_matching(self, wanted: dict[str, Any]) -> None:
        assert self.local.delete(filter=wanted) == self.oracle.delete(filter=wanted)

    @rule(queries=st.lists(AXES, min_size=1, max_size=3), k=st.integers(1, 15), wanted=st.none() | FILTERS)
    def search(self, queries: list[list[int]], k: int, wanted: dict[str, Any] | None) -> None:
        vectors = np.array(queries, np.float32)
        answers = [store.search(vectors, k, filter=wanted) for store in (self.local, self.oracle)]
        for got, expected in zip(*answers, strict=True):
            assert_same_hits(got, expected)
            kept = self.oracle.get(got.ids)
            assert all(
                kept[name].metadata == found for name, found in zip(got.ids, got.metadata, strict=True)
            )

    @rule(wanted=FILTERS, after=st.none() | st.sampled_from(NAMES), limit=st.integers(1, 9))
    def scan(self, wanted: dict[str, Any], after: str | None, limit: int) -> None:
        pages = [
            [(item.id, item.metadata, item.vector.tolist()) for item in page]
            for page in (
                store.scan(after=after, limit=limit, filter=wanted) for store in (self.local, self.oracle)
            )
        ]
        assert pages[0] == pages[1]
        assert self.local.count(wanted) == self.oracle.count(wanted)

    @rule()
    def reopen(self) -> None:
        self.local.close()
        self.local = self.open()

    @rule(target=snapshots)
    def snapshot(self) -> Any:
        self.copies += 1
        paths = self.path / f"local{self.copies}", self.path / f"oracle{self.copies}"
        self.local.snapshot(paths[0])
        self.oracle.snapshot(paths[1])
        return multiple(paths, paths[::-1])

    @rule(paths=snapshots)
    def restore(self, paths: tuple[Path, Path]) -> None:
        """From one's own snapshot, or the other engine's: the format is the same."""
        self.local.restore(paths[0])
        self.oracle.restore(paths[1])

    @invariant()
    def counts_agree(self) -> None:
        assert self.local.count() == self.oracle.count()


TestHistories = StoreMachine.TestCase
TestHistories.settings = settings(
    max_examples=12,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_larger_stores_agree_with_the_oracle_filtered_or_not(tmp_path: Path) -> None:
    """Enough rows for whole segments, a tail, deletions in both, and filters of every selectivity."""
    rng = np.random.default_rng(5)
    dim, count = 32, 3000
    vectors = rng.standard_normal((count, dim)).astype(np.float32)
    metadata = [{"n": i, "mod": i % 10} for i in range(count)]
    ids = [str(i) for i in range(count)]
    queries = rng.standard_normal((7, dim)).astype(np.float32)
    with LocalStore(tmp_path, dim, tail_rows=256) as local:
        oracle = ExactStore(dim)
        for store in (local, oracle):
            for start in range(0, count, 700):
                some = slice(start, start + 700)
                store.upsert(ids[some], vectors[some], metadata[some])
            store.delete(filter={"mod": {"$in": [3, 4]}})
            store.upsert(ids[:100], vectors[100:200], metadata[:100])
        for wanted in (None, {"n": {"$lt": 50}}, {"mod": 1}, {"mod": {"$lt": 8}}, {"n": 2999}):
            for asked in (queries, queries[:1]):
                answers = [store.search(asked, 20, filter=wanted) for store in (local, oracle)]
                for got, expected in zip(*answers, strict=True):
                    assert_same_hits(got, expected)
        assert local.stats()["index"]["segments"] > 1


def test_a_store_is_opened_by_url_or_path(tmp_path: Path) -> None:
    for place in (tmp_path / "a", f"file:{tmp_path}/b%20c", f"file://{tmp_path}/d"):
        store = open_store(place, DIM)
        assert isinstance(store, LocalStore)
        store.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b c", "d"}
    assert isinstance(open_store("memory:", DIM), ExactStore)
    assert set(ENGINES) >= {"file", "memory"}


def test_an_unknown_scheme_names_the_known_ones_and_the_closest() -> None:
    with pytest.raises(
        StoreError, match=r"unknown store 'memry:'; did you mean 'memory:'\? Known are 'file:'"
    ):
        open_store("memry:", DIM)
    with pytest.raises(StoreError, match=r"unknown store 's3:'; Known are"):
        open_store("s3://bucket", DIM)
    with pytest.raises(StoreError, match="keeps nothing"):
        open_store("memory:name", DIM)
