"""What is left out of captions, and that every one of them is counted."""

from __future__ import annotations

import unicodedata

import pytest

from training.captions.filters import MOST_IMAGES, cleaned, kept, words_in


def test_a_caption_is_composed_and_has_single_spaces() -> None:
    assert cleaned("  a\tred\x00shoe \n") == "a red shoe"
    assert cleaned(unicodedata.normalize("NFD", "Schöne Grüße")) == "Schöne Grüße"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a red shoe", 3),
        ("赤い靴が二足", 6),
        ("빨간 신발 한 켤레", 7),
        ("รองเท้า", 7),
        ("красный ботинок", 2),
        ("赤い red shoe", 4),
        ("", 0),
    ],
)
def test_words_are_counted_as_their_script_separates_them(text: str, count: int) -> None:
    assert words_in(text) == count


def test_without_a_filter_all_but_empty_and_repeated_captions_stay() -> None:
    found = [("short", "short", ""), ("http://x.org/a.jpg",), ("bro\ufffdken", "whole")]
    texts, left_out = kept(found, "none")
    assert texts == [("short",), ("http://x.org/a.jpg",), ("whole",)]
    assert left_out == {"empty": 1, "not UTF-8 text": 1, "repeated for one image": 1}


def test_aligns_rules_leave_out_noise_and_say_how_much() -> None:
    good = ("a red shoe on grass", "赤い靴が二足あります")
    noise = {
        "https://example.org/some_picture": "an address or a file's name",
        "holiday.jpeg": "an address or a file's name",
        "DSC_0042 edited copy": "an address or a file's name",
        "red shoe": "fewer than 3 words",
        " ".join(["word"] * 21): "more than 20 words",
    }
    shared = "buy now for less"
    found = [good, *((text, "") for text in noise), *[(shared,)] * (MOST_IMAGES + 1)]
    texts, left_out = kept(found, "align")
    assert texts == [good, *[()] * (len(noise) + MOST_IMAGES + 1)]
    assert left_out == {
        "empty": 5,
        "an address or a file's name": 3,
        "fewer than 3 words": 1,
        "more than 20 words": 1,
        "shared by more than 10 images": 11,
    }
    assert sum(map(len, texts)) + sum(left_out.values()) == sum(map(len, found))


def test_a_caption_of_exactly_as_many_images_or_words_as_allowed_stays() -> None:
    most = " ".join(map(str, range(20)))
    found = [("one two three",)] * MOST_IMAGES + [(most,)]
    assert kept(found, "align") == (found, {})
