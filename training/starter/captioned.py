"""Drawings with captions to learn from, and which of them are kept for measuring.

    emoji            npm `@iconify-json/{noto,noto-v1,twemoji,emojione,fluent-emoji-flat}` (SVG), named by
                     `emojibase-data`: one emoji, drawn by five vendors
    icons            npm `@iconify-json/{game-icons,flat-color-icons}`: their file names are captions
    Open Clip Art    Debian `openclipart-png`, and `openclipart-svg` for the titles and keywords in its files

What is kept for measuring is never learned from: one emoji concept in ten with all its drawings, the 600
pictures of `clipart.held_out`, and every drawing of any source whose main caption is one of theirs. The
vendors OpenMoji, Apple and Facebook and the stamps of Tux Paint are for measuring only and not read here.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = [
    "Captioned",
    "clip_art",
    "clip_art_captions",
    "emoji_names",
    "held_out_concept",
    "icons",
    "slug",
]

VENDORS = ("noto", "noto-v1", "twemoji", "emojione", "fluent-emoji-flat")
ICON_SETS = ("game-icons", "flat-color-icons")
SIZE = 224
ONE_IN = 10
"""Every tenth emoji concept is kept for measuring."""

MANY = 6
"""A title that more drawings than this share is the name of a collection, not of a drawing."""
EMPTY_WORDS = frozenset(
    {
        "clip_art",
        "clipart",
        "hash",
        "icons",
        "lemon_theme_icon",
        "magick",
        "mapsym",
        "menu",
        "signs_and_symbols",
        "special",
        "theme",
        "united_nations_member",
        "unsorted",
    }
)
COLLECTION_TITLE = re.compile(r"clip ?art|theme|collection|part of|aiga|etiquette|@|http", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Captioned:
    """One drawing. `captions` has the main one first; `draw` gives it as RGBA, its longest side `SIZE`."""

    source: str
    name: str
    captions: tuple[str, ...]
    draw: Callable[[], Image.Image]


def slug(text: str) -> str:
    """A text as one word: "flag: Côte d’Ivoire" → "flag-côte-d-ivoire"."""
    return re.sub(r"[^\w]+|_", "-", text.lower()).strip("-")


def held_out_concept(label: str) -> bool:
    """Whether an emoji of this name is kept for measuring, whoever drew it."""
    return int.from_bytes(hashlib.sha256(slug(label).encode()).digest()[:4], "big") % ONE_IN == 0


def emoji_names(npm: Path) -> dict[str, tuple[str, ...]]:
    """Code points ("1F436", without the variation selector) → name and keywords, skin tones left out."""
    entries = json.loads((npm / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    return {
        _plain(entry["hexcode"]): (_spoken(entry["label"]), *entry.get("tags", ()))
        for entry in entries
        if "label" in entry
    }


def icons(npm: Path) -> Iterator[Captioned]:
    """Every drawing of `VENDORS` and `ICON_SETS` in the folder `npm` (a `node_modules`).

    Raises:
        FileNotFoundError: A package is missing; the message is the path that was looked for.
    """
    names = emoji_names(npm)
    by_slug = {slug(captions[0]): captions for captions in names.values()}
    for vendor in (*VENDORS, *ICON_SETS):
        folder = npm / "@iconify-json" / vendor
        known = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        code_points = _code_points(folder) if vendor in VENDORS else {}
        for name, icon in known["icons"].items():
            if icon.get("hidden") or "skin-tone" in name:
                continue
            captions: tuple[str, ...] | None = (name.replace("-", " "),)
            if vendor in VENDORS:
                captions = names.get(code_points.get(name, "")) or by_slug.get(slug(_spoken(name)))
            if captions:
                svg = _svg(icon, known, black=vendor in ICON_SETS)
                yield Captioned(vendor, name, captions, partial(_rasterise, svg))


def clip_art(png: Path, svg: Path) -> Iterator[Captioned]:
    """Open Clip Art's pictures that have a caption, with doubles (see `clipart.pictures`)."""
    for name, captions in clip_art_captions(svg).items():
        if captions and (png / name).exists():
            yield Captioned("openclipart", name, captions, partial(_open, png / name))


def clip_art_captions(svg: Path) -> dict[str, tuple[str, ...]]:
    """Path of each picture (as PNG) → its captions, the main one first; none for a few.

    The main caption is the title in the SVG's metadata, or what its file is called where that title is a
    collection's. Then its keywords, and the folder that it lies in.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for path in sorted(svg.rglob("*.svg")):
        found[path.relative_to(svg).with_suffix(".png").as_posix()] = _metadata(path)
    shared = Counter(title for title, _ in found.values())
    captions = {}
    for name, (title, keywords) in found.items():
        path = Path(name)
        own = title and shared[title] <= MANY and not COLLECTION_TITLE.search(title)
        texts = (title if own else path.stem, *keywords, path.parent.name)
        every = dict.fromkeys(_words(text) for text in texts if text.lower() not in EMPTY_WORDS)
        captions[name] = tuple(text for text in every if len(text) > 1)
    return captions


def _metadata(path: Path) -> tuple[str, list[str]]:
    """Title and keywords of an SVG file of Open Clip Art. Some are no valid XML, so no parser reads them."""
    text = path.read_text(encoding="utf-8", errors="replace")
    work = re.search(r"<cc:Work.*?</cc:Work>", text, re.DOTALL | re.IGNORECASE)
    if work is None:
        return "", []
    title = re.search(r"<dc:title[^>]*>(.*?)</dc:title>", work[0], re.DOTALL)
    subject = re.search(r"<dc:subject>(.*?)</dc:subject>", work[0], re.DOTALL)
    keywords = re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", subject[1], re.DOTALL) if subject else []
    return (
        html.unescape(title[1]).strip() if title else "",
        [html.unescape(word).strip().lower() for word in keywords],
    )


def _words(text: str) -> str:
    """`tramway_lumen_01` → "tramway lumen": no underscores, no running number."""
    return re.sub(r"[\s_]+", " ", re.sub(r"[\s_]*\d+\s*$", "", text.replace("-", " "))).strip()


def _spoken(label: str) -> str:
    """ "flag: Malta" → "flag of Malta"; names in icon sets say "flag for" instead."""
    return re.sub(r"^flag(: |-for-|-)", "flag of ", label)


def _plain(code_points: str) -> str:
    return code_points.upper().replace("-FE0F", "")


def _code_points(folder: Path) -> dict[str, str]:
    file = folder / "chars.json"
    if not file.exists():
        return {}
    chars: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return {name: _plain(code) for code, name in chars.items()}


def _svg(icon: dict[str, Any], known: dict[str, Any], *, black: bool) -> str:
    width, height = (icon.get(side, known.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#1c1c1c") if black else icon["body"]
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{width}" height="{height}">{body}</svg>'
    )


def _rasterise(svg: str) -> Image.Image:
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    scale = SIZE / max(rgba.size)
    return rgba.resize([max(1, round(side * scale)) for side in rgba.size], Image.Resampling.BICUBIC)
