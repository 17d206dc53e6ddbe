"""Attention: the masks that heads draw, against masks that are known."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import coloured, cutout, mean_colour, source_of
from training.backbones import Backbone, build
from training.evaluate.attention import AttentionSettings, evaluate_attention, most_attended
from training.evaluate.network import NetworkEncoder


class Looking(Backbone):
    """Two heads over patches of 2×2 pixels: one looks at what is not white, one everywhere alike."""

    kind = "vit"

    def __init__(self) -> None:
        super().__init__("looking", torch.nn.Identity(), 3, 3)

    def features(self, images, masks=None):
        return images.mean((2, 3)), images

    def attention(self, images):
        white = images.amin(1, keepdim=True) > 2
        object_ = torch.nn.functional.avg_pool2d((~white).float(), 2)
        return torch.cat((object_ + 1e-4, torch.ones_like(object_)), dim=1)


def _looking(tmp_path, size=32, stored_size=32):
    return NetworkEncoder("looking", Looking(), size=size, stored_size=stored_size, cache=tmp_path)


def _objects(count=6):
    return source_of([cutout(seed, 64) for seed in range(count)])


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95])
def test_the_mask_is_the_fewest_patches_that_hold_the_mass(mass):
    attention = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    chosen = most_attended(attention, mass)
    for head, mask in zip(attention.double().view(6, 20), chosen.view(6, 20), strict=True):
        kept, held = set(), 0.0
        for place in sorted(range(20), key=lambda place, head=head: -float(head[place])):
            if held >= mass * float(head.sum()):
                break
            kept.add(place)
            held += float(head[place])
        assert set(mask.nonzero()[:, 0].tolist()) == kept


def test_a_head_that_looks_at_the_object_has_its_shape(tmp_path):
    result = evaluate_attention(_looking(tmp_path), _objects(), AttentionSettings(mass=0.99))
    at_object, everywhere = result.iou_by_head
    assert at_object > 0.85
    assert everywhere == pytest.approx(result.iou_of_everything, abs=0.02)
    assert result.iou_of_best_head == pytest.approx(at_object)
    assert result.entropy_by_head[0] < result.entropy_by_head[1] == pytest.approx(1)
    assert (result.images, result.masks) == (6, 6)
    assert "best head of each image" in result.summary()
    assert result.picture().size[0] > 3 * 112


def test_masks_are_cut_like_the_images(tmp_path):
    wide = Image.new("RGBA", (96, 48), (0, 0, 0, 0))
    wide.paste((200, 0, 0, 255), (30, 10, 60, 40))
    file = io.BytesIO()
    wide.save(file, "PNG")
    encoder = _looking(tmp_path, size=64, stored_size=72)
    result = evaluate_attention(encoder, source_of([file.getvalue()]), AttentionSettings(mass=0.99))
    assert result.iou_by_head[0] > 0.85


def test_without_masks_there_are_overlays_and_no_figures(tmp_path):
    result = evaluate_attention(_looking(tmp_path), coloured(5), AttentionSettings(images=3))
    assert (result.images, result.masks, result.iou_by_head, result.iou_of_best_head) == (3, 0, None, None)
    assert len(result.examples) == 3
    assert "no masks" in result.summary()


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    images = [np.zeros((8, 8, 3), np.uint8), b"nothing"]
    assert evaluate_attention(_looking(tmp_path), source_of(images), AttentionSettings()).images == 1
    with pytest.raises(InvalidField, match="can be read"):
        evaluate_attention(_looking(tmp_path), source_of(images[1:]), AttentionSettings())


def test_a_real_transformer_can_be_looked_into(tmp_path):
    torch.manual_seed(0)
    encoder = NetworkEncoder("vit", build("test_vit", 32), size=32, stored_size=32, cache=tmp_path)
    result = evaluate_attention(encoder, _objects(3), AttentionSettings())
    heads = len(result.iou_by_head)
    assert heads == len(result.entropy_by_head) > 0
    assert 0 <= min(result.iou_by_head) <= result.iou_of_best_head <= 1


def test_convolutional_encoders_and_bundles_have_no_attention(tmp_path):
    encoder = partial(NetworkEncoder, size=32, stored_size=32, cache=tmp_path)
    torch.manual_seed(0)
    with pytest.raises(InvalidField, match="is convolutional"):
        evaluate_attention(encoder("conv", build("resnet18", 32)), _objects(), AttentionSettings())
    with pytest.raises(InvalidField, match="attention needs the network"):
        evaluate_attention(mean_colour(), _objects(), AttentionSettings())


@pytest.mark.parametrize("wrong", [{"images": 0}, {"mass": 0.0}, {"mass": 1.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidField, match=next(iter(wrong))):
        AttentionSettings(**wrong)
