"""Texts are cleaned by named rules. That these are open_clip's is tested with the export of tokenizers."""

from __future__ import annotations

import pytest

from embedserve.cleaning import Cleaning, clean


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("  A \n cat ", "none", "  A \n cat "),
        ("  A \n cat ", "whitespace", "A cat"),
        ("  A \n cat ", "lower", "a cat"),
        ("It’s â€œfineâ€\x9d &amp;lt;b&amp;gt;", "lower", 'it\'s "fine" <b>'),
        ("A cat_dog - 2.5%!", "canonicalize", "a cat dog 25"),
        ("A cat_dog▁- &amp; 2.5%!", "siglip", "a catdog amp 25"),
        ("ΟΔΟΣ", "lower", "οδος"),
        ("nul\0 and \x1b[1mbell\x07", "lower", "nul and bell"),
        ("ﬁne ＡＢＣ", "lower", "fine abc"),
        (" \t\u3000", "lower", ""),
    ],
)
def test_rules_by_example(text: str, rule: Cleaning, expected: str) -> None:
    assert clean(text, rule) == expected
