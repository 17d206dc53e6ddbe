"""What a file that is no readable image looks like, and what its sender should do about it."""

from __future__ import annotations

__all__ = ["looks_like"]

_SEND = "Send a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file."
_TO_PNG = "Convert it to JPEG or PNG first."
_FRAME = "Send a frame of it as JPEG."

_AT_START: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the file itself", "Run `git lfs pull` first."),
    ((b"%PDF",), "a PDF document", "Render the page to PNG first."),
    ((b"\x1aE\xdf\xa3",), "a WebM or Matroska video", _FRAME),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "a JPEG 2000 image", _TO_PNG),
    ((b"\0\0\0\x0cJXL ", b"\xff\x0a"), "a JPEG XL image", _TO_PNG),
    ((b"8BPS",), "a Photoshop document", "Export it as PNG first."),
    ((b"\0\0\x01\0", b"\0\0\x02\0"), "a Windows icon", _TO_PNG),
    (tuple(b"P%d%c" % (kind, space) for kind in range(1, 8) for space in b" \t\n\r#"),
     "a Netpbm image", _TO_PNG),
    ((b"PK\x03\x04", b"PK\x05\x06"), "a ZIP archive", "Unpack it and send the images in it."),
    ((b"\x1f\x8b",), "a gzip file", "Unpack it first."),
    ((b"data:image/", b"/9j/", b"iVBORw0KGgo", b"UklGR", b"R0lGOD"), "an image as base64 text",
     "Decode it, or send it as JSON in an image field."),
    ((b"{", b"["), "JSON", "Send the image's bytes, or set the content type to application/json."),
)  # fmt: skip

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_HTML = (b"<html", b"<!doctype html", b"<head", b"<body", b"<title", b"<script", b"<meta")


def looks_like(data: bytes) -> tuple[str, str]:
    """What the file seems to be ("an HTML page") and the fix, both ready for an error message."""
    head = data[:1024].removeprefix(b"\xef\xbb\xbf")
    text = head.lstrip()
    if text.startswith(b"<"):
        return _markup(text.lower())
    if head[4:8] == b"ftyp":
        return _iso_media(head[8:12])
    if head[4:8] in {b"moov", b"mdat"}:
        return "a QuickTime video", _FRAME
    if head[:4] == b"RIFF":
        return ("an AVI video" if head[8:12] == b"AVI " else "a RIFF file that is not WebP"), _FRAME
    for starts, what, fix in _AT_START:
        if text.startswith(starts) or head.startswith(starts):
            return what, fix
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return f"text ('{text[:40].decode('utf-8', 'replace')}'…)", _SEND
    return f"an unknown kind of file (it starts with {head[:8].hex(' ')})", _SEND


def _markup(text: bytes) -> tuple[str, str]:
    if any(tag in text for tag in _HTML):
        return (
            "an HTML page",
            "A download may have met an error or login page: open the file in a text editor to see which.",
        )
    if b"<svg" in text:
        return "an SVG drawing", "Render it to PNG first."
    return "an XML or HTML document", _SEND


def _iso_media(brand: bytes) -> tuple[str, str]:
    """The major brand of ISO/IEC 14496-12 media."""
    if brand in _HEIC:
        return "a HEIC photo", "Convert it to JPEG first (phones can be set to save JPEG)."
    if brand.startswith(b"crx"):
        return "a camera's raw file", "Export it as JPEG first."
    return "an MP4 or QuickTime video", _FRAME
