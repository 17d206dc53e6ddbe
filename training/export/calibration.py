"""The images and texts that serving is compared with PyTorch on. The built-in ones are drawn by this code."""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.errors import EmbedServeError, InvalidField
from embedserve.folder import walk

__all__ = ["Calibration", "Picture", "built_in", "drawing", "from_folder"]

MOST_OWN = 200
"""Pictures of one's own that are read; more take time and change no figure."""

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file in memory."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is measured on."""

    pictures: tuple[Picture, ...]
    texts: tuple[str, ...]
    origin: str
    """For the model card: 'built in', or how many of which folder."""


@functools.cache
def built_in(images: int = 48, texts: int = 48) -> Calibration:
    """Pictures and texts that differ as much as code can make them differ, the same ones every time.

    Drawings, clouds and landscapes with the spectrum of photographs, ramps, gratings, noise and single
    colours; from 1 × 1 pixel to a JPEG of 5 megapixels, from 1:60 to 60:1; PNG and JPEG. Texts of one letter
    and of hundreds of words, in several scripts, with markup, emoji and nothing at all.

    Args:
        images: How many; the most peculiar ones come first.
        texts: How many, in the same order.
    """
    draw = random.Random(0)  # noqa: S311
    makers = [*PECULIAR, *(_ordinary(index) for index in range(max(0, images - len(PECULIAR))))]
    pictures = [_encoded(f"built-in {index}", *maker(draw)) for index, maker in enumerate(makers[:images])]
    words = [*TEXTS, *(_sentence(draw) for _ in range(max(0, texts - len(TEXTS))))]
    return Calibration(tuple(pictures), tuple(words[:texts]), "built in")


def from_folder(folder: Path, *, texts: int = 48) -> Calibration:
    """The pictures of a folder, spread evenly over it where there are more than `MOST_OWN`; built-in texts.

    Raises:
        InvalidField: No picture there can be read, or there are fewer than two.
    """
    found = [one.path for one in walk(folder).files]
    step = max(1, math.ceil(len(found) / MOST_OWN))
    pictures, problem = [], ""
    for path in found[::step]:
        data = path.read_bytes()
        try:
            decode(data, Limits())
        except EmbedServeError as error:
            problem = f" The first that cannot be read is '{path}': {error}"
            continue
        pictures.append(Picture(path.name, data))
    if len(pictures) < 2:
        raise InvalidField(
            f"'{folder}' holds {len(pictures)} pictures that can be read; --calibrate needs two or more, "
            f"better a hundred.{problem}",
            param="calibrate",
        )
    words = built_in(images=0, texts=texts).texts
    return Calibration(tuple(pictures), words, f"{len(pictures)} pictures of the exporter's own")


# ------------------------------------------------------------------------------------------- pictures


def drawing(draw: random.Random, width: int, height: int) -> Image.Image:
    """Shapes in plain colours, now and then over a ramp or under noise."""
    picture = Image.new("RGB", (width, height), _colour(draw))
    if draw.random() < 0.5:
        ramp = Image.linear_gradient("L").resize((width, height)).rotate(draw.randrange(360))
        picture = Image.composite(picture, Image.new("RGB", (width, height), _colour(draw)), ramp)
    pen = ImageDraw.Draw(picture)
    shapes: list[Callable[..., None]] = [pen.ellipse, pen.rectangle, pen.line]
    for _ in range(draw.randrange(1, 9)):
        xs = sorted(draw.randrange(width) for _ in range(2))
        ys = sorted(draw.randrange(height) for _ in range(2))
        draw.choice(shapes)([xs[0], ys[0], xs[1], ys[1]], fill=_colour(draw))
    if draw.random() < 0.3:
        picture = Image.blend(picture, _noise(draw, width, height), 0.3)
    return picture


MOST_WAVES = 768
"""Pixels of a side of the largest Fourier transform; larger pictures are enlarged."""


def _colour(draw: random.Random) -> RGB:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def _noise(draw: random.Random, width: int, height: int) -> Image.Image:
    values = np.frombuffer(draw.randbytes(width * height * 3), np.uint8)
    return Image.fromarray(values.reshape(height, width, 3))


def _clouds(draw: random.Random, width: int, height: int, slope: float = 1.0) -> Image.Image:
    """Noise whose amplitudes fall as 1 ÷ frequency, as those of photographs do."""
    if max(width, height) > MOST_WAVES:
        scale = MOST_WAVES / max(width, height)
        small = _clouds(draw, max(1, round(width * scale)), max(1, round(height * scale)), slope)
        return small.resize((width, height), Image.Resampling.BICUBIC)
    generator = np.random.default_rng(draw.randrange(2**32))
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    frequency = np.maximum(np.hypot(down, across), 1 / max(width, height))
    waves = generator.normal(size=(3, *frequency.shape)) + 1j * generator.normal(size=(3, *frequency.shape))
    planes = np.fft.irfft2(waves / frequency**slope, s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-9
    # Neighbouring channels of a photograph are much alike.
    planes = 0.8 * planes[:1] + 0.35 * planes
    middle = np.array(_colour(draw))[:, None, None] * 0.5 + 64
    return Image.fromarray(_levels(middle + 48 * planes).transpose(1, 2, 0))


def _landscape(draw: random.Random, width: int, height: int) -> Image.Image:
    """A sky above rough ground, with something in front that throws a soft shadow."""
    sky, ground = _clouds(draw, width, height, 1.6), _clouds(draw, width, height, 0.7)
    horizon = Image.new("L", (width, height))
    edge = ImageDraw.Draw(horizon)
    at = height * (0.35 + 0.3 * draw.random())
    points = [(x, at + draw.gauss(0, height / 30)) for x in range(0, width + 16, 16)]
    edge.polygon([(0, height), *points, (width, height)], fill=255)
    picture = Image.composite(ground, sky, horizon.filter(ImageFilter.GaussianBlur(1)))
    x, y, r = draw.randrange(width), draw.randrange(height), min(width, height) * (0.1 + 0.2 * draw.random())
    for colour, blur, shift in (((20, 20, 24), r / 4, r / 3), (_colour(draw), 0.8, 0.0)):
        shape = Image.new("L", (width, height))
        ImageDraw.Draw(shape).ellipse([x - r + shift, y - r + shift, x + r + shift, y + r + shift], fill=230)
        picture.paste(colour, mask=shape.filter(ImageFilter.GaussianBlur(blur)))
    return picture


def _grating(draw: random.Random, width: int, height: int) -> Image.Image:
    """Rings that become finer from the middle outwards: whatever a resize does to fine detail shows here."""
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(x - width / 2, y - height / 2)
    rings = 127.5 + 127.5 * np.cos(radius**2 * (math.pi / max(width, height)) * (0.5 + draw.random()))
    return Image.fromarray(np.repeat(_levels(rings)[:, :, None], 3, axis=2))


def _text_page(draw: random.Random, width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), (250, 249, 244))
    pen = ImageDraw.Draw(picture)
    for y in range(8, max(9, height - 12), 14):
        pen.text((8, y), _sentence(draw), fill=(20, 20, 20))
    return picture


def _plain(colour: RGB) -> Callable[[random.Random, int, int], Image.Image]:
    return lambda _, width, height: Image.new("RGB", (width, height), colour)


def _ramp(_: random.Random, width: int, height: int) -> Image.Image:
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(_levels(np.stack([across, down, 255 - across], axis=2)))


def _levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


Painter = Callable[[random.Random, int, int], Image.Image]
Maker = Callable[[random.Random], tuple[Image.Image, str]]


def _of(painter: Painter, width: int, height: int, form: str = "PNG") -> Maker:
    return lambda draw: (painter(draw, width, height), form)


PECULIAR: Sequence[Maker] = (
    _of(_landscape, 640, 480, "JPEG"),
    _of(drawing, 224, 224),
    _of(_noise, 300, 200),
    _of(_ramp, 256, 256),
    _of(_clouds, 37, 640),
    _of(_grating, 500, 375),
    _of(_plain((0, 0, 0)), 64, 64),
    _of(_clouds, 3, 5),
    _of(_clouds, 1200, 20),
    _of(_text_page, 420, 594),
    _of(_plain((255, 255, 255)), 1, 1),
    _of(_landscape, 2560, 1920, "JPEG"),
    _of(_grating, 255, 257),
    _of(_clouds, 480, 640, "JPEG"),
    _of(_plain((200, 30, 40)), 300, 100),
    _of(drawing, 1024, 768),
)


def _ordinary(index: int) -> Maker:
    painters: Sequence[Painter] = (_landscape, drawing, _clouds)

    def make(draw: random.Random) -> tuple[Image.Image, str]:
        width, height = (draw.randrange(160, 720) for _ in range(2))
        painter = painters[index % len(painters)]
        return painter(draw, width, height), "JPEG" if index % 2 else "PNG"

    return make


def _encoded(name: str, image: Image.Image, form: str) -> Picture:
    stream = io.BytesIO()
    image.save(stream, form, **({"quality": 90} if form == "JPEG" else {"compress_level": 1}))
    return Picture(f"{name} ({image.width} × {image.height} {form})", stream.getvalue())


# ---------------------------------------------------------------------------------------------- texts

TEXTS = (
    "a photo of a cat",
    "",
    "a photo of a dog",
    ".",
    "ein rotes Fahrrad vor einer gelben Mauer",
    "🍒🚲 two cherries & a bicycle",
    "a",
    "12345 67890 3.14",
    "SELECT name FROM birds WHERE wings = 2;",
    "狗在草地上",
    "كلب أسود",
    "Don't re-use  double   spaces\tor\nnew lines",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcberma\u00df",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; ‘quoted’ — dashes…",
    "PHOTOGRAPH OF A MOUNTAIN LAKE AT DAWN",
    "word " * 300,
    "a watercolour of three sailing boats in a harbour under a cloudy sky, seen from the pier",
)

SUBJECTS = (
    "dog",
    "lighthouse",
    "bowl of soup",
    "bicycle",
    "red fox",
    "old tram",
    "child's drawing",
    "teapot",
)
PLACES = ("on a beach", "in the snow", "under a bridge", "at night", "beside a window", "in a crowded market")
MANNERS = ("a photo of a", "a blurry photo of the", "a sketch of a", "close-up:", "two images of one")


def _sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(part) for part in (MANNERS, SUBJECTS, PLACES))


def probe_png() -> bytes:
    """A red circle beside a blue square, 64 pixels wide: the picture that bundles prove themselves with."""
    picture = Image.new("RGB", (64, 48), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    pen.ellipse([4, 12, 28, 36], fill=(210, 30, 30))
    pen.rectangle([36, 12, 60, 36], fill=(30, 60, 200))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


PROBE_TEXT = "a red circle beside a blue square"
"""What `probe_png` shows."""
