"""Losses are averaged, a run that goes wrong is told what to change, and a healthy one is left alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedserve.errors import EmbedServeError
from tests.training.ranks import on_ranks
from training.methods import METHODS
from training.settings import keys
from training.watch import Alarm, Monitor, feature_statistics
from training.watch.alarms import CODES, advice

K = 1024


def see(monitor: Monitor, *values: float, name: str = "loss") -> None:
    for value in values:
        monitor.see({"loss": torch.tensor(value), name: torch.tensor(value)})


def judged(monitor: Monitor, *pairs: tuple[float, float], start: int = 1) -> list[list[str]]:
    """Codes of the new alarms of measurements of (spread, rank), one an epoch."""
    return [
        [one.code for one in monitor.judge({"feature_std": spread, "feature_rank": rank}, epoch)]
        for epoch, (spread, rank) in enumerate(pairs, start=start)
    ]


@pytest.fixture
def monitor() -> Monitor:
    return Monitor("simclr", classes=0)


# -------------------------------------------------------------------------------------------- losses


def test_each_loss_is_averaged_since_it_was_last_read(monitor: Monitor) -> None:
    monitor.see({"loss": torch.tensor(1.0), "variance": torch.tensor(10.0)})
    monitor.see({"loss": torch.tensor(2.0), "variance": torch.tensor(30.0)})
    assert monitor.read() == {"loss": 1.5, "variance": 20.0}
    monitor.see({"loss": torch.tensor(7.0)})
    assert monitor.read() == {"loss": 7.0}
    assert monitor.read() == {}


def test_a_loss_that_comes_now_and_then_is_averaged_over_its_own_times(monitor: Monitor) -> None:
    monitor.see({"loss": torch.tensor(1.0), "queue": torch.tensor(8.0)})
    monitor.see({"loss": torch.tensor(3.0)})
    assert monitor.read() == {"loss": 2.0, "queue": 8.0}


def test_seeing_a_loss_neither_keeps_its_graph_nor_changes_it(monitor: Monitor) -> None:
    loss = torch.tensor(2.0, requires_grad=True) * 1
    monitor.see({"loss": loss})
    monitor.see({"loss": loss})
    assert loss.item() == 2.0
    assert all(not held.requires_grad for held in monitor._sums.values())


def test_losses_in_half_precision_are_added_up_in_full(monitor: Monitor) -> None:
    for _ in range(100):
        monitor.see({"loss": torch.tensor(1000.0, dtype=torch.float16)})
    assert monitor.read() == {"loss": 1000.0}, "100,000 is no float16"


def _read_on_rank() -> dict[str, float]:
    monitor = Monitor("simclr", classes=0)
    monitor.see({"loss": torch.tensor(1.0 + torch.distributed.get_rank())})
    return monitor.read()


def test_the_loss_that_is_logged_is_the_mean_over_all_ranks() -> None:
    assert on_ranks(_read_on_rank) == [{"loss": 1.5}, {"loss": 1.5}]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_the_checkpoint_that_is_left(
    monitor: Monitor, bad: float
) -> None:
    see(monitor, 1.0)
    monitor.require_finite(1, 0.1, None)
    see(monitor, bad, 1.0)
    monitor.read()
    with pytest.raises(
        EmbedServeError, match=r"no longer a number, at step 30.*'last.pt' is unharmed.*lr was 0.1"
    ):
        monitor.require_finite(30, 0.1, Path("last.pt"))
    with pytest.raises(EmbedServeError, match="No checkpoint had been written yet"):
        monitor.require_finite(30, 0.1, None)


# -------------------------------------------------------------------------------------------- alarms


@pytest.mark.parametrize(
    "history",
    [
        # Measured: SimCLR and DINO with small networks on images of clothes, from the first steps on.
        [(0.16, 22.8), (0.47, 29.6), (0.52, 28.4), (0.48, 29.2), (0.51, 29.4)],
        [(0.32, 51.4), (0.39, 50.6), (0.42, 42.5), (0.46, 35.2)],
        # Images that differ little: features begin close together and move apart.
        [(0.02, 4.0), (0.04, 5.0), (0.07, 6.0), (0.09, 8.0), (0.12, 9.0)],
        # A vision transformer.
        [(0.55, 18.8), (0.7, 25.0), (0.8, 40.0), (0.78, 38.0)],
        [(0.3, 5.0), (0.08, 5.0), (0.3, 5.0), (0.08, 5.0), (0.3, 5.0)],
    ],
)
def test_healthy_runs_raise_no_alarm(monitor: Monitor, history: list[tuple[float, float]]) -> None:
    assert judged(monitor, *history) == [[]] * len(history)
    assert monitor.alarms == []


def test_features_that_lose_their_spread_have_collapsed(monitor: Monitor) -> None:
    assert judged(monitor, (0.4, 30), (0.2, 29), (0.09, 28), (0.05, 20), (0.02, 10)) == [
        *([], [], []),
        ["collapsed"],
        [],
    ]
    assert re.match(
        r"The features have collapsed: they spread 0.05 .* at 2 measurements in a row\. .*`lr`",
        monitor.alarms[0].message,
    )


def test_an_alarm_lasts_until_it_is_over_and_can_be_raised_again(monitor: Monitor) -> None:
    judged(monitor, (0.4, 30), (0.05, 20), (0.05, 20))
    assert [(one.epoch, one.until) for one in monitor.alarms] == [(3, None)]
    judged(monitor, (0.5, 20), start=4)
    assert [(one.epoch, one.until) for one in monitor.alarms] == [(3, 4)]
    assert judged(monitor, (0.05, 20), (0.05, 20), start=5) == [[], ["collapsed"]]
    assert [(one.epoch, one.until) for one in monitor.alarms] == [(3, 4), (6, None)]


def test_features_in_few_directions_have_collapsed_in_dimension(monitor: Monitor) -> None:
    assert judged(monitor, (0.5, 60), (0.5, 30), (0.5, 11), (0.5, 10)) == [
        [],
        [],
        [],
        ["dimensional_collapse"],
    ]
    assert "only 10.0 directions (effective rank; its highest was 60.0)" in monitor.alarms[0].message


def test_less_than_three_directions_are_too_few_for_any_data(monitor: Monitor) -> None:
    assert judged(monitor, (0.5, 2.9), (0.5, 2.8)) == [[], ["dimensional_collapse"]]


def test_a_complete_collapse_is_told_once_and_not_as_one_of_dimensions_too(monitor: Monitor) -> None:
    codes = judged(monitor, (0.4, 30), (0.05, 2), (0.01, 1.2), (0.001, 1))
    assert codes == [[], [], ["collapsed"], []]


def test_equal_features_from_the_start_point_at_the_images(monitor: Monitor) -> None:
    assert judged(monitor, (1e-7, 1.0), (1e-7, 1.0), (1e-7, 1.0)) == [["same_images"], [], []]
    assert "Look at views.png" in monitor.alarms[0].message


def test_features_that_are_all_zero_are_no_sign_of_equal_images(monitor: Monitor) -> None:
    assert judged(monitor, (0.0, 0.0), (0.0, 0.0)) == [[], ["collapsed"]]


def test_a_measurement_that_is_no_number_is_passed_over(monitor: Monitor) -> None:
    nan = math.nan
    assert judged(monitor, (0.4, 30), (nan, nan), (nan, nan), (0.4, 30)) == [[], [], [], []]


def test_real_features_of_equal_and_of_different_images_are_told_apart() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    for images, codes in (
        (torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []),
        (torch.ones(64, 3, 8, 8), ["same_images"]),
    ):
        with torch.no_grad():
            features = network(images).flatten(1)
        monitor = Monitor("byol", classes=0)
        assert [one.code for one in monitor.judge(feature_statistics(features), 1)] == codes


# ---------------------------------------------------------------------------------------------- ln K


def read(monitor: Monitor, *losses: float, name: str = "loss") -> None:
    for loss in losses:
        see(monitor, loss, name=name)
        monitor.read()


def test_a_cross_entropy_that_stays_at_ln_k_is_stuck() -> None:
    monitor = Monitor("dino", classes=K)
    read(monitor, *[math.log(K) * factor for factor in (0.995, 1.005)] * 10)
    assert judged(monitor, (0.5, 30), (0.5, 30), (0.5, 30)) == [[], ["stuck_at_ln_k"], []], "not in epoch 1"
    message = monitor.alarms[0].message
    assert message.startswith(
        "The loss stays at ln K = ln 1024 = 6.93 (it is 6.97), which is what guessing gets"
    )
    assert "`teacher_temperature`" in message
    read(monitor, 6.0)
    judged(monitor, (0.5, 30), start=4)
    assert monitor.alarms[0].until == 4


def test_a_cross_entropy_that_moves_or_has_just_begun_is_not_stuck() -> None:
    for losses in (
        [math.log(K)] * 19,
        [math.log(K) * (1 - 0.002 * at) for at in range(30)],
        [math.log(K) * 1.5] * 40,
    ):
        monitor = Monitor("swav", classes=K)
        read(monitor, *losses)
        assert judged(monitor, (0.5, 30), (0.5, 30), (0.5, 30)) == [[], [], []]


def test_a_part_of_the_loss_can_be_stuck() -> None:
    monitor = Monitor("dinov2", classes=K)
    for _ in range(20):
        monitor.see({"loss": torch.tensor(2 * math.log(K)), "dino": torch.tensor(math.log(K))})
        monitor.read()
    assert judged(monitor, (0.5, 30), start=2) == [["stuck_at_ln_k"]]


def test_a_loss_without_classes_is_never_stuck(monitor: Monitor) -> None:
    read(monitor, *[0.0] * 50)
    assert judged(monitor, (0.5, 30), (0.5, 30), (0.5, 30)) == [[], [], []]


# -------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("code", CODES)
def test_advice_names_settings_that_the_method_has(code: str, method: str) -> None:
    words = advice(code, method)
    assert words.endswith(".")
    named = re.findall(r"`(\w+)`", words)
    assert named
    for key in named:
        assert key in keys(METHODS[method]), f"{method} has no {key}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_advice_of_its_own(method: str) -> None:
    assert advice("collapsed", method) != advice("collapsed", "a method that nobody knows")


# --------------------------------------------------------------------------------------------- state


def drive(monitor: Monitor, steps: range) -> list[Any]:
    """A run that collapses and whose loss is stuck; what the monitor says at each of its steps."""
    said: list[Any] = []
    for step in steps:
        see(monitor, math.log(K) + 0.01 * math.sin(step))
        if step % 3 == 2:
            said.append(monitor.read())
        if step % 10 == 9:
            spread = max(0.5 - 0.01 * step, 0.05 - 1e-4 * step)
            said.append(monitor.judge({"feature_std": spread, "feature_rank": 40 - 0.3 * step}, step / 10))
    return said


@pytest.mark.parametrize("cut", [1, 29, 50, 64, 71])
def test_a_resumed_run_says_what_an_uninterrupted_one_does(cut: int) -> None:
    whole, first, second = (Monitor("dino", classes=K) for _ in range(3))
    expected = drive(whole, range(90))
    said = drive(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    said += drive(second, range(cut, 90))
    assert said == expected, "to the last bit"
    assert second.alarms == whole.alarms
    assert {one.code for one in whole.alarms} == {"collapsed", "stuck_at_ln_k"}


def test_the_highest_rank_is_remembered_over_a_resume() -> None:
    first, second = Monitor("simclr", classes=0), Monitor("simclr", classes=0)
    judged(first, (0.5, 100))
    second.load_state_dict(first.state_dict())
    assert judged(second, (0.5, 15), (0.5, 15)) == [[], ["dimensional_collapse"]]


def test_the_state_is_plain_numbers_and_lists() -> None:
    monitor = Monitor("simclr", classes=0)
    see(monitor, 1.0)
    judged(monitor, (0.5, 30), (0.05, 20), (0.05, 20))

    def check(value: object) -> None:
        assert not isinstance(value, Tensor | Alarm)
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                check(one)

    check(monitor.state_dict())
