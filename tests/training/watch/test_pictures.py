"""Pictures are really drawn, with everything in them where it belongs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from embedserve.errors import EmbedServeError
from tests.training.watch.examples import metrics
from training.watch import curves_picture, neighbours_picture, views_picture
from training.watch.grids import RIGHT, SIDE, WRONG

COLOURS = np.array([[255, 0, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def flat(size: int, *colours: int) -> NDArray[np.uint8]:
    """Images of one colour each: uint8 [n, size, size, 3]."""
    return np.broadcast_to(COLOURS[list(colours), None, None], (len(colours), size, size, 3)).copy()


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(picture: NDArray[np.uint8], colour: Any) -> int:
    return int((picture == np.array(colour, np.uint8)).all(2).sum())


def reddish(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    red, green, blue = (picture[:, :, channel].astype(int) for channel in range(3))
    return np.asarray(red > np.maximum(green, blue) + 60)


# --------------------------------------------------------------------------------------------- views


def test_images_and_views_are_drawn_in_rows_with_every_pixel_enlarged(tmp_path: Path) -> None:
    views_picture(flat(28, 0, 1), [flat(28, 1, 1), flat(28, 2, 0)], tmp_path / "views.png")
    picture = pixels(tmp_path / "views.png")
    area = (28 * (SIDE // 28)) ** 2
    assert [count(picture, colour) for colour in COLOURS] == [2 * area, 3 * area, area]
    first_row, second_row = np.split(picture, [picture.shape[0] * 11 // 20])
    assert [count(first_row, colour) for colour in COLOURS] == [area, area, area]
    assert [count(second_row, colour) for colour in COLOURS] == [area, 2 * area, 0]
    red, blue = (np.argwhere((first_row == colour).all(2))[:, 1] for colour in COLOURS[:2])
    assert red.max() < blue.min(), "the image is left of its views"


def test_small_crops_are_drawn_smaller_than_full_views(tmp_path: Path) -> None:
    views_picture(flat(224, 0), [flat(224, 1), flat(96, 2)], tmp_path / "views.png")
    picture = pixels(tmp_path / "views.png")
    red, blue, yellow = (count(picture, colour) for colour in COLOURS)
    assert red == blue == SIDE**2
    assert yellow == (SIDE * 96 // 224) ** 2


def test_columns_have_their_names(tmp_path: Path) -> None:
    images, views = flat(32, 0), [flat(32, 1)]
    views_picture(images, views, tmp_path / "a.png")
    views_picture(images, views, tmp_path / "b.png", names=["global 1"])
    assert pixels(tmp_path / "a.png").shape == pixels(tmp_path / "b.png").shape
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize("size", [1, 7, 60, 500])
def test_images_of_any_size_fit(tmp_path: Path, size: int) -> None:
    views_picture(flat(size, 0), [flat(size, 1)], tmp_path / "views.png")
    assert max(pixels(tmp_path / "views.png").shape) < 3.5 * SIDE


# ---------------------------------------------------------------------------------------- neighbours


def test_right_and_wrong_neighbours_are_framed_and_counted(tmp_path: Path) -> None:
    queries, neighbours = flat(56, 0, 1), np.stack([flat(56, 0, 1, 2), flat(56, 1, 1, 0)])
    right = np.array([[True, False, False], [True, True, False]])
    neighbours_picture(queries, neighbours, right, tmp_path / "n.png")
    judged = pixels(tmp_path / "n.png")
    assert count(judged, RIGHT) > 1.5 * 1000
    assert count(judged, RIGHT) == pytest.approx(count(judged, WRONG), rel=0.1), "three of each"
    neighbours_picture(queries, neighbours, ~right, tmp_path / "n.png")
    assert (pixels(tmp_path / "n.png") != judged).any()


def test_without_labels_nothing_is_called_right(tmp_path: Path) -> None:
    neighbours_picture(flat(56, 0), flat(56, 1, 2)[None], None, tmp_path / "n.png")
    picture = pixels(tmp_path / "n.png")
    assert count(picture, RIGHT) == count(picture, WRONG) == 0
    assert [count(picture, colour) for colour in COLOURS] == [SIDE**2] * 3


def test_the_nearest_neighbour_stands_next_to_the_image(tmp_path: Path) -> None:
    neighbours_picture(flat(56, 0), flat(56, 1, 2)[None], None, tmp_path / "n.png")
    picture = pixels(tmp_path / "n.png")
    lefts = [np.argwhere((picture == colour).all(2))[:, 1].min() for colour in COLOURS]
    assert lefts == sorted(lefts)


# -------------------------------------------------------------------------------------------- curves


def test_curves_have_a_chart_for_every_quantity(tmp_path: Path) -> None:
    curves_picture(metrics(), tmp_path / "all.png")
    curves_picture(metrics(labels=False), tmp_path / "unlabelled.png")
    picture = pixels(tmp_path / "all.png")
    height, width = picture.shape[:2]
    assert 1200 < width < 1600
    assert 500 < height < 800
    blue = (picture.astype(int)[:, :, 2] > picture.astype(int)[:, :, 0] + 80).reshape(height, width)
    for rows in np.array_split(blue, 2):
        for part in np.array_split(rows, 3, axis=1):
            assert part.sum() > 100, "one of the six charts is empty"
    unlabelled = pixels(tmp_path / "unlabelled.png")
    assert (unlabelled[-height // 2 :, -width // 3 :] == 255).all(), "five charts leave a place free"


def test_alarms_are_marked_where_they_were_raised(tmp_path: Path) -> None:
    records = metrics()
    curves_picture(records, tmp_path / "calm.png")
    assert reddish(pixels(tmp_path / "calm.png")).sum() == 0
    records[9] |= {"alarm_collapsed": "Look."}
    curves_picture(records, tmp_path / "alarmed.png")
    red = reddish(pixels(tmp_path / "alarmed.png"))
    charts = red[: int(0.94 * len(red))]
    for part in np.array_split(charts, 3, axis=1):
        across = np.flatnonzero(part.sum(0) > 40) / part.shape[1]
        assert len(across), "no line in one of the charts"
        assert ((across > 0.35) & (across < 0.55)).all(), "epoch 2 of 5 is left of the middle"
    assert red[len(charts) :].sum() > 100, "what they are stands below"


@pytest.mark.parametrize("records", [[], metrics(5), [{"step": 5, "epoch": 0.5, "loss": None, "lr": 0.1}]])
def test_little_or_nothing_to_draw_is_drawn_too(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    curves_picture(records, tmp_path / "curves.png")
    assert len(np.unique(pixels(tmp_path / "curves.png"))) > 10, "not blank"


def test_a_long_noisy_loss_is_drawn_with_its_median(tmp_path: Path) -> None:
    records = [
        {"step": step, "epoch": step / 100, "loss": 5 + math.sin(step * 12.9898) * 3} for step in range(2000)
    ]
    curves_picture(records, tmp_path / "curves.png")
    picture = pixels(tmp_path / "curves.png").astype(int)
    rows = np.argwhere(picture[:, :, 2] > picture[:, :, 0] + 80)[:, 0]
    assert rows.max() - rows.min() < picture.shape[0] / 4, "the median of noise is nearly flat"


def test_no_window_system_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    curves_picture(metrics(), tmp_path / "curves.png")


# ---------------------------------------------------------------------------------------- all of them


def test_a_picture_replaces_the_one_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    curves_picture(metrics(), path)
    views_picture(flat(32, 0), [flat(32, 1)], path)
    assert pixels(path).shape[1] < 400
    assert {one.name for one in tmp_path.iterdir()} == {"p.png"}
    with pytest.raises(EmbedServeError, match="cannot be written"):
        neighbours_picture(flat(32, 0), flat(32, 1)[None], None, tmp_path / "gone" / "p.png")
