"""Where captions come from, for every form of a data set; what is refused, and what is skipped."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from embedserve.errors import BadRequest, InvalidField
from tests.training.data.samples import encoded, folder_of, picture
from tests.training.data.test_webdataset import tar
from training.captions import CaptionRules
from training.captions.wording import MOST_TEXT, named
from training.data import open_pixels, open_source
from training.data.source import Source

NAMES = ["0.png", "1.png", "2.png"]


def captioned(path: Path, by: str = "", **rules: object) -> Source:
    return open_source(path, captions=CaptionRules(by=by, **rules))  # type: ignore[arg-type]


def said(source: Source) -> dict[str, tuple[str, ...]]:
    assert source.captions is not None
    return dict(zip(source.keys, source.captions, strict=True))


def listed(folder: Path, rows: Sequence[Sequence[str]], head: Sequence[str] = ("path", "caption")) -> Path:
    folder_of(folder, sorted({row[0] for row in rows}))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return folder / "list.csv"


# ------------------------------------------------------------------------------- files beside the images


def test_every_line_of_a_file_beside_an_image_is_a_caption(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a/0.png", "a/1.jpg", "b/2.png"])
    (tmp_path / "a" / "0.txt").write_text("a red shoe\n\n  its  heel \r\na red shoe\n")
    (tmp_path / "a" / "1.txt").write_bytes("\ufeffein Stiefel".encode())
    (tmp_path / "b" / "2.txt").write_text("コート")
    source = captioned(tmp_path)
    assert said(source) == {
        "a/0.png": ("a red shoe", "its heel"),
        "a/1.jpg": ("ein Stiefel",),
        "b/2.png": ("コート",),
    }
    assert source.captions_from == {
        "from": "the .txt files beside the images",
        "left_out": {"empty": 1, "repeated for one image": 1},
    }
    assert said(captioned(tmp_path, "txt")) == said(source)


def test_images_without_a_caption_are_skipped_and_the_rest_keeps_its_pixels_and_labels(
    tmp_path: Path,
) -> None:
    folder_of(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    (tmp_path / "a" / "1.txt").write_text("one")
    (tmp_path / "b" / "3.txt").write_text("three")
    (tmp_path / "b" / "2.txt").write_text(" \n")
    source = captioned(tmp_path)
    assert source.keys == ("a/1.png", "b/3.png")
    assert [source.class_names[label] for label in source.labels] == ["a", "b"]
    assert source.read(1).tobytes() == open_source(tmp_path).read(3).tobytes()
    reasons = {one.key: one.reason for one in source.skipped}
    assert reasons == {
        "a/0.png": "no caption in the .txt files beside the images",
        "b/2.png": "its captions were all left out",
    }


def test_a_file_that_is_no_text_or_too_large_is_no_caption(tmp_path: Path) -> None:
    folder_of(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    (tmp_path / "0.txt").write_text("a shoe")
    (tmp_path / "1.txt").write_text("a hat")
    (tmp_path / "2.txt").write_bytes("ein schöner Hut".encode("latin-1"))
    (tmp_path / "3.txt").write_text("words " * (MOST_TEXT // 6 + 1))
    source = captioned(tmp_path)
    assert source.keys == ("0.png", "1.png")
    assert source.captions_from["left_out"] == {"not UTF-8 text": 1}
    assert len(source.skipped) == 2


def test_an_image_that_cannot_be_read_takes_its_caption_with_it(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", ["0.png", "1.png", "2.png"])
    for number in range(3):
        (tmp_path / "images" / f"{number}.txt").write_text(f"caption {number}")
    (tmp_path / "images" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    pixels = open_pixels(captioned(tmp_path / "images"), 8, device="cpu", folder=tmp_path / "cache")
    assert said(pixels.source) == {"0.png": ("caption 0",), "2.png": ("caption 2",)}


# ----------------------------------------------------------------------------------------------- columns


def test_a_column_of_a_csv_is_found_unasked_or_by_its_name(tmp_path: Path) -> None:
    rows = [(name, f"text {name}", f"title {name}") for name in NAMES]
    file = listed(tmp_path, rows, ("path", "text", "title"))
    assert said(captioned(file)) == {name: (f"text {name}",) for name in NAMES}
    assert captioned(file).captions_from["from"] == "the column 'text'"
    assert said(captioned(file, "title")) == {name: (f"title {name}",) for name in NAMES}


def test_an_image_that_is_listed_again_has_several_captions(tmp_path: Path) -> None:
    rows = [("0.png", "one"), ("1.png", "two"), ("0.png", "another"), ("0.png", "one")]
    source = captioned(listed(tmp_path, rows))
    assert said(source) == {"0.png": ("one", "another"), "1.png": ("two",)}
    assert [one.reason for one in source.skipped] == ["listed again in row 4; the first one counts"]


def test_lists_in_jsonl_and_parquet_are_several_captions(tmp_path: Path) -> None:
    folder_of(tmp_path, NAMES)
    captions = [["a", "b"], ["c"], []]
    rows = [{"path": name, "caption": texts} for name, texts in zip(NAMES, captions, strict=True)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    for form in ("jsonl", "parquet"):
        source = captioned(tmp_path / f"list.{form}")
        assert said(source) == {"0.png": ("a", "b"), "1.png": ("c",)}
        assert [one.key for one in source.skipped] == ["2.png"]


def test_a_webdataset_has_them_in_txt_members_and_in_fields_of_its_json(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number in range(3):
        members[f"{number}.jpg"] = encoded(picture(number), "JPEG")
        members[f"{number}.txt"] = f"text {number}\nmore of {number}".encode()
        members[f"{number}.json"] = json.dumps(
            {"title": f"title {number}", "tags": ["x", f"y{number}"]}
        ).encode()
    file = tar(tmp_path / "shard.tar", members)
    keys = [f"shard.tar/{number}.jpg" for number in range(3)]
    assert said(captioned(file)) == {key: (f"text {n}", f"more of {n}") for n, key in enumerate(keys)}
    assert said(captioned(file, "title")) == {key: (f"title {n}",) for n, key in enumerate(keys)}
    assert said(captioned(file, "tags")) == {key: ("x", f"y{n}") for n, key in enumerate(keys)}


# ------------------------------------------------------------------------------- names of files and classes


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("a/red-boot_03.jpg", "red boot"),
        ("redBoot 2.png", "red Boot"),
        ("0001.png", "0001"),
        ("haus+garten.png", "haus garten"),
        ("赤い靴.png", "赤い靴"),
    ],
)
def test_a_files_name_is_words(key: str, words: str) -> None:
    assert named(key) == words


def test_file_names_are_captions_where_they_are_asked_for(tmp_path: Path) -> None:
    folder_of(tmp_path, ["red-shoe_1.png", "red-shoe_2.png", "hat.png"])
    assert sorted(said(captioned(tmp_path, "name")).values()) == [("hat",), ("red shoe",), ("red shoe",)]


def test_class_names_stand_in_every_template(tmp_path: Path) -> None:
    folder_of(tmp_path, ["rain_coat/0.png", "boot/1.png"])
    source = captioned(tmp_path, "label", templates=("{}", "a {} on sale"))
    assert said(source) == {
        "boot/1.png": ("boot", "a boot on sale"),
        "rain_coat/0.png": ("rain coat", "a rain coat on sale"),
    }
    assert source.captions_from["from"] == "the class names"


def test_a_column_that_is_called_label_gives_class_names_too(tmp_path: Path) -> None:
    file = listed(tmp_path, [("0.png", "boot"), ("1.png", ""), ("2.png", "coat")], ("path", "label"))
    source = captioned(file, "label", templates=("a {}",))
    assert said(source) == {"0.png": ("a boot",), "2.png": ("a coat",)}
    assert [one.key for one in source.skipped] == ["1.png"]


def test_labels_may_be_of_another_column(tmp_path: Path) -> None:
    file = listed(tmp_path, [("0.png", "ash"), ("1.png", "oak")], ("path", "species"))
    rules = CaptionRules(by="label", templates=("a leaf of {}",))
    source = open_source(file, label_by="species", captions=rules)
    assert said(source) == {"0.png": ("a leaf of ash",), "1.png": ("a leaf of oak",)}


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_template_needs_one_place_for_the_name(template: str) -> None:
    with pytest.raises(InvalidField, match=r"places for the class's name; put \{\} where it belongs, once"):
        CaptionRules(templates=("{}", template))


def test_a_data_set_without_captions_is_told_what_could_be_one(tmp_path: Path) -> None:
    file = listed(tmp_path, [("0.png", "x", "boot"), ("1.png", "y", "coat")], ("path", "titel", "label"))
    with pytest.raises(
        InvalidField, match=r"has no captions.*captions=name.*captions=label.*, or a column: titel\."
    ):
        captioned(file)
    with pytest.raises(InvalidField, match="captions='title' is not known here; did you mean 'titel'"):
        captioned(file, "title")


def test_files_beside_images_that_are_not_there_are_not_offered_again(tmp_path: Path) -> None:
    folder_of(tmp_path, NAMES)
    for by in ("", "txt"):
        with pytest.raises(InvalidField, match=r"no \.txt files beside the images.*captions=name") as told:
            captioned(tmp_path, by)
        assert "captions=label" not in str(told.value), "there are no classes"


def test_class_names_need_classes(tmp_path: Path) -> None:
    folder_of(tmp_path, NAMES)
    with pytest.raises(InvalidField, match=r"captions=label, but '.*' has no labels; .*label_by="):
        captioned(tmp_path, "label")


def test_one_caption_for_all_images_tells_nothing_apart(tmp_path: Path) -> None:
    file = listed(tmp_path, [(name, "a product photo") for name in NAMES])
    with pytest.raises(BadRequest, match=r"All images of '.*' have the caption 'a product photo'"):
        captioned(file)


def test_captions_that_are_all_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    file = listed(tmp_path, [("0.png", " "), ("1.png", "IMG_0001"), ("2.png", "short")])
    with pytest.raises(
        BadRequest, match=r"None of the 3 images .*1 empty, 1 an address.*1 fewer than 3 words"
    ):
        captioned(file, filter="align")
