"""What text goes through before its tokenizer where a tokenizer.json cannot say it.

open_clip repairs wrongly decoded text (ftfy: "â€™" → "'") and resolves HTML entities ("&amp;lt;" → "<")
before cutting texts into tokens. Neither can be written as a normalizer of the Hugging Face format, whose
lower-casing besides goes character by character, where Python's knows the final sigma. So a bundle names one
of these rules.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Mapping
from typing import Literal

import ftfy

__all__ = ["Cleaning", "clean"]

Cleaning = Literal["none", "whitespace", "lower", "canonicalize", "siglip"]
"""none: as it came. whitespace, lower and canonicalize are open_clip's, under its names; each repairs,
resolves entities and joins whitespace; lower: lower case as well (CLIP); canonicalize: lower case without
ASCII punctuation (SigLIP). siglip: as Hugging Face does for SigLIP, which is canonicalize without repairs."""

_NO_PUNCTUATION = str.maketrans({**dict.fromkeys(string.punctuation, None), "_": " "})
_SIGLIP = str.maketrans({**dict.fromkeys(string.punctuation, None), "▁": " "})
"""Here an underscore joins; sentencepiece's own sign for a space is one."""


def clean(text: str, rule: Cleaning) -> str:
    """`text` as `rule` makes it. Any string that is valid Unicode is accepted."""
    return _RULES[rule](text)


def _repaired(text: str) -> str:
    # Twice, because scraped captions are often escaped twice: "&amp;lt;".
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _whitespace(text: str) -> str:
    return " ".join(_repaired(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    # Punctuation goes before whitespace is joined: "a - b" has two spaces in between.
    return " ".join(_repaired(text).translate(_NO_PUNCTUATION).lower().split())


def _siglip(text: str) -> str:
    return " ".join(text.translate(_SIGLIP).lower().split())


_RULES: Mapping[Cleaning, Callable[[str], str]] = {
    "none": str,
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonicalize,
    "siglip": _siglip,
}
