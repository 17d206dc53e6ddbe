"""`embedserve train` and `embedserve eval` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedserve.cli import main
from tests.training.pictures import QUICK, write_pictures
from training.evaluate import EVALUATIONS
from training.methods import METHODS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_pictures(folder / "pictures")
    settings = [
        part
        for item in (QUICK | {"cache_folder": f"{folder}/cache"}).items()
        for part in ("--set", "=".join(item))
    ]
    code = main(
        ["train", "simclr", "--data", str(folder / "pictures"), "--out", str(folder / "run"), *settings]
    )
    assert code == 0
    return folder / "run"


def test_the_methods_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    for name, kind in METHODS.items():
        assert name in shown
        assert kind.paper in shown


def test_everything_that_can_be_set_is_listed_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "byol", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "momentum_end = 1 " in shown
    assert "epochs = " in shown
    assert "blur = 0 to 0.5" in shown


def test_the_evaluations_and_their_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in EVALUATIONS)
    assert main(["eval", "knn", "--list"]) == 0
    assert "k = " in capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "knn", str(run)]) == 0
    assert "k-NN top-1" in capsys.readouterr().out
    assert (run / "eval" / "knn.png").is_file()
    written = json.loads((run / "eval" / "knn.json").read_text())
    assert written["settings"]["k"] == 20


def test_an_evaluation_prints_its_figures_as_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["eval", "retrieval", str(run), "--out", str(tmp_path), "--set", "group_by=folder", "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == "retrieval"


def test_a_bundle_is_evaluated_like_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(run.parent / "pictures")
    assert main(["eval", "knn", "starter", "--data", data, "--out", str(tmp_path)]) == 0
    assert "k-NN top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train"], 2, "Name a method"),
        (["train", "simclr"], 2, "--data and --out"),
        (["train", "simclrr", "--list"], 1, "did you mean 'simclr'"),
        (["train", "simclr", "--data", "x", "--out", "y", "--set", "epochs"], 1, "key=value"),
        (["eval"], 2, "Name what to measure"),
        (["eval", "knn"], 2, "Name the encoder"),
        (["eval", "kn", "runs/x"], 1, "did you mean 'knn'"),
        (["eval", "knn", "/nowhere"], 1, "There is no '/nowhere'"),
        (["eval", "knn", "starter"], 1, "--data"),
        (["eval", "knn", "starter", "--set", "kk=3"], 1, "no such key"),
    ],
)
def test_a_mistake_is_told_with_its_fix(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert said in capsys.readouterr().err


def test_the_sources_and_the_published_checkpoints_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "open_clip:ViT-B-32/laion2b_s34b_b79k" in shown
    assert "published:dino/" in shown


def test_an_export_says_how_near_it_comes_and_what_is_next(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "bundle")]) == 0
    said = capsys.readouterr()
    assert "cosine to PyTorch at least 0.9999" in said.out or "cosine to PyTorch at least 1.0" in said.out
    assert f"embedserve serve --encoder {tmp_path / 'bundle'}" in said.err
    assert main(["check", str(tmp_path / "bundle"), "--seconds", "0.1"]) == 0


def test_an_export_without_a_place_to_go_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "starter"]) == 2
    assert "--out" in capsys.readouterr().err
