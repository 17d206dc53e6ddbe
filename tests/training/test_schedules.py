"""Schedules at points that can be computed by eye."""

from __future__ import annotations

import math

import pytest

from training.schedules import Now, constant, cosine, warmup


def at(step: int, *, epochs: int = 10, steps_per_epoch: int = 4) -> Now:
    return Now(step, epochs * steps_per_epoch, steps_per_epoch)


def test_now_counts_what_is_done() -> None:
    assert (at(0).epoch, at(10).epoch, at(40).epoch) == (0, 2.5, 10)
    assert (at(0).progress, at(10).progress, at(40).progress) == (0, 0.25, 1)


def test_a_constant_stays() -> None:
    assert {constant(0.3)(at(step)) for step in range(41)} == {0.3}


def test_a_cosine_begins_at_its_start_and_ends_at_its_end() -> None:
    schedule = cosine(0.996, 1.0)
    assert schedule(at(0)) == pytest.approx(0.996)
    assert schedule(at(10)) == pytest.approx(1 - 0.004 * (1 + math.sqrt(0.5)) / 2)
    assert schedule(at(20)) == pytest.approx(0.998)
    assert schedule(at(40)) == pytest.approx(1.0)


def test_a_cosine_can_rise_or_fall_and_never_turns() -> None:
    rising = [cosine(0.04, 0.4)(at(step)) for step in range(41)]
    falling = [cosine(0.4, 0.04)(at(step)) for step in range(41)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_a_warm_up_rises_in_equal_steps_and_its_first_step_moves_already() -> None:
    schedule = warmup(1, constant(2.0))
    assert [schedule(at(step)) for step in range(6)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_a_warm_up_can_begin_above_zero() -> None:
    schedule = warmup(1, constant(0.07), start=0.03)
    assert [schedule(at(step)) for step in range(5)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])


def test_what_follows_a_warm_up_runs_over_the_steps_that_are_left() -> None:
    schedule = warmup(2, cosine(1.0, 0.0))
    assert schedule(at(7)) == pytest.approx(1.0)
    assert schedule(at(8)) == pytest.approx(1.0)
    assert schedule(at(24)) == pytest.approx(0.5)
    assert schedule(at(40)) == pytest.approx(0.0)


def test_a_warm_up_may_be_a_part_of_an_epoch_or_nothing() -> None:
    assert warmup(0.5, constant(1.0))(at(0)) == pytest.approx(0.5)
    assert warmup(0.5, constant(1.0))(at(1)) == pytest.approx(1.0)
    assert warmup(0, cosine(1.0, 0.0))(at(0)) == pytest.approx(1.0)


def test_a_warm_up_longer_than_the_training_is_cut_to_it() -> None:
    schedule = warmup(100, cosine(1.0, 0.0))
    assert schedule(at(0)) == pytest.approx(1 / 40)
    assert schedule(at(39)) == pytest.approx(1.0)
    assert schedule(at(40)) == pytest.approx(1.0)
