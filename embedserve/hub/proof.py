"""Is the written bundle the encoder that was pulled? Their graph, run as its makers run it, against serving.

Their side goes input by input, as that is what every one of these graphs can do: an image through their
resizing in Pillow and their arithmetic in NumPy, a text through their cleaning, their tokenizer and, where
they mask, a mask from the number of its tokens. Our side is `Encoder`: PNG bytes and plain text in.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image, ImageDraw

from embedserve.config import Limits
from embedserve.encoder import Encoder
from embedserve.errors import BundleError
from embedserve.graph import Vectors, available_cores, session_options
from embedserve.hub.foreign import ForeignImages, ForeignTexts, Output
from embedserve.hub.graphs import ImageFace, TextFace, Value

__all__ = [
    "LEAST",
    "PIXELS_APART",
    "TEXTS",
    "Agreement",
    "Theirs",
    "compare_images",
    "compare_texts",
    "images",
    "png",
    "their_images",
    "their_texts",
]

LEAST = 0.9999
"""Cosine between their vector and ours; both come from the same weights in the same precision."""

PIXELS_APART = 0.5
"""Levels of 255, mean of an image. Serving computes only the part of a resized image that survives the crop;
Pillow may then take its two passes in the other order, which clips noise otherwise: up to 0.37 here. Another
filter or a crop that is a pixel off gives 5 and more on the pictures of noise."""

TEXTS = (
    "a photo of a dog",
    "A PHOTO of a Dog!",
    "wow!!! it's... (really) that - good?",
    "two  spaces,\ttab\nand\r\nlines ",
    "snake_case and kebab-case",
    "a",
    "!",
    "1234567890 3.14",
    "naïve café, Ærøskøbing, straße",
    "ein Hund, 狗, كلب, собака",
    "🍒🐕‍🦺 red fruit 👩🏽‍🚀",
    "Tom &amp; Jerry &lt;3",
    "a red circle beside a blue square",
    "zero\u200bwidth and \u00a0 no-break",
    "word " * 300,
    "long-winded, " * 25 + "and then it ends.",
    "",
)
"""Plain, hard and over-long ones; 17 of them, so that a batch is no power of two."""

_NUMPY: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.BOOL: np.bool_,
}


@dataclass(frozen=True, slots=True)
class Theirs:
    """Unit vectors of their graph, float32 [n, dim]; rows of inputs that have no tokens are NaN."""

    vectors: Vectors
    class_token: bool
    """They are the first of an output [batch, tokens, dim]."""

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])


@dataclass(frozen=True, slots=True)
class Agreement:
    n: int
    min_cosine: float
    mean_cosine: float
    batched_cosine: float
    """The least between an input alone and in a batch with others."""

    def document(self) -> dict[str, float]:
        return {
            "n": self.n,
            "min_cosine": round(self.min_cosine, 6),
            "mean_cosine": round(self.mean_cosine, 6),
            "min_cosine_batched": round(self.batched_cosine, 6),
        }


def images() -> list[Image.Image]:
    """17 drawings and noises, RGB, of many shapes; the same ones every time."""
    sizes = [(64, 48), (48, 64), (224, 224), (256, 256), (333, 500), (500, 333), (37, 211), (640, 96), (9, 7)]
    sizes += [(301, 300), (225, 229), (1, 1), (400, 400), (97, 131), (800, 600), (130, 520), (224, 227)]
    random = np.random.default_rng(0)
    return [_picture(random, *size, kind=index % 4) for index, size in enumerate(sizes)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def their_images(graph: Path, face: ImageFace, foreign: ForeignImages) -> Theirs:
    """Raises BundleError: the graph does not run, or its output is no vector."""
    run = _session(graph, foreign.output, foreign.label)
    rows = []
    for image in images():
        pixels = foreign.rules.their_pixels(image)
        given = pixels if face.normalises else foreign.rules.their_numbers(pixels)
        given = given.transpose(2, 0, 1) if face.channels_first else given
        rows.append(run({face.pixels.name: _as(face.pixels, given[None])}))
    return _unit(rows, foreign.output, foreign.label)


def their_texts(graph: Path, face: TextFace, foreign: ForeignTexts) -> Theirs:
    """Raises BundleError: the graph does not run, or its output is no vector."""
    run = _session(graph, foreign.output, foreign.label)
    length = face.length or (foreign.context_length if foreign.padding == "context" else 0)
    rows: list[NDArray[Any] | None] = []
    for text in TEXTS:
        ids = foreign.their_tokens(text)
        if not ids:
            rows.append(None)
            continue
        padding = max(0, length - len(ids))
        given = {face.ids.name: _as(face.ids, [[*ids, *[foreign.pad_id] * padding]])}
        if face.mask is not None:
            mask = [1] * len(ids) + [0 if foreign.masked else 1] * padding
            given[face.mask.name] = _as(face.mask, [mask])
        if face.types is not None:
            given[face.types.name] = _as(face.types, [[0] * (len(ids) + padding)])
        rows.append(run(given))
    return _unit(rows, foreign.output, foreign.label)


def compare_images(encoder: Encoder, theirs: Theirs, foreign: ForeignImages, *, exact: bool) -> Agreement:
    """Raises BundleError: a pixel far from theirs, a cosine below `LEAST`.

    Args:
        encoder: The bundle, loaded.
        theirs: From `their_images`.
        foreign: The same.
        exact: The graph computes in floating point. One that quantises its activations turns the last bit of
            a pixel into a visible difference, and the company in a batch as well; its vectors are compared
            for their very pixels, and batches are measured but not judged.
    """
    label, pictures = foreign.label, images()
    ours = [encoder.read_image(png(image), Limits()) for image in pictures]
    given = [foreign.rules.their_pixels(image) for image in pictures]
    for index, (one, other) in enumerate(zip(ours, given, strict=True)):
        apart = float(np.abs(one.astype(int) - other).mean())
        if apart > PIXELS_APART:
            raise BundleError(
                f"Serving would prepare image {index} for '{label}' otherwise than its makers do: "
                f"{apart:.2f} of 255 levels apart in the mean; nothing was written.",
                code="not_the_same",
            )
    return _compare(ours if exact else given, encoder.embed_images, theirs.vectors, label, exact=exact)


def compare_texts(encoder: Encoder, theirs: Theirs, foreign: ForeignTexts, *, exact: bool) -> Agreement:
    """As `compare_images`."""
    known = np.flatnonzero(~np.isnan(theirs.vectors[:, 0]))
    tokens = encoder.tokenize([TEXTS[index] for index in known])
    return _compare(tokens, encoder.embed_texts, theirs.vectors[known], foreign.label, exact=exact)


def _compare(
    inputs: Sequence[Any],
    embed: Callable[[Sequence[Any]], Vectors],
    theirs: Vectors,
    label: str,
    *,
    exact: bool,
) -> Agreement:
    alone = np.concatenate([embed([one]) for one in inputs])
    cosines = (alone * theirs).sum(axis=1)
    worst = int(np.argmin(cosines))
    if not cosines[worst] >= LEAST:  # NaN compares false
        raise BundleError(
            f"The bundle's vectors are not those of '{label}': cosine {cosines[worst]:.5f} at input {worst}, "
            f"at least {LEAST} is needed. The files beside the graph do not describe how it was made to be "
            "fed; nothing was written.",
            code="not_the_same",
        )
    batched = float((alone * embed(inputs)).sum(axis=1).min())
    if exact and not batched >= LEAST:
        raise BundleError(
            f"'{label}' gives an input another vector in a batch than alone (cosine {batched:.5f}), so it "
            "cannot be served; nothing was written. It was exported for a batch of 1: export it again.",
            code="not_the_same",
        )
    return Agreement(len(inputs), float(cosines[worst]), float(cosines.mean()), batched)


def _session(graph: Path, output: Output, label: str) -> Callable[[dict[str, NDArray[Any]]], NDArray[Any]]:
    try:
        session = ort.InferenceSession(
            str(graph), session_options(available_cores()), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001 -- ONNX Runtime's errors share no base class
        raise BundleError(f"'{label}' cannot be loaded by ONNX Runtime {ort.__version__}: {error}") from None
    there = [one.name for one in session.get_outputs()]
    name = output.choose(there, label)

    def run(inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        try:
            found: NDArray[Any] = session.run([name], inputs)[0]
        except Exception as error:  # noqa: BLE001
            raise BundleError(f"'{label}' fails on an input that it should take: {error}") from None
        return found

    return run


def _unit(rows: Sequence[NDArray[Any] | None], output: Output, label: str) -> Theirs:
    first = next(row for row in rows if row is not None)
    class_token = first.ndim == 3 and output.class_token
    if first.ndim != 2 and not class_token:
        raise BundleError(
            f"The output of '{label}' has the form {list(first.shape)}; needed is one vector for each input, "
            "[batch, dim]. Which of its numbers would be the vector is not known."
        )
    vectors = np.full((len(rows), first.shape[-1]), np.nan, np.float32)
    for index, (vector, row) in enumerate(zip(vectors, rows, strict=True)):
        if row is None:
            continue
        found = (row[:, 0] if class_token else row)[0].astype(np.float32)
        length = float(np.linalg.norm(found))
        if not 0 < length < np.inf:  # NaN compares false
            raise BundleError(
                f"'{label}' gives a vector of length {length:g} for input {index}. Half precision that "
                "overflows does that: try --variant fp32; else the file is damaged."
            )
        vector[:] = found / length
    return Theirs(vectors, class_token)


def _as(value: Value, given: Any) -> NDArray[Any]:
    if value.kind not in _NUMPY:
        kind = TensorProto.DataType.Name(value.kind).lower()
        raise BundleError(f"The input '{value.name}' is of the type {kind}, which cannot be fed.")
    return np.asarray(given).astype(_NUMPY[value.kind])


def _picture(random: np.random.Generator, width: int, height: int, *, kind: int) -> Image.Image:
    colours = [tuple(map(int, random.integers(0, 256, 3))) for _ in range(6)]
    if kind == 0:  # noise, the hardest to resize alike
        return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    picture = Image.new("RGB", (width, height), colours[0])
    if kind == 1:
        ramp = Image.linear_gradient("L").resize((width, height))
        picture = Image.composite(picture, Image.new("RGB", (width, height), colours[1]), ramp)
    pen = ImageDraw.Draw(picture)
    for colour in colours[2:]:
        xs = sorted(map(int, random.integers(0, width + 1, 2)))
        ys = sorted(map(int, random.integers(0, height + 1, 2)))
        draw = pen.ellipse if kind == 2 else pen.rectangle
        draw([xs[0], ys[0], xs[1], ys[1]], fill=colour)
    return picture
