"""What is held out is drawn fairly, and never leaks into training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from embedserve.errors import InvalidField
from training.data import Source, split
from training.data.split import MOST_HELD_OUT


def source(
    labels: list[int] | np.ndarray,
    groups: list[int] | np.ndarray | None = None,
    test: list[bool] | None = None,
) -> Source:
    count = len(labels)
    return Source(
        name="made",
        location="/made",
        keys=tuple(map(str, range(count))),
        labels=np.asarray(labels, np.int64),
        class_names=tuple(map(str, range(max(labels) + 1))),
        groups=None if groups is None else np.asarray(groups, np.int64),
        test=np.zeros(count, bool) if test is None else np.array(test),
        stamps=np.zeros((count, 2), np.int64),
        fetch=lambda row: b"",
    )


def assert_every_row_once(parts: tuple[np.ndarray, np.ndarray], count: int) -> None:
    assert np.concatenate(parts).dtype == np.int64
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_each_class_gives_its_share() -> None:
    labels = [0] * 100 + [1] * 50 + [2] * 10
    train, held = split(source(labels), holdout=0.1, seed=0)
    assert_every_row_once((train, held), 160)
    assert Counter(labels[row] for row in held) == {0: 10, 1: 5, 2: 1}


def test_a_class_of_two_has_one_on_either_side_and_a_class_of_one_is_trained_on() -> None:
    labels = [0, 0, 1, 2, 2, 2, *[3] * 30]
    train, held = split(source(labels), holdout=0.05, seed=0)
    assert_every_row_once((train, held), 36)
    assert {labels[row] for row in held} == {0, 2, 3}
    assert {labels[row] for row in train} == {0, 1, 2, 3}


def test_a_large_share_leaves_every_class_one_image_to_train_on() -> None:
    labels = [0, 0, 1, 1, 1, 1]
    train, _ = split(source(labels), holdout=0.99, seed=0)
    assert {labels[row] for row in train} == {0, 1}


def test_the_draw_depends_on_the_seed() -> None:
    images = source([0] * 200)
    first = split(images, holdout=0.1, seed=0)[1].tolist()
    assert split(images, holdout=0.1, seed=0)[1].tolist() == first
    assert split(images, holdout=0.1, seed=1)[1].tolist() != first


def test_every_image_is_held_out_equally_often() -> None:
    counts = np.zeros(10)
    for seed in range(2000):
        counts[split(source([-1] * 10), holdout=0.2, seed=seed)[1]] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # 9 degrees of freedom, p = .001


def test_no_more_than_ten_thousand_are_held_out() -> None:
    labels = np.arange(150_000) % 7
    train, held = split(source(labels), holdout=0.5, seed=0)
    assert len(held) == MOST_HELD_OUT
    assert len(train) == 140_000
    assert min(Counter(labels[held].tolist()).values()) >= MOST_HELD_OUT // 7


def test_the_data_sets_own_tests_are_held_out_whatever_the_share() -> None:
    images = source([0, 1, 0, 1], test=[False, True, False, True])
    for share in (0.0, 0.5):
        train, held = split(images, holdout=share, seed=0)
        assert (train.tolist(), held.tolist()) == ([0, 2], [1, 3])


def test_a_data_set_of_nothing_but_tests_is_taken_as_having_none() -> None:
    train, held = split(source([0] * 10, test=[True] * 10), holdout=0.2, seed=0)
    assert (len(train), len(held)) == (8, 2)


def test_groups_stay_together_without_labels() -> None:
    groups = np.random.default_rng(0).integers(0, 20, 200)
    train, held = split(source([-1] * 200, groups), holdout=0.2, seed=0)
    assert_every_row_once((train, held), 200)
    assert not set(groups[train]) & set(groups[held])
    assert 20 <= len(held) <= 40


def test_groups_stay_together_within_classes() -> None:
    groups = np.arange(120) // 4
    labels = groups % 3
    train, held = split(source(labels, groups), holdout=0.2, seed=0)
    assert not set(groups[train]) & set(groups[held])
    assert Counter(labels[held].tolist()) == {0: 8, 1: 8, 2: 8}


def test_one_huge_group_is_not_what_is_held_out() -> None:
    groups = [0] * 96 + [1, 1, 1, 2]
    train, held = split(source([-1] * 100, groups), holdout=0.01, seed=0)
    assert held.tolist() == [99]
    assert len(train) == 99


@pytest.mark.parametrize("groups", [[0, 0, 1, 1] * 10, [0] * 40, [0, 1] * 20])
def test_groups_that_are_the_classes_or_cross_them_are_torn(groups: list[int]) -> None:
    """Else a class would be missing on one side, or belong to both."""
    labels = [0, 1] * 20
    train, held = split(source(labels, groups), holdout=0.1, seed=0)
    assert Counter(labels[row] for row in held) == {0: 2, 1: 2}
    assert len(train) == 36


def test_nothing_is_held_out_for_a_share_of_nothing() -> None:
    train, held = split(source([0] * 5), holdout=0, seed=0)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2, 3, 4], [])


def test_a_single_image_is_trained_on() -> None:
    train, held = split(source([-1]), holdout=0.5, seed=0)
    assert (train.tolist(), held.tolist()) == ([0], [])


@pytest.mark.parametrize("share", [-0.1, 1.0, 10.0, float("nan")])
def test_what_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(InvalidField, match=f"holdout={share}"):
        split(source([0] * 5), holdout=share, seed=0)
