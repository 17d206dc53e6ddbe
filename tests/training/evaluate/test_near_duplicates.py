"""Near-duplicates: the copies that are made, and the figures against counting pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import (
    EyeEncoder,
    coloured,
    source_of,
    tiny_encoder,
    unit,
    without_labels,
)
from training.evaluate import near_duplicates
from training.evaluate.near_duplicates import (
    TRANSFORMATIONS,
    DuplicatesSettings,
    area_under_curve,
    compare,
    evaluate_near_duplicates,
)


def _picture(width=60, height=40, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _copy(name, seed=0):
    return TRANSFORMATIONS[name](_picture(), np.random.default_rng(seed))


def test_the_area_is_the_share_of_pairs_in_order():
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(3, 9, (30,), generator=generator) / 10
    negative = torch.randint(0, 7, (25,), generator=generator) / 10
    pairs = [(a > b) + (a == b) / 2 for a in positive.tolist() for b in negative.tolist()]
    assert area_under_curve(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_copies_are_compared_with_their_original_and_the_closest_other():
    generator = torch.Generator().manual_seed(0)
    gallery, copies = torch.randn(9, 3, generator=generator), torch.randn(4, 3, generator=generator)
    originals = torch.tensor([8, 0, 3, 3])
    own, other = compare(copies * 7, gallery, originals)
    cosines = unit(copies.double()) @ unit(gallery.double()).T
    for row, place in enumerate(originals.tolist()):
        assert float(own[row]) == pytest.approx(float(cosines[row, place]), abs=1e-6)
        rest = [float(one) for column, one in enumerate(cosines[row]) if column != place]
        assert float(other[row]) == pytest.approx(max(rest), abs=1e-6)


def test_the_threshold_parts_copies_from_others_best():
    positive, negative = torch.tensor([0.9, 0.8, 0.7, 0.3]), torch.tensor([0.75, 0.2, 0.1, 0.3])
    threshold = near_duplicates._threshold(positive, negative)

    def gain(at):
        return float((positive >= at).float().mean() - (negative >= at).float().mean())

    assert gain(threshold) == max(gain(at) for at in (*positive.tolist(), *negative.tolist()))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_copy_differs_from_its_original_and_is_made_alike_again(name):
    one, again = _copy(name), _copy(name)
    assert one.mode == "RGB"
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != _picture().tobytes()


def test_copies_are_what_their_names_say():
    picture = _picture()
    assert _copy("crop, 30% lost").width * _copy("crop, 30% lost").height == pytest.approx(
        0.7 * 60 * 40, rel=0.05
    )
    assert _copy("resized to a third").size == (20, 13)
    assert _copy("stretched by 20%").size in {(72, 40), (60, 48)}
    assert _copy("turned by 10°").width > 60
    assert _copy("caption bar").size == (60, 47)
    assert _copy("caption bar").crop((0, 0, 60, 40)).tobytes() == picture.tobytes()
    assert np.array_equal(np.asarray(_copy("mirrored"))[:, ::-1], np.asarray(picture))
    gray = np.asarray(_copy("gray"))
    assert (gray[..., 0] == gray[..., 1]).all()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_the_smallest_images_can_be_copied(name, size):
    copy = TRANSFORMATIONS[name](_picture().resize(size), np.random.default_rng(0))
    assert min(copy.size) >= 1


def _shapes(count=12):
    chance = np.random.default_rng(0)
    return source_of(
        [chance.integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(count)]
    )


def test_an_encoder_that_sees_only_brightness_does_not_mind_a_mirror():
    def by_brightness(pixels):
        angle = pixels.mean() / 255 * np.pi
        return [np.cos(angle), np.sin(angle)]

    result = evaluate_near_duplicates(EyeEncoder(by_brightness), _shapes(), DuplicatesSettings())
    assert result.transformations["mirrored"].recall_at_1 == 1
    assert result.transformations["mirrored"].cosine == pytest.approx(1, abs=1e-5)
    assert result.transformations["colours ± 30%"].recall_at_1 < 1
    assert (result.images, result.gallery) == (12, 12)
    assert "hardest" in result.summary()
    assert result.picture().size == (1326, 753)  # a chart, then the images and their eleven copies


def test_no_labels_are_needed_and_fewer_images_can_be_copied(tmp_path):
    result = evaluate_near_duplicates(
        tiny_encoder(tmp_path), without_labels(coloured(20)), DuplicatesSettings(images=5)
    )
    assert (result.images, result.gallery) == (5, 20)
    assert 0 < result.auc < 1
    assert list(result.transformations) == list(TRANSFORMATIONS)


def test_a_copy_of_two_equal_images_counts_as_recognised():
    same = np.zeros((8, 8, 3), np.uint8)
    encoder = EyeEncoder(lambda pixels: [1.0, pixels.mean()])
    result = evaluate_near_duplicates(encoder, source_of([same, same]), DuplicatesSettings())
    assert result.transformations["mirrored"].recall_at_1 == 1
    assert result.transformations["mirrored"].auc == 0.5


def test_copies_made_in_parts_are_the_same_and_keep_their_order(tmp_path, monkeypatch):
    encoder, source = tiny_encoder(tmp_path), _shapes()
    whole = evaluate_near_duplicates(encoder, source, DuplicatesSettings(images=7))
    read: list[int] = []
    fetch = source.fetch
    counted = replace(source, fetch=lambda row: read.append(row) or fetch(row))
    monkeypatch.setattr(near_duplicates, "TOGETHER", 3)
    monkeypatch.setattr(near_duplicates, "EXAMPLES", 0)
    parts = evaluate_near_duplicates(encoder, counted, DuplicatesSettings(images=7))
    assert len(read) == 7  # the gallery is in the cache; each image is decoded once for its eleven copies
    for name, one in whole.transformations.items():
        assert one.recall_at_1 == parts.transformations[name].recall_at_1
        assert one.cosine == pytest.approx(parts.transformations[name].cosine, abs=1e-5)


def test_each_copy_is_of_the_image_in_its_row(tmp_path):
    encoder, source = tiny_encoder(tmp_path), _shapes()
    copies = near_duplicates._embed_copies(encoder, source, 5, lambda done, total: None)
    for row in (0, 7):
        for place, name in enumerate(TRANSFORMATIONS):
            chance = np.random.default_rng((5, place, row))
            made = np.asarray(TRANSFORMATIONS[name](source.read(row), chance))
            alone = encoder.embed(source_of([made]), cached=False).vectors[0]
            torch.testing.assert_close(copies[row, place], alone, atol=1e-5, rtol=1e-4)


def test_one_image_is_too_few():
    with pytest.raises(InvalidField, match="single image"):
        evaluate_near_duplicates(
            EyeEncoder(lambda pixels: [1.0]), coloured(1, classes=1), DuplicatesSettings()
        )


def test_no_image_is_no_setting():
    with pytest.raises(InvalidField, match="images=0"):
        DuplicatesSettings(images=0)
