"""Bytes of an image file → an upright RGB image, within limits.

Anyone may send anything here, so three rules hold:
- the size is read from the header and checked before a pixel is decoded;
- only the formats of `FORMATS` are opened, each by its own reader (`Image.open` would also consult
  Pillow's process-wide pixel limit, which warns or fails at sizes that `limits.max_pixels` allows);
- whatever goes wrong in a reader becomes a BadRequest, so a damaged file fails alone.

Every function is free of shared state and safe in a thread pool. Embedded colour profiles are not applied:
encoders are trained on unconverted pixels (open_clip, torchvision and timm all ignore profiles), and the
reference test holds us to those.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from embedserve.config import Limits
from embedserve.errors import BadRequest, EmbedServeError, TooLarge, UnsupportedMedia
from embedserve.sniff import looks_like

__all__ = ["FORMATS", "decode"]

MAX_JPEG_SEGMENTS = 1000
"""Scans and tables of one progressive JPEG; encoders write about 20. Each scan walks over the whole image
again, so a file of a few kilobytes could otherwise keep a core busy for minutes."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the image upright (Exif 2.32, tag 0x0112)."""


def decode(
    data: bytes,
    limits: Limits,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    shrink_to: int | None = None,
) -> Image.Image:
    """Decodes the first frame of an image file to upright 8-bit RGB.

    Args:
        data: The file: one of `FORMATS`, told by its first bytes and never by a name or media type.
        limits: `max_image_bytes` and `max_pixels` are checked before anything is decoded.
        background: RGB 0..255 under transparent pixels.
        shrink_to: Pixels. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shortest side
            keeps at least this many. None decodes at full size.

    Returns:
        A Pillow image of mode RGB. Gray with more than 8 bits is scaled, not clipped (see `_gray`).

    Raises:
        BadRequest: Empty, cut short or damaged.
        UnsupportedMedia: Not an image, or a format not read here; says what it looks like.
        TooLarge: More bytes or pixels than the limits.
    """
    if not data:
        raise BadRequest("The image is empty (0 bytes). Send the file's content.", code="empty_image")
    if len(data) > limits.max_image_bytes:
        raise TooLarge(
            f"The image has {len(data):,} bytes; the limit is {limits.max_image_bytes:,} (max_image_bytes). "
            "Send a smaller copy.",
            code="image_too_large",
        )
    name = _format_of(data)
    try:
        with _open(name, data, limits) as image:
            _check_pixels(image.size, limits)
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                _check_segments(image, data)
                if shrink_to is not None:
                    image.draft(None, (shrink_to, shrink_to))
            bits = _stored_bits(image)
            image.load()
            rgb = _to_rgb(image, bits, background)
            turn = _UPRIGHT.get(_orientation(image))
    except EmbedServeError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise TooLarge(
            f"The {name} image needs more memory than can be given to one image. Send a smaller copy.",
            code="image_too_large",
        ) from error
    except Exception as error:
        raise BadRequest(
            f"The {name} image is damaged or cut short ({_reason(error)}). "
            "Check that it opens in a viewer, then send the whole file again.",
            code="damaged_image",
        ) from error
    rgb.info = {}  # no profile, EXIF or transparency of the source belongs to these pixels
    return rgb if turn is None else rgb.transpose(turn)


# ---------------------------------------------------------------------------------------------- formats


def _is_avif(data: bytes) -> bool:
    # Brands of ISO/IEC 14496-12's first box: the major one, then the compatible ones.
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(_big(data[:4]), 256)]
    return b"avif" in brands or b"avis" in brands


def _is_bmp(data: bytes) -> bool:
    # "BM" alone would also match text; the fifteenth byte is the length of a known header.
    return data[:2] == b"BM" and data[14:15] in {b"\x0c", b"(", b"4", b"8", b"@", b"l", b"|"}


FORMATS: dict[str, tuple[Callable[[bytes], bool], Callable[[io.BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": (lambda data: data.startswith(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "PNG": (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "WebP": (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    "GIF": (lambda data: data.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    "BMP": (_is_bmp, BmpImagePlugin.BmpImageFile),
    "TIFF": (
        lambda data: data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        TiffImagePlugin.TiffImageFile,
    ),
    "AVIF": (_is_avif, AvifImagePlugin.AvifImageFile),
}
"""Name used in messages → whether a file is of this format, and what reads its header."""


def _format_of(data: bytes) -> str:
    for name, (matches, _) in FORMATS.items():
        if matches(data):
            return name
    what, fix = looks_like(data)
    raise UnsupportedMedia(f"This looks like {what}, not an image that can be read here. {fix}")


def _open(name: str, data: bytes, limits: Limits) -> ImageFile.ImageFile:
    if name == "AVIF" and not AvifImagePlugin.SUPPORTED:
        raise UnsupportedMedia(
            "AVIF images cannot be read: this server's Pillow was built without AVIF. Send JPEG, PNG or WebP."
        )
    if name == "WebP":  # libwebp allocates its canvas on opening
        _check_pixels(_webp_size(data), limits)
    return FORMATS[name][1](io.BytesIO(data))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas width and height from the header (RFC 9649); nonsense for a damaged one, as for any reader."""
    chunk, body = data[12:16], data[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return _little(body[4:7]) + 1, _little(body[7:10]) + 1
    if chunk == b"VP8L":
        both = _little(body[1:5])
        return (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    return _little(body[6:8]) & 0x3FFF, _little(body[8:10]) & 0x3FFF


def _little(part: bytes) -> int:
    return int.from_bytes(part, "little")


def _big(part: bytes) -> int:
    return int.from_bytes(part, "big")


# ----------------------------------------------------------------------------------------------- limits


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"The image has {width:,} × {height:,} = {width * height:,} pixels; "
            f"the limit is {limits.max_pixels:,} (max_pixels). Send a smaller copy.",
            code="image_too_large",
        )


_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""A JPEG marker inside entropy-coded data, where FF is followed by 00 and restarts have no length."""


def _check_segments(image: JpegImagePlugin.JpegImageFile, data: bytes) -> None:
    if not image.info.get("progressive") or image.fp is None:
        return
    at, end_of_image = image.fp.tell(), b"\xd9"  # opening stops where the first scan's data begins
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or marker[1] == end_of_image:
            return
        at = marker.end() + _big(data[marker.end() : marker.end() + 2])
    raise BadRequest(
        f"The JPEG image has more than {MAX_JPEG_SEGMENTS:,} scans and tables, which no encoder writes. "
        "Save it again as a plain JPEG.",
        code="damaged_image",
    )


def _reason(error: Exception) -> str:
    """Pillow's own words, in one short line and without addresses of objects."""
    words = re.sub(r"<[^>]*>|\s+", " ", str(error)).strip().rstrip(".")
    return words[:120] if words else "unreadable data"


# --------------------------------------------------------------------------------------------- to RGB


def _orientation(image: Image.Image) -> int:
    # TIFF's reader has turned the image already and dropped the tag. Damaged EXIF does not spoil a picture.
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the header says of gray samples, which Pillow's mode no longer does."""

    bits: int
    inverted: bool = False


def _stored_bits(image: ImageFile.ImageFile) -> _Stored:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return _Stored(int(bits[0]), image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0)
    raw_mode = image.tile[0].args if image.tile else ""
    if isinstance(raw_mode, tuple):
        raw_mode = str(raw_mode[0]) if raw_mode else ""
    depth = re.search(r";(\d+)", raw_mode or "")
    return _Stored(int(depth[1]) if depth else 8)


def _to_rgb(image: ImageFile.ImageFile, stored: _Stored, background: tuple[int, int, int]) -> Image.Image:
    mode, transparent = image.mode, image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        samples = np.asarray(image)
        gray = Image.fromarray(_gray(samples, stored)).convert("RGB")
        if isinstance(transparent, int):
            gray.paste(background, mask=Image.fromarray(samples == transparent))
        return gray
    if transparent is not None and mode in {"1", "L", "RGB"}:
        image.info["transparency"] = _as_8_bits(transparent, stored.bits)
    if mode == "La":  # premultiplied: Pillow only knows the way over LA
        return _flatten(image.convert("LA").convert("RGBA"), background)
    if image.has_transparency_data:
        return _flatten(image if mode == "RGBA" else image.convert("RGBA"), background)
    return image if mode == "RGB" else image.convert("RGB")


def _as_8_bits(transparent: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """PNG gives the transparent colour at the stored depth (1..16 bits), the pixels come at 8."""
    if isinstance(transparent, tuple):
        return tuple(value >> 8 if bits == 16 else value & 255 for value in transparent)
    return {2: transparent * 85, 4: transparent * 17}.get(bits, transparent) & 255


def _flatten(rgba: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba)
    return canvas


def _gray(samples: NDArray[np.generic], stored: _Stored) -> NDArray[np.uint8]:
    """Gray samples of more than 8 bits, or of floating point, as uint8.

    Unsigned 16-bit is divided by 257 (12-bit by 4095/255). Signed, 32-bit and float files carry no agreed
    white: values that all lie in 0..1 are fractions of it, in 0..255 and 0..65535 they are 8- and 16-bit
    levels, and anything else is stretched from its smallest to its largest value.
    """
    rows = max(1, 2**20 // samples.shape[1])  # in bands, so that the floats need little memory
    bands = [slice(top, top + rows) for top in range(0, samples.shape[0], rows)]
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        low, high = 0.0, 4095.0 if stored.bits == 12 else 65535.0
    else:
        low = min(float(_finite(samples[band]).min()) for band in bands)
        high = max(float(_finite(samples[band]).max()) for band in bands)
        if low >= 0 and high <= 65535:
            fraction = samples.dtype.kind == "f" and high <= 1
            low, high = 0.0, 1.0 if fraction else 255.0 if high <= 255 else 65535.0
    levels = np.empty(samples.shape, np.uint8)
    for band in bands:
        values = (_finite(samples[band]) - low) * (255.0 / (high - low if high - low > 1e-30 else 1.0))
        levels[band] = np.rint(values).clip(0, 255)
    return 255 - levels if stored.inverted else levels


def _finite(samples: NDArray[np.generic]) -> NDArray[np.float32]:
    values = samples.astype(np.float32)
    if samples.dtype.kind == "f":
        values = np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0).clip(-1e37, 1e37)
    return values
