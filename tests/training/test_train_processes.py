"""Training as a user starts it: real processes, killed by the system, and two ranks through torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.pictures import QUICK, write_pictures
from training.checkpoint import Checkpoints, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def command(method: str, data: Path, out: Path, **settings: object) -> list[str]:
    given = (
        QUICK | {"cache_folder": f"{data.parent}/cache"} | {key: str(one) for key, one in settings.items()}
    )
    assignments = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    return ["-m", "embedserve", "train", method, "--data", str(data), "--out", str(out), *assignments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=file, stderr=file)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def losses(folder: Path) -> list[tuple[int, float]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in whole if "loss" in line]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    latest = Checkpoints(folder / "checkpoints", keep=1).latest()
    assert latest is not None
    return dict(load(latest)["model"])


def test_kill_9_at_any_step_loses_nothing(pictures: Path, tmp_path: Path) -> None:
    settings = {"epochs": 12, "checkpoint_every": 5, "knn_every": 100}
    straight = run(command("moco_v2", pictures, tmp_path / "straight", **settings))
    assert straight.returncode == 0, straight.stderr
    for kills in range(2):
        process = start(command("moco_v2", pictures, tmp_path / "killed", **settings), tmp_path / "log")
        before = len(losses(tmp_path / "killed"))
        while process.poll() is None and len(losses(tmp_path / "killed")) < max(before, 6) + 4 * kills + 1:
            time.sleep(0.002)
        assert process.poll() is None, (tmp_path / "log").read_text()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    resumed = run(command("moco_v2", pictures, tmp_path / "killed", **settings))
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step" in resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    weights = final_weights(tmp_path / "straight")
    assert all(torch.equal(one, weights[name]) for name, one in final_weights(tmp_path / "killed").items())


def test_ctrl_c_saves_the_step_and_the_same_command_goes_on(pictures: Path, tmp_path: Path) -> None:
    arguments = command(
        "simclr", pictures, tmp_path / "run", epochs=200, checkpoint_every=100_000, knn_every=1000
    )
    process = start(arguments, tmp_path / "log")
    while process.poll() is None and len(losses(tmp_path / "run")) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, (tmp_path / "log").read_text()
    latest = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).latest()
    assert latest is not None
    assert load(latest)["step"] == losses(tmp_path / "run")[-1][0]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run(
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *arguments]
    )


def test_two_processes_train_as_one_does_and_only_they_may_go_on(pictures: Path, tmp_path: Path) -> None:
    alone = run(command("simclr", pictures, tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    together = torchrun(command("simclr", pictures, tmp_path / "together"))
    assert together.returncode == 0, together.stderr
    one, two = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-3)
    refused = run(command("simclr", pictures, tmp_path / "together"))
    assert refused.returncode == 1
    assert "--nproc-per-node 2" in refused.stderr
