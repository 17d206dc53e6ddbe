"""What is shown on a terminal, in a file, and by the processes that show nothing."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.training.watch.examples import config_record
from training.watch import Alarm, Progress, progress
from training.watch.progress import duration

ALARM = Alarm("collapsed", "The features have collapsed. Try a third of the learning rate (`lr`).", 1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def run(shown: Progress, clock: Clock, *, seconds: float, first_step: int = 0) -> None:
    """Five epochs of 20 steps of 64 images; log lines every 5 steps; k-NN from 61% to 65%."""
    with shown.running(100, first_step, 64, 20):
        for step in range(first_step + 1, 101):
            clock.now += seconds
            if step % 5 == 0:
                speed = shown.speed(step)
                assert speed == pytest.approx(64 / seconds)
                shown.step(step, step / 20, {"loss": 5 - step / 50})
            if step % 20 == 0:
                figures = {"feature_std": 0.5, "feature_rank": 30.0, "knn": 0.6 + step / 2000}
                shown.measured(step / 20, figures, [ALARM] if step == 60 else [])
    shown.ended(Path("runs/first"), 100, 100, {"knn": 0.65})


# -------------------------------------------------------------------------------------------- a file


def test_in_a_file_every_measurement_has_a_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(), clock, seconds=0.1)
    captured = capsys.readouterr()
    assert captured.out == "", "results alone go to stdout"
    assert captured.err.splitlines() == [
        "epoch 1 of 5 · loss 4.600 · k-NN 61.0% · spread 0.50 · rank 30.0",
        "epoch 2 of 5 · loss 4.200 · k-NN 62.0% · spread 0.50 · rank 30.0",
        "epoch 3 of 5 · loss 3.800 · k-NN 63.0% · spread 0.50 · rank 30.0",
        "WARNING collapsed: The features have collapsed. Try a third of the learning rate (`lr`).",
        "epoch 4 of 5 · loss 3.400 · k-NN 64.0% · spread 0.50 · rank 30.0",
        "epoch 5 of 5 · loss 3.000 · k-NN 65.0% · spread 0.50 · rank 30.0",
        "finished 100 steps in 10 s with k-NN 65.0%; "
        "'runs/first/README.md' shows the run and what comes next",
    ]


def test_in_a_file_a_slow_run_shows_now_and_then_where_it_is(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Progress(), clock, seconds=4)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert lines[:3] == [
        "epoch 0.50 of 5 · 16/s · loss 4.800 · 6 min left",
        "epoch 1.00 of 5 · 16/s · loss 4.600 · 5 min left",
        "epoch 1.50 of 5 · 16/s · loss 4.400 · k-NN 61.0% · 5 min left",
    ]


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Progress(), clock, seconds=10, first_step=80)
    assert "epoch 4.25 of 5 · 6/s · loss 3.300 · 2 min left" in capsys.readouterr().err


def test_without_labels_no_accuracy_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress()
    with shown.running(100, 0, 64, 20):
        shown.measured(1.0, {"feature_std": 0.5, "feature_rank": 30.0}, [])
    shown.ended(Path("runs/first"), 60, 100, {"feature_std": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1 of 5 · spread 0.50 · rank 30.0",
        "stopped after step 60 of 100; the same command goes on from there",
    ]


def test_the_first_lines_say_what_is_trained_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().settings(config_record(), first_step=30)
    assert capsys.readouterr().err.splitlines() == [
        "simclr on /data/my flowers: 5,400 images to train on, 600 held out, 2 classes",
        "  resnet18, 32 pixels, 5 epochs of 20 steps, 64 images each",
        "  set by you: seed=7 compile=True lr=0.12",
        "  chosen for this data and machine: size=32 batch_size=64 temperature=0.5",
        "  A small-image stem.",
        *[f"  skipped broken {at}.jpg: the file is cut short" for at in range(5)],
        "  … and 7 more; config.json lists all",
        "  going on after step 30, epoch 1.5",
    ]


def test_decoding_shows_a_line_now_and_then_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress()
    for done in range(0, 1001, 10):
        shown.decoding(done, 1000)
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "decoding 0 of 1,000 images"
    assert lines[-1] == "decoding 1,000 of 1,000 images · 10/s"
    assert len(lines) == 5


# --------------------------------------------------------------------------------------- a terminal


def test_on_a_terminal_a_bar_shows_epoch_speed_loss_and_accuracy(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    run(Progress(), clock, seconds=0.1)
    shown = terminal.getvalue()
    assert "epoch 5/5" in shown
    assert "━" in shown
    assert "640/s · loss 3.000 · k-NN 65.0%" in shown
    assert "WARNING collapsed" in shown
    assert shown.index("epoch 3 of 5") < shown.index("WARNING") < shown.index("epoch 4 of 5")


def test_on_a_terminal_the_bar_ends_with_the_loop_even_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="inside"), Progress().running(100, 0, 64, 20):
        raise ValueError("inside")
    assert terminal.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"


def test_on_a_terminal_decoding_stays_on_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress()
    for done in (0, 500, 1000):
        shown.decoding(done, 1000)
        clock.now += 1
    assert terminal.getvalue() == (
        "decoding 0 of 1,000 images\n"
        "\x1b[1A\x1b[2Kdecoding 500 of 1,000 images · 500/s\n"
        "\x1b[1A\x1b[2Kdecoding 1,000 of 1,000 images · 500/s\n"
    )


# ------------------------------------------------------------------------------------ other processes


def test_a_hidden_progress_measures_speed_and_shows_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Progress(hidden=True)
    shown.decoding(1, 2)
    shown.settings(config_record(), 0)
    run(shown, clock, seconds=40)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (11_100, "3 h 05 min")],
)
def test_durations_are_as_exact_as_they_need_to_be(seconds: float, words: str) -> None:
    assert duration(seconds) == words
