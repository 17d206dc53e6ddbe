"""Two encoders compared by the neighbours that they give."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedserve.bundle import open_bundle, seal
from embedserve.cli import main
from embedserve.compare import Comparison, compare, lines, rank_correlation
from embedserve.compare_picture import TILE, draw
from embedserve.encoder import Encoder
from embedserve.errors import BadRequest, InvalidField, NotFound
from tests.tiny_bundle import DIM, write_tiny_bundle

COUNT = 30


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a colour above and another one below, so that a crop sees something else."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        picture = Image.new("RGB", (16, 16), tuple(map(int, random.integers(0, 256, 3))))
        picture.paste(tuple(map(int, random.integers(0, 256, 3))), (4, 4, 12, 12))
        picture.save(folder / ("sub" if number % 3 == 0 else "") / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def whole(tiny_folder: Path) -> Encoder:
    return Encoder.load(tiny_folder, threads=1)


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Sees the middle of each picture only."""
    folder = tmp_path_factory.mktemp("bundles") / "middle"
    described = write_tiny_bundle(folder, name="middle").description
    assert described.image
    spec = described.image.preprocessing.model_copy(update={"resize_to": 16})
    image = described.image.model_copy(update={"preprocessing": spec})
    return Encoder(seal(folder, described.model_copy(update={"image": image})), threads=1)


@pytest.fixture(scope="module")
def different(whole: Encoder, middle: Encoder, images: Path) -> Comparison:
    return compare(whole, middle, images, k=4, show=COUNT)


def test_an_encoder_agrees_with_itself(whole: Encoder, images: Path) -> None:
    found = compare(whole, whole, images, k=5)
    assert (found.images, found.overlap, found.first) == (COUNT, 1, 1)
    assert found.rank_correlation == pytest.approx(1)
    assert found.mean_cosine == pytest.approx(1)
    assert all(one.shared for query in found.queries for one in (*query.a, *query.b))
    assert "most different" not in list(lines(found))


def test_figures_are_those_of_a_literal_comparison(
    different: Comparison, whole: Encoder, middle: Encoder, images: Path
) -> None:
    from embedserve.config import Limits

    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    vectors = [
        encoder.embed_images([encoder.read_image((images / name).read_bytes(), Limits()) for name in names])
        for encoder in (whole, middle)
    ]
    overlaps, correlations = {}, {}
    for row, name in enumerate(names):
        near, similar = [], []
        for one in vectors:
            scores = {other: float(one[row] @ one[i]) for i, other in enumerate(names) if i != row}
            near.append(sorted(scores, key=lambda other: (-round(scores[other], 6), other))[:4])
            similar.append([scores[other] for other in names if other != name])
        overlaps[name] = len(set(near[0]) & set(near[1])) / 4
        ranks = [np.argsort(np.argsort(one)) for one in similar]  # no two are equal here
        correlations[name] = float(np.corrcoef(*ranks)[0, 1])
    assert different.overlap == pytest.approx(np.mean(list(overlaps.values())))
    assert different.rank_correlation == pytest.approx(np.mean(list(correlations.values())), abs=1e-6)
    assert 0.05 < different.overlap < 0.95
    for query in different.queries:
        assert query.overlap == overlaps[query.image]
        assert query.rank_correlation == pytest.approx(correlations[query.image], abs=1e-6)


def test_the_most_different_come_first_with_the_neighbours_of_both(different: Comparison) -> None:
    order = [(query.overlap, query.rank_correlation) for query in different.queries]
    assert order == sorted(order)
    assert len(order) == COUNT
    worst = different.queries[0]
    for mine, theirs in ((worst.a, worst.b), (worst.b, worst.a)):
        assert len(mine) == 4
        assert [one.score for one in mine] == sorted((one.score for one in mine), reverse=True)
        others = {one.image for one in theirs}
        assert [one.shared for one in mine] == [one.image in others for one in mine]
        assert worst.image not in {one.image for one in mine}


def test_encoders_of_other_dimensions_are_compared(whole: Encoder, images: Path, tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "wider"
    described = write_tiny_bundle(folder, name="wider").description
    model = onnx.load(folder / "image.onnx")
    (padding,) = [one for one in model.graph.initializer if one.name == "padding"]
    padding.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 0, 20 - 4]), "padding"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 20
    onnx.save(model, folder / "image.onnx")
    wider = Encoder(seal(folder, described.model_copy(update={"dim": 20, "text": None})), threads=1)
    found = compare(whole, wider, images)
    assert (found.a.dim, found.b.dim) == (DIM, 20)
    assert (found.overlap, found.mean_cosine, found.min_cosine) == (1, None, None)


def test_from_many_images_some_are_drawn_always_the_same(
    whole: Encoder, middle: Encoder, images: Path
) -> None:
    first, second = (compare(whole, middle, images, most=10) for _ in range(2))
    assert first == second
    assert (first.images, first.k) == (10, 9)


def test_a_file_that_cannot_be_read_is_reported(whole: Encoder, images: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    found = compare(whole, whole, folder)
    assert [problem.path for problem in found.problems] == ["00.png"]
    assert found.images == COUNT


def test_too_few_images_and_no_folder_are_refused(whole: Encoder, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        compare(whole, whole, tmp_path / "nowhere")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(BadRequest, match=r"holds 2 images .* at least 3"):
        compare(whole, whole, tmp_path)


def test_encoders_need_an_image_tower(
    whole: Encoder, images: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "words"))
    (folder / "image.onnx").unlink()
    described = open_bundle(tiny_folder).description.model_copy(update={"image": None, "name": "words"})
    words = Encoder(seal(folder, described), threads=1)
    with pytest.raises(InvalidField, match="'words' has no image tower"):
        compare(whole, words, images)


def test_equal_numbers_share_their_rank() -> None:
    """scipy.stats.spearmanr([1, 2, 2, 3], [4, 1, 1, 9]) is a third; with itself any row gives 1."""
    assert rank_correlation(np.array([1.0, 2, 2, 3]), np.array([4.0, 1, 1, 9])) == pytest.approx(1 / 3)
    row = np.random.default_rng(0).normal(size=50).round(1)
    assert rank_correlation(row, row) == pytest.approx(1)
    assert rank_correlation(row, -row) == pytest.approx(-1)
    assert np.isnan(rank_correlation(row, np.zeros(50)))


def test_the_picture_frames_what_only_one_encoder_has(different: Comparison, images: Path) -> None:
    few = dataclasses.replace(different, queries=different.queries[:2])
    sheet = draw(few, images)
    pixels = np.asarray(sheet).reshape(-1, 3)
    orange = (pixels == (200, 72, 20)).all(axis=1).sum()
    alone = sum(not one.shared for query in few.queries for one in (*query.a, *query.b))
    assert alone > 0
    side = TILE + 4
    assert orange == pytest.approx(alone * (4 * 3 * side - 36), rel=0.02)
    assert sheet.height > draw(dataclasses.replace(few, queries=few.queries[:1]), images).height


def test_the_command_prints_a_table_and_writes_both_files(
    tiny_folder: Path, middle: Encoder, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(tiny_folder), str(middle.bundle.folder), "--images", str(images)]
    assert main([*command, "--k", "4", "--show", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A  tiny: 8 numbers" in printed
    assert "B  middle: 8 numbers" in printed
    assert "overlap of the 4 nearest" in printed
    assert printed.count("only A:") == 3
    document = json.loads((out / "comparison.json").read_text())
    assert document["images"] == COUNT
    assert len(document["queries"]) == 3
    with Image.open(out / "comparison.png") as picture:
        assert picture.width > 500
    assert main([*command, "--k", "4", "--show", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert main([*command, "--k", "0"]) == 2
    assert "--k is 0" in capsys.readouterr().err
