"""A bundle's probe: one tiny input for each tower, and the vectors that it must give on every machine."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import Probe, pack_vector, unpack_vector
from embedserve.config import Limits
from embedserve.errors import BundleError, EmbedServeError

if TYPE_CHECKING:
    from embedserve.encoder import Encoder

__all__ = ["Proof", "make_probe", "prove"]

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Proof:
    """What `Encoder.prove` found. A cosine is None where the bundle keeps no golden vector."""

    image_cosine: float | None
    text_cosine: float | None
    min_cosine: float
    seconds: float


def prove(encoder: Encoder) -> Proof:
    """As `Encoder.prove`."""
    started = time.perf_counter()
    probe = encoder.bundle.description.probe
    image_cosine = text_cosine = None
    if encoder.has_images:
        png = _unpack_image(probe.image) if probe.image is not None else _gradient_png()
        image_cosine = _prove(encoder, "image", probe.image_vector, lambda: _embed_image(encoder, png))
    if encoder.has_text:
        text = probe.text if probe.text is not None else "a probe"
        text_cosine = _prove(encoder, "text", probe.text_vector, lambda: _embed_text(encoder, text))
    return Proof(image_cosine, text_cosine, probe.min_cosine, time.perf_counter() - started)


def make_probe(encoder: Encoder, image_png: bytes | None, text: str | None) -> Probe:
    """As `Encoder.make_probe`."""
    image_vector = _embed_image(encoder, image_png) if image_png is not None else None
    text_vector = _embed_text(encoder, text) if text is not None else None
    return Probe(
        image=None if image_png is None else base64.b64encode(image_png).decode("ascii"),
        image_vector=None if image_vector is None else pack_vector(image_vector),
        text=text,
        text_vector=None if text_vector is None else pack_vector(text_vector),
    )


def _embed_image(encoder: Encoder, data: bytes) -> Vector:
    vector: Vector = encoder.embed_images([encoder.read_image(data, Limits())])[0]
    return vector


def _embed_text(encoder: Encoder, text: str) -> Vector:
    vector: Vector = encoder.embed_texts(encoder.tokenize([text]))[0]
    return vector


def _prove(encoder: Encoder, tower: str, golden: str | None, embed: Callable[[], Vector]) -> float | None:
    folder = encoder.bundle.folder
    try:
        found = embed()
    except BundleError:
        raise
    except EmbedServeError as error:
        raise BundleError(f"The {tower} probe of '{folder}' failed: {error}") from error
    if golden is None:
        return None
    expected = unpack_vector(golden)
    if expected.shape != found.shape:
        raise BundleError(
            f"The golden {tower} vector of '{folder}' has {expected.size} values; the encoder gives "
            f"{found.size}. Export the bundle again."
        )
    cosine = float(found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)))
    least = encoder.bundle.description.probe.min_cosine
    if cosine < least:
        raise BundleError(
            f"The {tower} probe of '{folder}' gave a vector with cosine {cosine:.4f} to the golden one; "
            f"at least {least} is needed. The bundle was altered, or this machine computes it "
            "differently. Export it again, or in a higher precision."
        )
    return cosine


def _unpack_image(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise BundleError("The probe's image is not base64. Export the bundle again.") from None


def _gradient_png() -> bytes:
    ramp = np.arange(64, dtype=np.uint8) * 4
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(128)), axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
