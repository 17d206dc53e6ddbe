"""Seeded JPEGs with about the spectrum of photographs, so that benchmarks need no one's pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise whose amplitude falls with its frequency, as it does in photographs."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 8):
        for channel in range(3):
            cells = generator.normal(size=(2**octave, 2**octave)).astype(np.float32)
            layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer) * 0.6**octave
    total = (total - total.min()) / float(np.ptp(total)) * 255
    total += generator.normal(
        scale=5, size=(height, width, 1)
    )  # the sensor's grain, which fills most of a file
    stream = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
    return stream.getvalue()
