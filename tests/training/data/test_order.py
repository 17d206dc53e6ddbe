"""The order of images depends on the seed and the step, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from embedserve.errors import InvalidField
from training.data import EpochOrder, Partners


def test_every_epoch_is_a_permutation() -> None:
    order = EpochOrder(images=12, batch=3, seed=0)
    assert order.steps_per_epoch == 4
    for epoch in range(5):
        rows = np.concatenate([order.rows(step) for step in range(epoch * 4, epoch * 4 + 4)])
        assert sorted(rows.tolist()) == list(range(12))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(EpochOrder(50, 50, seed).rows(epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_a_resumed_run_sees_what_an_unbroken_one_sees() -> None:
    unbroken = EpochOrder(10, 4, seed=3)
    seen = [unbroken.rows(step).tolist() for step in range(9)]
    resumed = EpochOrder(10, 4, seed=3)
    assert [resumed.rows(step).tolist() for step in range(5, 9)] == seen[5:]


def test_an_incomplete_batch_is_dropped_and_misses_other_images_each_epoch() -> None:
    order = EpochOrder(images=10, batch=4, seed=0)
    assert order.steps_per_epoch == 2
    missed = []
    for epoch in range(20):
        seen = np.concatenate([order.rows(2 * epoch), order.rows(2 * epoch + 1)])
        assert len(set(seen.tolist())) == 8
        missed.append(frozenset(range(10)) - frozenset(seen.tolist()))
    assert len(set(missed)) > 10


def test_every_image_comes_to_every_place_equally_often() -> None:
    counts = np.zeros((6, 6))
    order = EpochOrder(6, 6, seed=1)
    for epoch in range(3000):
        counts[np.arange(6), order.rows(epoch)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 52.6  # 25 degrees of freedom, p = .001


def test_the_order_is_the_same_under_every_version_of_numpy() -> None:
    """Runs that were begun in the past go on: these numbers must never change."""
    assert EpochOrder(8, 8, seed=7).rows(2).tolist() == [0, 4, 6, 2, 3, 1, 7, 5]
    assert Partners(np.zeros(8, np.int64), seed=7).rows(np.arange(8), 2).tolist() == [7, 5, 7, 1, 6, 1, 1, 1]


def test_rows_may_be_written_to() -> None:
    order = EpochOrder(4, 4, seed=0)
    first = order.rows(0)
    first[:] = 9
    assert sorted(order.rows(0).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_a_batch_that_cannot_be_filled_is_refused(batch: int) -> None:
    with pytest.raises(InvalidField, match=rf"batch={batch} "):
        EpochOrder(images=10, batch=batch, seed=0)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InvalidField, match="seed=-1"):
        EpochOrder(10, 2, seed=-1)
    with pytest.raises(InvalidField, match="seed=-1"):
        Partners(None, seed=-1)


def test_partners_are_uniform_over_the_other_images_of_the_group() -> None:
    groups = np.array([5, 9, 5, 5, 9, 5, 7])
    partners = Partners(groups, seed=0)
    counts = np.zeros((7, 7))
    for step in range(3000):
        counts[np.arange(7), partners.rows(np.arange(7), step)] += 1
    for row, group in enumerate(groups):
        others = [one for one in np.flatnonzero(groups == group) if one != row]
        if not others:
            assert counts[row, row] == 3000
            continue
        assert counts[row, others].sum() == 3000
        expected = 3000 / len(others)
        assert ((counts[row, others] - expected) ** 2 / expected).sum() < 13.8  # 2 degrees, p = .001


def test_partners_depend_on_seed_and_step_alone() -> None:
    groups = np.zeros(100, np.int64)
    rows = np.arange(100)
    first = Partners(groups, seed=0).rows(rows, 4)
    later = Partners(groups, seed=0)
    later.rows(rows, 3)
    assert later.rows(rows, 4).tolist() == first.tolist()
    assert later.rows(rows, 5).tolist() != first.tolist()
    assert Partners(groups, seed=1).rows(rows, 4).tolist() != first.tolist()


def test_partners_of_a_shuffled_batch_with_repeats_are_of_their_groups() -> None:
    groups = np.arange(40) // 4
    rows = np.random.default_rng(0).integers(0, 40, 200)
    partners = Partners(groups, seed=0).rows(rows, 0)
    assert (groups[partners] == groups[rows]).all()
    assert (partners != rows).all()


def test_without_groups_every_image_is_its_own_partner() -> None:
    assert Partners(None, seed=0).rows(np.array([3, 1]), 0).tolist() == [3, 1]


def test_looking_ahead_into_the_next_epoch_does_not_draw_this_one_anew() -> None:
    order = EpochOrder(10, 5, seed=0)
    first = order.permutation(0)
    assert order.permutation(1) is not first
    assert order.permutation(0) is first
    order.permutation(2)
    order.permutation(3)
    assert order.permutation(0) is not first
    assert order.permutation(0).tolist() == first.tolist()
