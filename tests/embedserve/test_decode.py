"""decode: every format, every pixel layout, and everything a stranger may send instead."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, ImageCms

from embedserve.config import Limits
from embedserve.decode import FORMATS, decode
from embedserve.errors import BadRequest, EmbedServeError, TooLarge, UnsupportedMedia

LIMITS = Limits()
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}}
ENCODERS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"] + ["AVIF"] * AvifImagePlugin.SUPPORTED


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes, **options: object) -> np.ndarray:
    image = decode(data, LIMITS, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def flag(width: int = 48, height: int = 32) -> np.ndarray:
    """An upright picture with another colour in each quarter: no turn or mirroring leaves it as it is."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (200, 30, 40)
    picture[: height // 2, width // 2 :] = (40, 180, 60)
    picture[height // 2 :, : width // 2] = (50, 60, 190)
    picture[height // 2 :, width // 2 :] = (210, 200, 70)
    return picture


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for depths and chunks that Pillow does not write. `rows` is packed, without filters."""
    row = len(rows) // height
    body = b"".join(b"\0" + rows[y * row : (y + 1) * row] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def gray_tiff(samples: bytes, width: int, bits: int, photometric: int) -> bytes:
    """A little-endian TIFF of one strip and one row, by hand, for layouts that Pillow does not write."""
    tags = [
        (256, 4, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(samples)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + directory + b"\0\0\0\0"


# -------------------------------------------------------------------------------- formats and layouts


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_format_gives_its_pixels(kind: str) -> None:
    options = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}} | LOSSLESS
    found = pixels(encode(Image.fromarray(flag()), kind, **options.get(kind, {})))
    tolerance = 0 if kind in LOSSLESS or kind == "GIF" else 4
    assert np.abs(found - flag()).mean() <= tolerance


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    # Exif 2.32, 4.6.4: which sides of the upright picture the stored first row and first column are
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.transpose(1, 0, 2),  # left, top
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in {"GIF", "BMP"}])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_stored_in_any_orientation_comes_upright(kind: str, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](flag())))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encode(stored, kind, exif=exif, **LOSSLESS.get(kind, {"quality": 95})))
    assert found.shape == (32, 48, 3)
    assert np.abs(found - flag()).mean() <= (0 if kind in LOSSLESS else 4)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiffs_decode_and_turn(compression: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](flag())))
    found = pixels(encode(stored, "TIFF", compression=compression, exif=exif))
    assert np.abs(found - flag()).mean() <= (6 if compression == "jpeg" else 0)


def test_damaged_exif_does_not_spoil_a_picture() -> None:
    data = encode(Image.fromarray(flag()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert (pixels(data) == flag()).all()


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 155), (100, 100, 100)),
        ("YCbCr", (100, 128, 128), (100, 100, 100)),
    ],
)
def test_each_colour_space_of_tiff_becomes_rgb(mode: str, colour: object, rgb: tuple[int, ...]) -> None:
    assert np.abs(pixels(encode(Image.new(mode, (4, 4), colour), "TIFF")) - rgb).max() <= 1


def test_a_lab_tiff_becomes_rgb() -> None:
    colours = Image.fromarray(flag())
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(colours, to_lab)
    assert np.abs(pixels(encode(lab, "TIFF")) - flag()).max() <= 4


def test_a_cmyk_jpeg_is_not_a_negative() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels(data) - (255, 0, 0)).max() <= 3


def test_a_ycck_jpeg_is_converted_by_its_adobe_marker() -> None:
    # Stored (inverted) components 100, 128, 128, 255. Told to be YCCK they mean C = M = Y = 100, K = 0.
    data = encode(Image.new("CMYK", (16, 16), (155, 127, 127, 0)), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    assert np.abs(pixels(data[:at] + b"\x02" + data[at + 1 :]) - 155).max() <= 3


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.repeat(np.rint(ramp / 257)[..., None], 3, axis=2)
    files = [
        encode(Image.fromarray(ramp), "PNG"),
        encode(Image.fromarray(ramp), "TIFF"),
        encode(Image.fromarray(ramp), "TIFF", compression="tiff_lzw"),
        encode(Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()), "TIFF"),
    ]
    for data in files:
        assert (pixels(data) == expected).all()


def test_sixteen_bit_gray_where_zero_is_white_is_turned_around() -> None:
    samples = np.array([0, 257, 65535], "<u2").tobytes()
    assert pixels(gray_tiff(samples, 3, 16, photometric=0))[0, :, 0].tolist() == [255, 254, 0]
    assert pixels(gray_tiff(samples, 3, 16, photometric=1))[0, :, 0].tolist() == [0, 1, 255]


def test_twelve_bit_gray_reaches_white() -> None:
    # 4095 and 0, then 2048 and 4095, packed in three bytes each
    found = pixels(gray_tiff(bytes([0xFF, 0xF0, 0x00, 0x80, 0x0F, 0xFF]), 4, 12, photometric=1))
    assert found[0, :, 0].tolist() == [255, 0, 128, 255]


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    rows = struct.pack(">6H", 65535, 32768, 0, 257, 513, 1024)
    assert pixels(png(2, 1, 16, 2, rows)).tolist() == [[[255, 128, 0], [1, 2, 4]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[-3e38, 0.0, 3e38]], np.float32), [0, 128, 255]),
        (np.array([[7e-39, 7e-39, 7e-39]], np.float32), [0, 0, 0]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), [0, 128, 255]),
    ],
)
def test_float_and_32_bit_gray_is_scaled_by_its_range(values: np.ndarray, expected: list[int]) -> None:
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == expected


# ------------------------------------------------------------------------------------- transparency


def over(colour: tuple[int, ...], alpha: int, background: tuple[int, ...]) -> np.ndarray:
    return (np.array(colour) * alpha + np.array(background) * (255 - alpha)) / 255


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 120, 240)])
@pytest.mark.parametrize(
    ("mode", "colour", "kind"),
    [("RGBA", (200, 100, 50, 96), "PNG"), ("LA", (200, 96), "PNG"), ("RGBA", (200, 100, 50, 96), "WEBP"),
     ("RGBA", (200, 100, 50, 96), "TIFF"), ("LA", (200, 96), "TIFF")],
)  # fmt: skip
def test_alpha_is_composited_on_the_background(
    mode: str, colour: tuple[int, ...], kind: str, background: tuple[int, int, int]
) -> None:
    data = encode(Image.new(mode, (8, 8), colour), kind, **LOSSLESS[kind])
    rgb = colour[:3] if mode == "RGBA" else (colour[0],) * 3
    assert np.abs(pixels(data, background=background) - over(rgb, 96, background)).max() <= 1


def test_a_palette_with_alpha_is_composited() -> None:
    palette = (b"PLTE", bytes([250, 0, 0, 0, 0, 250, 9, 9, 9]))
    several = png(3, 1, 8, 3, bytes([0, 1, 2]), palette, (b"tRNS", bytes([255, 128, 0])))
    assert np.abs(pixels(several) - [[[250, 0, 0], [127, 127, 252], [255, 255, 255]]]).max() <= 1
    one = png(3, 1, 8, 3, bytes([0, 1, 2]), palette, (b"tRNS", bytes([255, 0])))
    assert pixels(one).tolist() == [[[250, 0, 0], [255, 255, 255], [9, 9, 9]]]


def test_a_palette_image_with_an_alpha_channel_is_composited() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putdata([(0, 255), (1, 0)])
    assert pixels(encode(image, "TIFF")).tolist() == [[[250, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("depth", "colour", "rows", "transparent"),
    [
        (1, 0, bytes([0b01000000]), (0,)),
        (2, 0, bytes([0b10110000]), (2,)),
        (4, 0, bytes([0x5F]), (5,)),
        (8, 0, bytes([70, 255]), (70,)),
        (16, 0, struct.pack(">2H", 700, 65535), (700,)),
        (8, 2, bytes([1, 2, 3, 255, 255, 255]), (1, 2, 3)),
        (16, 2, struct.pack(">6H", 256, 515, 774, 65535, 65535, 65535), (256, 515, 774)),
    ],
)
def test_one_transparent_colour_shows_the_background_at_every_depth(
    depth: int, colour: int, rows: bytes, transparent: tuple[int, ...]
) -> None:
    chunk = (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    found = pixels(png(2, 1, depth, colour, rows, chunk), background=(9, 8, 7))
    assert found.tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_a_transparent_gif_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 250])
    image.putdata([0, 1])
    found = pixels(encode(image, "GIF", transparency=1), background=(9, 8, 7))
    assert found.tolist() == [[[250, 0, 0], [9, 8, 7]]]


# ------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in {"JPEG", "BMP"}])
def test_only_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data) - (255, 0, 0)).max() <= 4


def test_ten_thousand_frames_are_not_even_read() -> None:
    frames = [Image.new("P", (2, 2), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second = data.rindex(b"\x21\xf9")
    many = data[:second] + data[second:-1] * 10_000 + b";"
    damaged = data[:second] + b"\xff" * 10_000
    assert pixels(many).tolist() == pixels(damaged).tolist() == [[[255, 0, 0]] * 2] * 2


# --------------------------------------------------------------------------------- shrinking on load


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(1600, 1200), (1601, 1199), (1200, 5000), (511, 511), (300, 200)])
def test_a_jpeg_shrinks_to_no_less_than_was_asked_for(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.new("RGB", size, "teal"), "JPEG", exif=exif)
    whole, small = decode(data, LIMITS), decode(data, LIMITS, shrink_to=256)
    assert small.width <= whole.width
    assert min(small.size) >= min(256, min(whole.size))
    assert min(small.size) < 512 or min(small.size) == min(whole.size)
    assert small.width / small.height == pytest.approx(whole.width / whole.height, rel=0.01)


def test_shrinking_changes_the_looks_hardly() -> None:
    data = encode(Image.fromarray(flag(2048, 1536)), "JPEG", quality=95)
    small = decode(data, LIMITS, shrink_to=300)
    assert small.size == (512, 384)
    assert np.abs(np.asarray(small).astype(int) - flag(512, 384)).mean() < 1


# -------------------------------------------------------------------------------------------- limits


def test_more_bytes_than_the_limit_are_refused_naming_it() -> None:
    with pytest.raises(TooLarge, match=r"1,001 bytes; the limit is 1,000"):
        decode(b"\xff\xd8\xff" + b"x" * 998, Limits(max_image_bytes=1000))


@pytest.mark.parametrize("kind", ENCODERS)
def test_more_pixels_than_the_limit_are_refused_naming_it(kind: str) -> None:
    data = encode(Image.new("RGB", (40, 30)), kind)
    assert decode(data, Limits(max_pixels=1200)).size == (40, 30)
    with pytest.raises(TooLarge, match=r"40 × 30 = 1,200 pixels; the limit is 1,199"):
        decode(data, Limits(max_pixels=1199))


def bombs() -> dict[str, bytes]:
    small = Image.new("RGB", (16, 16))
    jpeg = bytearray(encode(small, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65000, 65000)
    gif = bytearray(encode(small, "GIF"))
    gif[6:10] = struct.pack("<HH", 65000, 65000)
    bmp = bytearray(encode(small, "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\xff\xff" * 2
    lossy = bytearray(encode(small, "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16383, 16383)
    lossless = bytearray(encode(small, "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    return {
        "200 megapixels in a tiny PNG": png(20_000, 10_000, 1, 0, bytes(2500) * 10_000),
        "JPEG": bytes(jpeg),
        "GIF": bytes(gif),
        "BMP": bytes(bmp),
        "WebP VP8X": b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x,
        "WebP VP8": bytes(lossy),
        "WebP VP8L": bytes(lossless),
        "TIFF": gray_tiff(b"\0", 200_000_000, 8, photometric=1),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_before_it_is_decoded(name: str) -> None:
    data = bombs()[name]
    assert len(data) < 100_000
    with pytest.raises(TooLarge, match="pixels; the limit is 100,000,000"):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "TIFF"])
def test_pillows_process_wide_pixel_limit_plays_no_part(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (40, 30), "red"), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert decode(data, LIMITS).size == (40, 30)


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_zlib_bomb_in_a_png_chunk_stays_packed(chunk: bytes) -> None:
    packed = zlib.compress(bytes(200_000_000), 9)
    data = png(2, 1, 8, 0, bytes([3, 4]), (chunk, b"name\0\0" + packed))
    with pytest.raises(BadRequest, match="Decompressed data too large"):
        decode(data, LIMITS)


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(Image.new("RGB", (64, 64), "teal"), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xc4") : -2]
    assert decode(data[:-2] + scan * 50 + data[-2:], LIMITS).size == (64, 64)
    with pytest.raises(BadRequest, match=r"more than 1,000 scans"):
        decode(data[:-2] + scan * 1000 + data[-2:], LIMITS)


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
def test_extreme_shapes_decode(size: tuple[int, int]) -> None:
    for kind in ENCODERS:
        if max(size) > 16_000 and kind in {"WEBP", "AVIF"}:  # the formats' own bound
            continue
        assert decode(encode(Image.new("RGB", size), kind), LIMITS, shrink_to=256).size == size


# ------------------------------------------------------------------------------------- what is no image


def test_nothing_at_all_is_said_to_be_empty() -> None:
    with pytest.raises(BadRequest, match=r"empty \(0 bytes\)"):
        decode(b"", LIMITS)


@pytest.mark.parametrize(
    ("data", "what", "fix"),
    [
        (b"\n<!DOCTYPE html><html><body>404", "an HTML page", "login page"),
        (b"\xef\xbb\xbf<html lang=en>", "an HTML page", "text editor"),
        (b"<!-- a --><!-- b -->" * 40 + b"<html>", "an HTML page", "login page"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing", "PNG"),
        (b'<?xml version="1.0"?><rss/>', "an XML or HTML document", "JPEG"),
        (b"%PDF-1.7\n", "a PDF document", "Render"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo", "JPEG"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", "an MP4 or QuickTime video", "frame"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a WebM or Matroska video", "frame"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI video", "frame"),
        (b"RIFF\0\0\0\0WAVEfmt ", "a RIFF file", "frame"),
        (b"PK\x03\x04rest", "a ZIP archive", "Unpack"),
        (b"\x1f\x8b\x08rest", "a gzip file", "Unpack"),
        (b"\xff\x0a\x00\x00", "a JPEG XL image", "JPEG or PNG"),
        (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 image", "JPEG or PNG"),
        (b"P6\n3 2 255\n", "a Netpbm image", "PNG"),
        (b"8BPS\0\x01", "a Photoshop document", "PNG"),
        (b"\0\0\x01\0\x01\0", "a Windows icon", "PNG"),
        (b"/9j/4AAQSkZJRg", "an image as base64 text", "Decode it"),
        (b"data:image/png;base64,iVBO", "an image as base64 text", "Decode it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
        (b'{"image": 1}', "JSON", "application/json"),
        (b"BMW is a maker of cars", r"text \('BMW is a maker", "JPEG"),
        ("grüße".encode(), "text", "JPEG"),
        (b"\x01\x02\x03\x04", "it starts with 01 02 03 04", "JPEG"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_told_by_its_looks(data: bytes, what: str, fix: str) -> None:
    with pytest.raises(UnsupportedMedia, match=f"(?s){what}.*{fix}"):
        decode(data, LIMITS)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_file_cut_short_is_refused_not_filled_with_gray(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(BadRequest, match=r"damaged or cut short .* send the whole file again"):
        decode(data[: int(len(data) * kept)], LIMITS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_header_and_nothing_else_is_refused(name: str) -> None:
    kind = name.upper()
    if kind not in ENCODERS:
        pytest.skip(f"this Pillow has no {name}")
    data = encode(Image.new("RGB", (4, 4)), kind)
    for length in (16, 20, 30):
        with pytest.raises(BadRequest):
            decode(data[:length], LIMITS)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_nothing_but_our_errors_ever_escapes(kind: str) -> None:
    """1,500 damaged files of each format: bytes changed, cut out, doubled, or cut off."""
    generator = np.random.default_rng(len(kind))
    limits = Limits(max_pixels=1_000_000)
    picture = Image.fromarray(flag(24, 16)).convert("RGBA" if kind in {"PNG", "WEBP", "TIFF"} else "RGB")
    seeds = [encode(picture, kind), encode(picture.convert("RGB").convert("L"), kind)]
    if kind == "TIFF":
        seeds += [encode(picture, kind, compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate")]
    refused: list[EmbedServeError] = []
    modes: set[str] = set()
    for _ in range(1500):
        data = bytearray(seeds[generator.integers(len(seeds))])
        for _ in range(generator.integers(1, 5)):
            # half of the damage goes into the header, where it does most
            reach = len(data) if generator.random() < 0.5 else min(64, len(data))
            at = int(generator.integers(4, max(5, reach)))
            match generator.integers(4):
                case 0:
                    data[at : at + 1] = generator.bytes(1)
                case 1:
                    del data[at : at + int(generator.integers(1, 9))]
                case 2:
                    data[at:at] = data[at : at + int(generator.integers(1, 9))]
                case _:
                    data[at : at + 4] = b"\xff\xff\xff\xff"
        try:
            modes.add(decode(bytes(data), limits, shrink_to=8).mode)
        except EmbedServeError as error:  # anything else fails the test
            refused.append(error)
    assert modes == {"RGB"}
    assert len(refused) > 100
    assert {error.status for error in refused} <= {400, 413, 415}
    assert [str(error) for error in refused if re.search(" at 0x[0-9a-f]|<class|PIL\\.", str(error))] == []


def test_many_threads_decode_as_one_does() -> None:
    files = [
        encode(Image.fromarray(np.roll(flag(200, 150), shift, axis=1)), kind)
        for shift, kind in enumerate(ENCODERS * 6)
    ]
    alone = [pixels(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(pixels, files), alone, strict=True):
            assert (found == expected).all()
