"""Scenes with known masks, segmentation and finding objects, on patch features that are known."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import coloured, cutout, mean_colour, source_of, tiny_encoder
from training.backbones import Backbone
from training.evaluate import dense
from training.evaluate.dense import DenseSettings, evaluate_dense, find_objects, intersection_over_union
from training.evaluate.network import NetworkEncoder
from training.evaluate.scenes import find_cutouts, make_scene, read_cutout


def _objects(count=20):
    return source_of([cutout(seed) for seed in range(count)])


class PatchColours(Backbone):
    """Patch features are the mean colour of each of 8×8 patches."""

    kind = "conv"

    def __init__(self, cells: int = 8) -> None:
        super().__init__("colours", torch.nn.Identity(), 3, 3)
        self.cells = cells

    def features(self, images, masks=None):
        patches = torch.nn.functional.adaptive_avg_pool2d(images, self.cells)
        return patches.mean((2, 3)), patches


def _colour_encoder(tmp_path, cells=8):
    return NetworkEncoder("colours", PatchColours(cells), size=32, stored_size=32, cache=tmp_path)


def test_transparency_is_read_from_the_file():
    image = read_cutout(_objects(1), 0)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0
    assert image.getpixel((24, 24))[3] == 255


def test_transparency_is_turned_upright_with_its_image():
    raw = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    raw.putpixel((0, 0), (9, 9, 9, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    file = io.BytesIO()
    raw.save(file, "PNG", exif=exif)
    image = read_cutout(source_of([file.getvalue()]), 0)
    assert image.size == (2, 4)
    assert image.getpixel((1, 0))[3] == 255


def test_images_without_transparency_and_damaged_ones_are_no_cutouts():
    opaque = io.BytesIO()
    Image.new("RGB", (8, 8)).save(opaque, "PNG")
    source = source_of([opaque.getvalue(), cutout(0)[:100], b"", np.zeros((4, 4, 3), np.uint8), cutout(1)])
    assert [read_cutout(source, row) is None for row in range(5)] == [True, True, True, True, False]
    assert find_cutouts(source, most=9, least=1, seed=0, evaluation="dense").rows.tolist() == [4]


def test_an_image_that_is_all_object_or_all_ground_is_no_cutout():
    files = []
    for alpha in (0, 255):
        image = Image.new("RGBA", (8, 8), (1, 2, 3, 255))
        image.putalpha(alpha)
        image.putpixel((0, 0), (1, 2, 3, 254 - alpha))
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    assert not len(find_cutouts(source_of(files), most=9, least=0, seed=0, evaluation="dense").rows)


def test_a_scene_shows_the_object_where_its_mask_says():
    red = Image.new("RGBA", (10, 20), (255, 0, 0, 255))
    scene = make_scene(red, 40, np.random.default_rng(0))
    inside = scene.mask >= 0.5
    assert (scene.pixels[inside] == (255, 0, 0)).all()
    assert not (scene.pixels[~inside] == (255, 0, 0)).all(1).any()
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert 16 <= np.ptp(rows) + 1 <= 32
    assert np.ptp(columns) + 1 == pytest.approx((np.ptp(rows) + 1) / 2, abs=1)


def test_scenes_differ_by_their_seed_only():
    one, same, other = (
        make_scene(read_cutout(_objects(1), 0), 32, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)


def test_intersection_over_union_counts_pixels():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(5, 4, 6, generator=generator) < 0.5 for _ in "ab")
    found = intersection_over_union(one, other)
    for row in range(5):
        a = {tuple(at) for at in one[row].nonzero().tolist()}
        b = {tuple(at) for at in other[row].nonzero().tolist()}
        assert float(found[row]) == pytest.approx(len(a & b) / len(a | b))
    assert intersection_over_union(one[:1] & False, one[:1] & False).tolist() == [1]


class _Known:
    """Patch maps that were made by hand."""

    def __init__(self, patches, covered):
        self.patches, self.covered = patches, covered


def test_objects_are_found_by_their_mean_patch():
    generator = torch.Generator().manual_seed(0)
    first = _Known(torch.randn(6, 5, 3, 3, generator=generator), torch.rand(6, 3, 3, generator=generator))
    second = _Known(torch.randn(6, 5, 3, 3, generator=generator), torch.rand(6, 3, 3, generator=generator))
    rank, on_object = find_objects(first, second)
    for row in range(6):
        query = sum(
            first.covered[row, y, x].double()
            * first.patches[row, :, y, x].double()
            / first.patches[row, :, y, x].double().norm()
            for y in range(3)
            for x in range(3)
        )
        cosines = [
            {
                (y, x): float(query @ patch[:, y, x].double() / query.norm() / patch[:, y, x].double().norm())
                for y in range(3)
                for x in range(3)
            }
            for patch in second.patches
        ]
        best = [max(one.values()) for one in cosines]
        assert int(rank[row]) == sum(one > best[row] for one in best)
        place = max(cosines[row], key=cosines[row].get)
        assert bool(on_object[row]) == bool(second.covered[row][place] >= 0.5)


def test_patches_that_keep_the_colour_find_the_object_and_whole_images_do_less(tmp_path):
    result = evaluate_dense(_colour_encoder(tmp_path), _objects(), DenseSettings(epochs=3))
    assert (result.objects, result.train, result.test, result.patches) == (20, 14, 6, (8, 8))
    assert result.recall_at_5 > 0.8
    assert result.recall_at_1 > result.pooled_recall_at_1
    assert 0 < result.iou <= 1
    assert result.pointing > 0.5
    assert "8×8 patches" in result.summary()
    assert result.picture().size[1] > 6 * 128


class AlphaNet(PatchColours):
    """Patch features that hold the true mask: bright is object."""

    def features(self, images, masks=None):
        bright = (images.mean(1, keepdim=True) > 2.0).float()
        return images.mean((2, 3)), torch.nn.functional.adaptive_avg_pool2d(bright, 16)


def test_features_that_know_the_object_segment_it(tmp_path, monkeypatch):
    real = dense.make_scene

    def on_dark(image, size, chance):
        scene = real(image, size, chance)
        pixels = np.where(scene.mask[..., None] >= 0.5, 255, 30).repeat(3, 2).astype(np.uint8)
        return replace(scene, pixels=pixels)

    monkeypatch.setattr(dense, "make_scene", on_dark)
    encoder = NetworkEncoder("alpha", AlphaNet(), size=32, stored_size=32, cache=tmp_path)
    assert evaluate_dense(encoder, _objects(), DenseSettings(epochs=5)).iou > 0.8


def test_the_same_seed_gives_the_same_figures(tmp_path):
    once, again = (
        evaluate_dense(tiny_encoder(tmp_path), _objects(12), DenseSettings(epochs=1)) for _ in "ab"
    )
    assert (once.iou, once.recall_at_1, once.pointing) == (again.iou, again.recall_at_1, again.pointing)


def test_without_masks_it_says_what_to_give():
    with pytest.raises(InvalidField, match=r"0 of 80 images.*alpha channel"):
        evaluate_dense(_colour_encoder(None), coloured(), DenseSettings())


def test_a_bundle_has_no_patches():
    with pytest.raises(InvalidField, match="Name the folder of the run"):
        evaluate_dense(mean_colour(), _objects(), DenseSettings())


def test_a_map_of_one_patch_has_no_places(tmp_path):
    with pytest.raises(InvalidField, match="1×1 at 32 pixels"):
        evaluate_dense(_colour_encoder(tmp_path, cells=1), _objects(), DenseSettings())
