"""Both readings of a preprocessing file, ours and the literal one, against the library that wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedserve.bundle import Preprocessing
from embedserve.hub.pixels import PixelRules, from_huggingface, from_open_clip
from embedserve.hub.proof import PIXELS_APART, images
from embedserve.preprocess import preprocess
from tests.embedserve.hub import networks  # also makes torchvision importable

MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.27, 0.28]
PICTURES = [image for image in images() if min(image.size) > 1]


def ours(rules: PixelRules, image: Image.Image) -> np.ndarray:
    return rules.their_numbers(preprocess(image, rules.preprocessing))


def literal(rules: PixelRules, image: Image.Image) -> np.ndarray:
    return rules.their_numbers(rules.their_pixels(image))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_open_clips_file_means_what_open_clip_does(mode: str, interpolation: str) -> None:
    import open_clip

    config: dict[str, Any] = {
        "size": 48,
        "mean": MEAN,
        "std": STD,
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 3,
    }
    rules = from_open_clip(config, "theirs")
    transform = open_clip.image_transform(
        48, is_train=False, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=mode, fill_color=3
    )
    for image in PICTURES:
        expected = transform(image).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(literal(rules, image), expected, atol=1e-6)
        assert np.abs(ours(rules, image) - expected).mean() < 0.01


HUGGING_FACE = {
    "shortest, then crop": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "numbers, as older files have them": {"size": 32, "crop_size": 32, "do_center_crop": True},
    "squash": {"size": {"height": 32, "width": 48}},
    "squash, then crop": {"size": {"height": 40, "width": 40}, "crop_size": 32, "do_center_crop": True},
    "a number without a crop": {"size": 32, "do_center_crop": False, "crop_size": 30},
    "bilinear": {"size": {"height": 32, "width": 32}, "resample": 2},
    "lanczos": {"size": {"height": 32, "width": 32}, "resample": 1},
    "not normalised": {"size": {"height": 32, "width": 32}, "do_normalize": False},
    "not scaled": {"size": {"height": 32, "width": 32}, "do_rescale": False},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_faces_file_means_what_its_steps_do_in_torchvision(name: str) -> None:
    from torchvision.transforms import Compose, InterpolationMode, Resize
    from torchvision.transforms.functional import crop

    def centre(image: Image.Image) -> Image.Image:
        return crop(image, int((image.height - 32) / 2.0), int((image.width - 32) / 2.0), 32, 32)

    config: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, **HUGGING_FACE[name]}
    filters = {1: InterpolationMode.LANCZOS, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    interpolation = filters[config.get("resample", 3)]
    steps: dict[str, list[Any]] = {
        "shortest, then crop": [Resize(40, interpolation), centre],
        "numbers, as older files have them": [Resize(32, interpolation), centre],
        "squash": [Resize((32, 48), interpolation)],
        "squash, then crop": [Resize((40, 40), interpolation), centre],
    }
    resize = Compose(steps.get(name, [Resize((32, 32), interpolation)]))
    rules = from_huggingface(config, "theirs")
    for image in PICTURES:
        numbers = np.asarray(resize(image)).astype(np.float64) / (1 if name == "not scaled" else 255)
        expected = numbers if name == "not normalised" else (numbers - MEAN) / STD
        np.testing.assert_allclose(literal(rules, image), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(ours(rules, image) - expected).mean() < (3 if name == "not scaled" else 0.012)


def test_transformers_own_processor_reads_the_same_file_alike() -> None:
    import transformers

    config = networks.CLIP_PREPROCESSOR
    processor = transformers.CLIPImageProcessor(**config)
    rules = from_huggingface(config, "theirs")
    for image in [one for one in PICTURES if one.size in {(64, 48), (97, 131), (333, 500), (301, 300)}]:
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        # transformers 5 resizes tensors, not Pillow images
        assert np.abs(literal(rules, image) - expected).mean() < 0.02


CLIP_224 = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
REAL_SIZES = {
    "CLIP": CLIP_224,
    "DINOv2": {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    "SigLIP": {"size": {"height": 384, "width": 384}},
}


def apart(spec: Preprocessing, rules: PixelRules) -> float:
    """The most, over all pictures of the proof, of what it judges pixels by."""
    pairs = [(preprocess(image, spec).astype(int), rules.their_pixels(image)) for image in images()]
    return max(float(np.abs(one - other).mean()) for one, other in pairs)


@pytest.mark.parametrize("name", REAL_SIZES)
def test_serving_prepares_images_of_real_sizes_as_the_literal_version(name: str) -> None:
    rules = from_huggingface(REAL_SIZES[name], "theirs")
    assert apart(rules.preprocessing, rules) < PIXELS_APART


@pytest.mark.parametrize(
    "mistake", [{"interpolation": "bilinear"}, {"odd_crop": "even"}, {"resize_to": 230}, {"resize": "squash"}]
)
def test_the_pictures_of_the_proof_show_a_mistake(mistake: dict[str, Any]) -> None:
    rules = from_huggingface(CLIP_224, "theirs")
    assert apart(rules.preprocessing.model_copy(update=mistake), rules) > 2 * PIXELS_APART
