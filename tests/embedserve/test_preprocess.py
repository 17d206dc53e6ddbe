"""preprocess: the same pixels as torchvision, open_clip and timm give, and thumbnails."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageDraw

from benchmarks.photos import photo
from embedserve.bundle import Preprocessing, open_bundle
from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.preprocess import ROWS_MAY_BE_FIRST, _rows_first, preprocess, shrink_target, thumbnail

LIMITS = Limits()
SIZES = [(640, 480), (481, 643), (333, 777), (225, 224), (100, 81), (1500, 30)]
STARTER = Path(__file__).parents[2] / "embedserve" / "starter"


def drawing(width: int, height: int, seed: int) -> Image.Image:
    """Hard edges, thin lines and flat colours: what photographs lack."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(generator.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        corners = generator.uniform(0, 1, (2, 2)) * (width, height)
        box = [*corners.min(axis=0), *corners.max(axis=0)]
        colour = tuple(generator.integers(0, 256, 3).tolist())
        draw.ellipse(box, fill=colour) if generator.random() < 0.5 else draw.rectangle(box, fill=colour)
        draw.line([*corners[0], *corners[1]], fill=colour[::-1], width=int(generator.integers(1, 6)))
    return image


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@functools.cache
def files(width: int, height: int) -> list[bytes]:
    return [photo(width, height, seed=1), png(drawing(width, height, seed=2))]


def assert_same(file: bytes, transform: Callable[[Image.Image], Any], spec: Preprocessing) -> None:
    """At most 1/255 apart on average; rounding may move single values by a little more."""
    expected = transform(Image.open(io.BytesIO(file))).numpy().transpose(1, 2, 0) * 255
    found = preprocess(decode(file, LIMITS), spec).astype(np.float32)
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert difference.mean() < 0.05  # the bound asked for is 1
    assert difference.max() <= 2


# ------------------------------------------------------------------------------ against the references


@pytest.fixture(scope="module")
def torchvision_transforms() -> Any:
    pytest.importorskip("torch", reason="the reference transforms need the 'train' extra (torch)")
    from training import torchvision_ops

    torchvision_ops.register()
    from torchvision import transforms

    return transforms


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", SIZES)
def test_shortest_is_torchvisions_resize_and_center_crop(
    size: tuple[int, int], interpolation: str, torchvision_transforms: Any
) -> None:
    transforms = torchvision_transforms
    reference = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
        ]
    )
    spec = Preprocessing(height=224, width=224, resize_to=256, interpolation=interpolation)
    for file in files(*size):
        assert_same(file, reference, spec)


WHOLE_AND_PART = [
    ((640, 480), "shortest", (False, False)),
    ((900, 1800), "shortest", (False, True)),
    ((300, 1200), "shortest", (True, True)),
    ((356, 466), "squash", (True, False)),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "resize", "rows_first"), WHOLE_AND_PART)
def test_noise_shows_no_other_order_of_rows_and_columns_than_the_whole_has(
    size: tuple[int, int], resize: Any, interpolation: str, rows_first: tuple[bool, bool]
) -> None:
    # Pillow rounds to 8 bits between the axes; with the other one first, noise differs by up to 47 levels.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    spec = Preprocessing(height=224, width=224, resize_to=256, interpolation=interpolation, resize=resize)
    width, height = (round(side * 256 / min(size)) for side in size) if resize == "shortest" else (256, 256)
    if ROWS_MAY_BE_FIRST:
        assert (_rows_first(size, (width, height)), _rows_first(size, (224, 224))) == rows_first
    whole = noise.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(whole.crop((left, top, left + 224, top + 224))).astype(int)
    difference = np.abs(preprocess(noise, spec) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_each_resize_mode_is_open_clips(
    size: tuple[int, int], resize: str, torchvision_transforms: Any
) -> None:
    from open_clip.transform import image_transform

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    reference = image_transform(224, is_train=False, mean=mean, std=std, resize_mode=resize, fill_color=0)
    spec = Preprocessing(height=224, width=224, resize_to=224, resize=resize, background=(0, 0, 0))
    for file in files(*size):
        assert_same(file, reference, spec)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_a_crop_fraction_is_timms(crop_mode: str, torchvision_transforms: Any) -> None:
    from timm.data import create_transform

    reference = create_transform(
        224, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.875, crop_mode=crop_mode
    )
    resize = "shortest" if crop_mode == "center" else "squash"
    spec = Preprocessing(height=224, width=224, resize_to=256, resize=resize)
    for size in SIZES:
        for file in files(*size):
            assert_same(file, reference, spec)


@pytest.mark.parametrize("size", [(63, 64), (64, 31), (20, 200), (65, 90)])
@pytest.mark.parametrize("crop", [(64, 64), (33, 80), (81, 32)])
def test_the_crop_rounds_and_pads_as_torchvisions(
    size: tuple[int, int], crop: tuple[int, int], torchvision_transforms: Any
) -> None:
    transforms = torchvision_transforms
    target = min(size)  # nothing is resized, so every pixel must agree
    image = drawing(*size, seed=3)
    spec = Preprocessing(height=crop[0], width=crop[1], resize_to=target, background=(0, 0, 0))
    assert (preprocess(image, spec) == np.asarray(transforms.CenterCrop(crop)(image))).all()


# ------------------------------------------------------------------------------------------- by itself


def test_what_lies_beside_the_picture_has_the_background_colour() -> None:
    spec = Preprocessing(height=8, width=8, resize_to=8, resize="longest", background=(1, 2, 3))
    found = preprocess(Image.new("RGB", (80, 40), "red"), spec)
    assert (found[2:6] == (255, 0, 0)).all()
    assert (found[:2] == (1, 2, 3)).all()
    assert (found[6:] == (1, 2, 3)).all()


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1), (2, 9999)])
def test_extreme_shapes_give_the_usual_tensor(size: tuple[int, int], resize: str) -> None:
    spec = Preprocessing(height=224, width=224, resize_to=256, resize=resize, background=(9, 9, 9))
    found = preprocess(Image.new("RGB", size, (9, 9, 9)), spec)
    assert found.shape == (224, 224, 3)
    assert found.dtype == np.uint8
    assert (found == 9).all()


def test_an_image_that_is_not_rgb_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="not RGBA"):
        preprocess(Image.new("RGBA", (4, 4)), Preprocessing(height=4, width=4, resize_to=4))


def test_shrinking_on_load_keeps_four_times_what_the_encoder_sees() -> None:
    assert shrink_target(Preprocessing(height=224, width=224, resize_to=256)) == 1024
    assert shrink_target(Preprocessing(height=224, width=448, resize_to=224, resize="squash")) == 1792


# ------------------------------------------------------------------------------------ shrinking on load


def test_shrinking_on_load_keeps_the_tensor() -> None:
    spec = Preprocessing(height=224, width=224, resize_to=256)
    for seed in range(3):
        file = photo(3000, 2250, seed)
        whole = preprocess(decode(file, LIMITS), spec).astype(int)
        small = preprocess(decode(file, LIMITS, shrink_to=shrink_target(spec)), spec).astype(int)
        assert np.abs(whole - small).mean() < 1


def test_shrinking_on_load_keeps_the_embedding() -> None:
    bundle = open_bundle(STARTER)
    tower = bundle.description.image
    assert tower is not None
    spec = tower.preprocessing
    session = onnxruntime.InferenceSession(bundle.path(tower.file))
    pictures = [photo(2700, 2025, seed) for seed in range(2)]
    for seed in range(4):
        stream = io.BytesIO()
        drawing(2000, 2600, seed).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    for file in pictures:
        images = [decode(file, LIMITS), decode(file, LIMITS, shrink_to=shrink_target(spec))]
        assert images[1].width * 2 == images[0].width
        batch = np.stack([preprocess(image, spec) for image in images])
        whole, small = session.run(None, {session.get_inputs()[0].name: batch})[0]
        assert float(whole @ small) >= 0.995


# ------------------------------------------------------------------------------------------- thumbnails


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 500), (256, 128)), ((300, 900), (85, 256)), ((100, 50), (100, 50)), ((1, 30_000), (1, 256))],
)
def test_a_thumbnail_keeps_its_aspect_and_never_grows(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    small = Image.open(io.BytesIO(thumbnail(Image.new("RGB", size, "teal"))))
    assert small.format == "WEBP"
    assert small.size == expected


def test_a_thumbnail_looks_like_its_picture_and_is_small() -> None:
    image = decode(photo(1200, 900, seed=5), LIMITS)
    data = thumbnail(image)
    assert len(data) < 20_000
    small = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(small - np.asarray(image.resize((256, 192), Image.Resampling.BICUBIC))).mean() < 4


def test_a_thumbnail_carries_nothing_of_its_source_but_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    stream = io.BytesIO()
    Image.new("RGB", (300, 300)).save(stream, "JPEG", exif=exif, icc_profile=b"secret profile")
    assert b"secret" in stream.getvalue()
    assert b"secret" not in thumbnail(decode(stream.getvalue(), LIMITS))
