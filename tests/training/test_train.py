"""The whole loop on small folders of pictures: what it writes, what it repeats exactly, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from embedserve.errors import BadRequest, Conflict, EmbedServeError, InvalidField, NotFound
from tests.training.pictures import QUICK, quick, write_pictures
from training import train as loop
from training.checkpoint import Checkpoints, load
from training.methods import METHODS
from training.run import open_run
from training.train import train


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class Killed(BaseException):
    """What a kill -9 looks like from inside: nothing catches it."""


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    latest = Checkpoints(run / "checkpoints", keep=1).latest()
    assert latest is not None
    return dict(load(latest)["model"])


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = loop.set_rates

    def rates(optimizer: Any, recipe: Any, now: Any, **settings: Any) -> dict[str, float]:
        if now.step == step:
            raise Killed
        return original(optimizer, recipe, now, **settings)

    monkeypatch.setattr(loop, "set_rates", rates)


def test_a_run_leaves_a_folder_that_explains_itself(pictures: Path, tmp_path: Path) -> None:
    outcome = train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
    assert outcome.finished
    assert outcome.steps == 8
    assert 0 <= outcome.figures["knn"] <= 1
    for name in ("views.png", "curves.png", "neighbours.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 100
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["epochs"] == 2
    assert config["data"]["images"] == 32
    readme = (tmp_path / "run" / "README.md").read_text()
    assert "simclr" in readme
    assert "k-NN" in readme


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_with_the_same_bits(
    method: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = quick(method)
    train(method, str(pictures), tmp_path / "straight", given)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            train(method, str(pictures), tmp_path / "killed", given)
    assert losses(tmp_path / "killed")[-1][0] == 5
    train(method, str(pictures), tmp_path / "killed", given)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    straight, killed = final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed")
    assert all(torch.equal(value, killed[name]) for name, value in straight.items())


def test_a_kill_before_the_first_checkpoint_starts_anew(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            train("byol", str(pictures), tmp_path / "run", quick("byol"))
    assert train("byol", str(pictures), tmp_path / "run", quick("byol")).finished
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


def test_a_finished_run_is_left_as_it_is(pictures: Path, tmp_path: Path) -> None:
    train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
    before = losses(tmp_path / "run")
    assert train("simclr", str(pictures), tmp_path / "run", quick("simclr")).finished
    assert losses(tmp_path / "run") == before


@pytest.mark.parametrize("cache", ["host", "stream", "device"])
def test_losses_do_not_depend_on_where_the_images_are(cache: str, pictures: Path, tmp_path: Path) -> None:
    train("simclr", str(pictures), tmp_path / "auto", quick("simclr"))
    train("simclr", str(pictures), tmp_path / cache, quick("simclr", cache=cache))
    assert losses(tmp_path / cache) == losses(tmp_path / "auto")


def test_groups_give_positives_from_other_images(pictures: Path, tmp_path: Path) -> None:
    train("simclr", str(pictures), tmp_path / "alone", quick("simclr"))
    train("simclr", str(pictures), tmp_path / "grouped", quick("simclr", group_by="folder"))
    assert losses(tmp_path / "grouped") != losses(tmp_path / "alone")
    assert all(loss == loss for _, loss in losses(tmp_path / "grouped"))


def test_accumulated_parts_give_the_gradient_of_the_whole_where_rows_are_independent(
    pictures: Path, tmp_path: Path
) -> None:
    """BYOL without batch norm: its loss is a mean over rows, so parts must add up to the batch."""
    given = quick("byol", backbone="test_vit/4", optimizer="sgd")
    for parts in (1, 2):
        train("byol", str(pictures), tmp_path / str(parts), given | {"accumulate": str(parts)})
    assert losses(tmp_path / "1")[0][1] == pytest.approx(losses(tmp_path / "2")[0][1], rel=0.2)
    assert len(losses(tmp_path / "2")) == 8


def test_a_trained_method_comes_back_from_its_folder(pictures: Path, tmp_path: Path) -> None:
    train("moco_v2", str(pictures), tmp_path / "run", quick("moco_v2"))
    trained = open_run(tmp_path / "run")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        again = open_run(tmp_path / "run" / "checkpoints" / "best.pt").method.embed(images)
        assert torch.equal(trained.method.embed(images), again)
    assert trained.settings.config.method == "moco_v2"
    assert not trained.method.training


def test_another_run_can_start_from_its_weights(pictures: Path, tmp_path: Path) -> None:
    train("simclr", str(pictures), tmp_path / "first", quick("simclr"))
    given = quick("barlow_twins", start=tmp_path / "first")
    del given["backbone"]
    train("barlow_twins", str(pictures), tmp_path / "second", given | {"epochs": "1"})
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["config"]["backbone"] == "test_resnet"


# ------------------------------------------------------------------------------------------- bad input


def test_an_unknown_setting_stops_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="did you mean 'epochs'"):
        train("simclr", str(pictures), tmp_path / "run", quick("simclr") | {"epoch": "3"})
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_unknown_method_names_the_closest(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="did you mean 'simclr'"):
        train("simclrr", str(pictures), tmp_path / "run", {})


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmbedServeError, match="empty"):
        train("simclr", str(tmp_path / "empty"), tmp_path / "run", QUICK)


def test_one_image_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(next(pictures.rglob("*.png")), tmp_path / "one")
    with pytest.raises(EmbedServeError, match=r"one|1 image"):
        train("simclr", str(tmp_path / "one"), tmp_path / "run", QUICK)


def test_images_that_are_all_the_same_are_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    for number in range(20):
        shutil.copy(next(pictures.rglob("*.png")), tmp_path / "same" / f"{number}.png")
    with pytest.raises(BadRequest, match="are the same"):
        train("simclr", str(tmp_path / "same"), tmp_path / "run", QUICK)


def test_a_class_with_one_image_trains(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    (folder / "lonely").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "lonely" / "only.png")
    assert train("simclr", str(folder), tmp_path / "run", quick("simclr")).finished


def test_a_corrupt_file_is_listed_and_the_rest_trains(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    (folder / "class-0" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert train("simclr", str(folder), tmp_path / "run", quick("simclr")).finished
    skipped = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["skipped"]
    assert [one["key"] for one in skipped] == ["class-0/3.png"]


def test_a_batch_larger_than_the_data_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="more than the 32 images"):
        train("simclr", str(pictures), tmp_path / "run", quick("simclr", batch_size=64))


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("byol", {}, "a run of simclr, not byol"),
        ("simclr", {"lr": "0.5"}, "with lr="),
        ("simclr", {"epochs": "3"}, "with epochs=2, not 3"),
    ],
)
def test_a_folder_with_another_run_is_refused(
    method: str, changes: dict[str, str], said: str, pictures: Path, tmp_path: Path
) -> None:
    train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(Conflict, match=said):
        train(method, str(pictures), tmp_path / "run", quick(method) | changes)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_changed_data_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    train("simclr", str(folder), tmp_path / "run", quick("simclr"))
    (folder / "class-0" / "0.png").unlink()
    with pytest.raises(Conflict, match="on other data"):
        train("simclr", str(folder), tmp_path / "run", quick("simclr"))


def test_another_number_of_processes_is_refused(pictures: Path, tmp_path: Path) -> None:
    train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["world_size"] = 4
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Conflict, match="--nproc-per-node 4"):
        train("simclr", str(pictures), tmp_path / "run", quick("simclr"))


def test_a_loss_that_is_no_number_stops_with_what_to_try(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbedServeError, match="lower learning rate") as raised:
        train("barlow_twins", str(pictures), tmp_path / "run", quick("barlow_twins", lr=1e30))
    assert raised.value.code == "loss_not_finite"
    latest = Checkpoints(tmp_path / "run" / "checkpoints", keep=1).latest()
    if latest is not None:
        assert all(value.isfinite().all() for value in load(latest)["model"].values())


def test_a_disk_that_fills_during_a_checkpoint_keeps_the_one_before(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.fsync, []

    def full(descriptor: int) -> None:
        if ".pt" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            calls.append(descriptor)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmbedServeError, match=r"(?i)space|full"):
        train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
    monkeypatch.undo()
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path / "cache"))
    assert train("simclr", str(pictures), tmp_path / "run", quick("simclr")).finished


def test_two_processes_cannot_train_into_one_folder(pictures: Path, tmp_path: Path) -> None:
    from training.run import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(Conflict, match="Another process"):
        train("simclr", str(pictures), tmp_path / "run", quick("simclr"))
