"""Captions come from names, titles and keywords, and nothing that is kept for measuring is learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from training.starter.captioned import (
    ICON_SETS,
    VENDORS,
    clip_art,
    clip_art_captions,
    held_out_concept,
    icons,
    slug,
)

SQUARE = '<path fill="currentColor" d="M0 0h8v16h-8z"/>'
RDF = """<svg><metadata><rdf:RDF><cc:Work rdf:about=""><dc:title>{title}</dc:title>
<dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"""


def svg(folder: Path, name: str, title: str, *keywords: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        RDF.format(title=title, keywords="".join(f"<rdf:li>{word}</rdf:li>" for word in keywords))
    )


@pytest.fixture
def npm(tmp_path: Path) -> Path:
    names = tmp_path / "emojibase-data" / "en"
    names.mkdir(parents=True)
    entries = [
        {"hexcode": "1F436", "label": "dog face", "tags": ["dog", "pet"]},
        {"hexcode": "1F1F2-1F1F9", "label": "flag: Malta", "tags": ["MT"]},
    ]
    (names / "data.json").write_text(json.dumps(entries))
    for vendor in (*VENDORS, *ICON_SETS):
        folder = tmp_path / "@iconify-json" / vendor
        folder.mkdir(parents=True)
        found = {
            "dog-face": {"body": SQUARE},
            "flag-for-malta": {"body": SQUARE},
            "gone": {"body": "", "hidden": True},
        }
        if vendor == "noto":
            found = {"doggy": {"body": SQUARE}, "dog-face-dark-skin-tone": {"body": SQUARE}}
            (folder / "chars.json").write_text(json.dumps({"1f436-fe0f": "doggy"}))
        (folder / "icons.json").write_text(json.dumps({"icons": found, "width": 16, "height": 16}))
    return tmp_path


def test_every_vendors_drawing_of_an_emoji_has_its_name_and_keywords(npm: Path) -> None:
    dogs = [one for one in icons(npm) if one.source in VENDORS and "dog" in one.name]
    assert {one.source for one in dogs} == set(VENDORS)
    assert {one.captions for one in dogs} == {("dog face", "dog", "pet")}


def test_flags_are_called_alike_whatever_the_set_calls_them(npm: Path) -> None:
    flags = {one.captions for one in icons(npm) if one.source in VENDORS and "malta" in one.name}
    assert flags == {("flag of Malta", "MT")}


def test_an_icon_is_captioned_by_its_name_and_drawn_in_black(npm: Path) -> None:
    one = next(one for one in icons(npm) if one.source == "game-icons" and one.name == "dog-face")
    assert one.captions == ("dog face",)
    drawn = one.draw()
    assert drawn.mode == "RGBA"
    assert drawn.size == (224, 224)
    assert drawn.getpixel((50, 100)) == (28, 28, 28, 255)
    assert drawn.getchannel("A").getpixel((200, 100)) == 0


def test_a_missing_package_is_named_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="emojibase-data"):
        list(icons(tmp_path))


def test_a_title_and_its_keywords_are_captions(tmp_path: Path) -> None:
    svg(tmp_path, "food/pear_someone_02.svg", "Ripe Pear 2", "fruit", "hash", "unsorted", "")
    assert clip_art_captions(tmp_path) == {"food/pear_someone_02.png": ("Ripe Pear", "fruit", "food")}


def test_a_collections_title_gives_way_to_the_file_name(tmp_path: Path) -> None:
    for name in ("sword", "shield", "tower", "king", "queen", "bishop", "pawn"):
        svg(tmp_path, f"games/{name}_01.svg", "my pictures")
    svg(tmp_path, "games/knight.svg", "Part of the Chess Collection")
    assert {captions[0] for captions in clip_art_captions(tmp_path).values()} == {
        "sword", "shield", "tower", "king", "queen", "bishop", "pawn", "knight",
    }  # fmt: skip


def test_clip_art_is_enlarged_to_the_common_size_with_its_transparency(tmp_path: Path) -> None:
    svg(tmp_path / "svg", "a/pear.svg", "Pear")
    (tmp_path / "png" / "a").mkdir(parents=True)
    Image.new("RGBA", (20, 10), (0, 255, 0, 128)).save(tmp_path / "png" / "a" / "pear.png")
    (pear,) = clip_art(tmp_path / "png", tmp_path / "svg")
    assert pear.draw().size == (224, 112)
    assert pear.draw().getpixel((5, 5)) == (0, 255, 0, 128)


def test_one_concept_in_ten_is_kept_by_name_alone() -> None:
    names = [f"thing {number}" for number in range(3000)]
    kept = [name for name in names if held_out_concept(name)]
    assert 240 < len(kept) < 360
    assert kept == [name for name in names if held_out_concept(name.upper().replace(" ", "_"))]
    assert slug("flag: Côte d’Ivoire") == "flag-côte-d-ivoire"
