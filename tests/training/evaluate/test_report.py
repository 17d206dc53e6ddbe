"""What an evaluation leaves behind: JSON and a picture, whole or not at all; and the registry."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

from embedserve.errors import EmbedServeError, NotFound
from tests.training.evaluate.samples import coloured, mean_colour, without_labels
from training.evaluate import EVALUATIONS, Evaluation, find
from training.evaluate.drawing import RIGHT, WRONG, Tile, bars, chart, grid, heatmap, overlay, stack
from training.evaluate.knn import KnnSettings
from training.evaluate.report import PICTURE_ONLY, figures, write_json


@dataclass(frozen=True)
class _Part:
    value: float
    hidden: int = field(default=0, metadata=PICTURE_ONLY)


@dataclass(frozen=True)
class _Found:
    score: float
    parts: dict[str, _Part]
    many: tuple[_Part, ...]
    missing: float | None
    picture_of: list[int] = field(default_factory=list, metadata=PICTURE_ONLY)

    def summary(self) -> str:
        return "found"

    def picture(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


def test_figures_are_all_fields_but_what_is_only_drawn():
    found = _Found(1 / 3, {"a": _Part(float("nan"))}, (_Part(2.0), _Part(float("inf"))), None, [1, 2])
    assert figures(found) == {
        "score": 0.333333,
        "parts": {"a": {"value": None}},
        "many": [{"value": 2.0}, {"value": None}],
        "missing": None,
    }


def test_an_evaluation_writes_its_figures_with_what_they_were_measured_on(tmp_path: Path):
    out = tmp_path / "new" / "eval"
    result = find("knn").run(mean_colour(), coloured(80), KnnSettings(k=3, holdout=0.25), out)
    document = json.loads((out / "knn.json").read_text())
    assert document["evaluation"] == "knn"
    assert (document["encoder"], document["data"], document["images"]) == ("eye", "coloured 0", 80)
    assert document["device"] == "cpu"
    assert document["settings"] == {"k": 3, "temperature": 0.07, "holdout": 0.25, "baseline": False}
    assert document["result"]["top1"] == result.top1 == 1
    assert (document["result"]["train"], document["result"]["test"]) == (60, 20)
    assert "confusion" not in document["result"]
    assert document["seconds"] >= 0
    with Image.open(out / "knn.png") as picture:
        assert picture.size == (1200, 600)
        assert len(picture.convert("RGB").getcolors(2**24)) > 10
    assert sorted(path.name for path in out.iterdir()) == ["knn.json", "knn.png"]


def test_what_was_there_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "knn.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr("os.fsync", _raise)
    with pytest.raises(EmbedServeError, match=r"knn\.json"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["knn.json"]


def _raise(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")

    def never(*arguments):
        raise AssertionError("measured")

    evaluation = Evaluation("knn", "", KnnSettings, never)
    with pytest.raises(EmbedServeError, match="--out"):
        evaluation.run(mean_colour(), coloured(), KnnSettings(), tmp_path / "file" / "eval")


def test_every_evaluation_can_be_found_and_says_what_it_is():
    for name, evaluation in EVALUATIONS.items():
        assert find(name) is evaluation
        assert evaluation.name == name
        assert evaluation.summary
        assert dataclasses.is_dataclass(evaluation.Settings())
        assert set(get_type_hints(evaluation.Settings)) == {
            one.name for one in dataclasses.fields(evaluation.Settings)
        }
    with pytest.raises(NotFound, match="did you mean 'retrieval'"):
        find("retreival")


def test_every_setting_has_its_line_of_help():
    import ast
    import inspect

    for evaluation in EVALUATIONS.values():
        [tree] = ast.parse(inspect.getsource(evaluation.Settings)).body
        for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{evaluation.name}: {ast.unparse(statement)}"


@pytest.mark.parametrize("name", ["knn", "linear", "semi_supervised"])
def test_without_labels_nothing_is_written(name: str, tmp_path: Path):
    with pytest.raises(EmbedServeError, match="needs labels"):
        find(name).run(mean_colour(), without_labels(coloured()), find(name).Settings(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_importing_the_evaluations_imports_no_drawing_and_no_networks():
    code = (
        "import sys, training.evaluate, training.evaluate.knn\n"
        "print([name for name in ('matplotlib', 'torchvision', 'timm', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------- drawing


def test_a_grid_frames_its_tiles_and_keeps_their_shape():
    wide = Image.new("RGB", (20, 10), (1, 2, 3))
    picture = grid(
        [[Tile(wide, "a", RIGHT), Tile(wide, "b", WRONG)], [Tile(wide)]], side=40, columns=("x", "y")
    )
    pixels = np.asarray(picture)
    assert (pixels == (1, 2, 3)).all(2).sum() == 3 * 40 * 20
    assert (pixels == RIGHT).all(2).sum() == 48 * 48 - 40 * 40
    assert (pixels == WRONG).all(2).any()


def test_an_empty_grid_and_long_captions_can_be_drawn():
    assert grid([]).size[0] > 0
    tile = Tile(Image.new("RGB", (1, 300)), "a very long caption " * 9)
    assert grid([[tile]], side=32).size == (32 + 2 * 4 + 6 + 6, 32 + 2 * 4 + 11 + 12 + 6)


def test_an_overlay_colours_what_has_weight():
    picture = overlay(Image.new("RGB", (8, 8)), np.array([[0, 1]], np.float32))
    assert picture.getpixel((0, 4)) == (0, 0, 0)
    assert picture.getpixel((7, 4))[0] > 150


def test_charts_hold_few_and_many_names():
    def draw(left, right):
        bars(left, [f"class {one}" for one in range(100)], [0.5] * 100, "many")
        heatmap(right, np.eye(60), [str(one) for one in range(60)], "many")

    def draw_few(axes):
        heatmap(axes, np.eye(3), "abc", "few")

    both = stack([chart(draw, panels=2, size=(4, 3)), chart(draw_few, size=(4, 3))])
    assert both.size == (800, 600)
    assert len(both.getcolors(2**24)) > 10
