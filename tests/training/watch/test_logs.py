"""metrics.jsonl survives kills and resumes, and other services get the same figures."""

from __future__ import annotations

import builtins
import json
import logging
import math
import multiprocessing
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from embedserve.errors import EmbedServeError, InvalidField
from training.watch import RunLog
from training.watch.logs import read_records


def open_log(folder: Path, resume_at: int = 0, *, tensorboard: bool = False, wandb: bool = False) -> RunLog:
    return RunLog(folder, resume_at=resume_at, tensorboard=tensorboard, wandb=wandb, config={"seed": 0})


def steps(log: RunLog) -> list[int]:
    return [one["step"] for one in log.records()]


# -------------------------------------------------------------------------------------- metrics.jsonl


def test_every_record_is_a_json_object_on_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(10, 0.5, {"loss": 1.25, "lr": 0.03})
    log.write(10, 0.5, {"knn": 0.8, "alarm_collapsed": "Features »fell« together."})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log.records()
    assert log.records() == [
        {"step": 10, "epoch": 0.5, "loss": 1.25, "lr": 0.03},
        {"step": 10, "epoch": 0.5, "knn": 0.8, "alarm_collapsed": "Features »fell« together."},
    ]
    log.close()


def test_figures_come_back_to_the_last_bit(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(1, 1 / 3, {"loss": math.pi})
    assert log.records() == [{"step": 1, "epoch": 1 / 3, "loss": math.pi}]
    log.close()


def test_what_is_no_number_is_null_as_json_has_no_word_for_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(1, 1.0, {"loss": math.nan, "lr": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "epoch": 1.0, "loss": None, "lr": None}
    log.close()


def test_a_resume_cuts_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 20, 30, 40):
        log.write(step, step / 10, {"loss": 1.0})
    log.close()
    log = open_log(tmp_path, resume_at=20)
    assert steps(log) == [10, 20, 20], "those of the checkpoint's own step were written before it"
    log.write(30, 3.0, {"loss": 2.0})
    assert steps(log) == [10, 20, 20, 30]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}
    log.close()


def test_a_run_that_starts_anew_starts_an_empty_log(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(0, 0.0, {"loss": 1.0})
    log.write(10, 1.0, {"loss": 1.0})
    log.close()
    log = open_log(tmp_path, resume_at=0)
    assert log.records() == []
    log.close()


def test_a_line_that_a_kill_left_unfinished_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_log(tmp_path)
    log.write(10, 1.0, {"loss": 1.0})
    log.write(20, 2.0, {"loss": 1.0})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    log = open_log(tmp_path, resume_at=20)
    log.write(30, 3.0, {"loss": 1.0})
    assert steps(log) == [10, 30]
    assert not caplog.records, "nothing unusual has happened"
    log.close()


def test_a_last_line_that_lacks_only_its_end_is_kept_and_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "epoch": 1.0, "loss": 1.0}')
    log = open_log(tmp_path, resume_at=10)
    log.write(20, 2.0, {"loss": 1.0})
    assert steps(log) == [10, 20]
    log.close()


def test_damage_in_the_middle_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = '{"step": 10, "epoch": 1.0}'
    (tmp_path / "metrics.jsonl").write_text(f'{good}\nnot json\n[1]\n{{"epoch": 2.0}}\n{good}\n')
    with caplog.at_level(logging.WARNING):
        assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert "3 lines of" in caplog.text


def test_an_untouched_file_is_not_written_again(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(10, 1.0, {"loss": 1.0})
    log.close()
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    open_log(tmp_path, resume_at=10).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_run_without_a_log_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_and_a_missing_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(EmbedServeError, match=r"metrics.jsonl' cannot be written: No such file or directory"):
        open_log(tmp_path / "gone")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(EmbedServeError, match=r"metrics.jsonl' cannot be read: Is a directory"):
        open_log(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_disk_that_fills_up_while_training_is_told(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(EmbedServeError, match="cannot be written: No space left on device"):
        log.write(10, 1.0, {"loss": 1.0})
    log.close()


def _write_for_ever(folder: Path) -> None:
    log = open_log(folder)
    step = 0
    while True:
        step += 1
        log.write(step, step / 7, {"loss": 1.0, "note": "x" * 500})


def test_a_kill_loses_no_line_and_tears_none(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    path = tmp_path / "metrics.jsonl"
    until = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 50_000:
        assert time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    process.join()
    found = [one["step"] for one in read_records(path)]
    assert found == list(range(1, len(found) + 1))
    assert len(found) > 50


# ------------------------------------------------------------------------------------ other services


class FakeWriter:
    """Stands in for torch.utils.tensorboard.SummaryWriter."""

    made: list[FakeWriter] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        FakeWriter.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.append((key, value, step))

    def add_text(self, key: str, value: str, step: int) -> None:
        self.texts.append((key, value, step))

    def close(self) -> None:
        self.closed = True


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def test_tensorboard_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, name, module(name, SummaryWriter=FakeWriter))
    log = open_log(tmp_path, resume_at=40, tensorboard=True)
    log.write(50, 2.5, {"loss": 1.5, "alarm_collapsed": "Look."})
    log.close()
    writer = FakeWriter.made[-1]
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 41)
    assert writer.scalars == [("epoch", 2.5, 50), ("loss", 1.5, 50)]
    assert writer.texts == [("alarm_collapsed", "Look.", 50)]
    assert writer.closed
    open_log(tmp_path / ".", tensorboard=True).close()
    assert FakeWriter.made[-1].purge_step is None


class FakeRun:
    """Stands in for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.finished = False

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    run = FakeRun()

    def init(**arguments: Any) -> FakeRun:
        begun.append(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    log = open_log(tmp_path, wandb=True)
    log.write(10, 1.0, {"loss": 1.5})
    log.close()
    open_log(tmp_path, resume_at=10, wandb=True).close()
    assert run.logged == [{"step": 10, "epoch": 1.0, "loss": 1.5}]
    assert run.axes[0] == ("*", "step")
    assert run.finished
    first, second = begun
    assert first["id"] == second["id"]
    assert len(first["id"]) == 16
    assert first["config"] == {"seed": 0}
    assert first["name"] == tmp_path.name
    assert first["resume"] == "allow"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_service_whose_package_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    really = builtins.__import__

    def without(module: str, *rest: Any) -> Any:
        if name in module:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return really(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        InvalidField, match=rf"{name}=true cannot be had: No module named '{name}'. .* `pip install {name}`"
    ) as told:
        open_log(tmp_path, tensorboard=name == "tensorboard", wandb=name == "wandb")
    assert told.value.param == name
