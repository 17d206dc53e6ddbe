"""Which captions are left out: what says nothing, and for captions from the web what ALIGN left out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

__all__ = ["FILTERS", "Filter", "cleaned", "kept", "words_in"]

Filter = Literal["none", "align"]
FILTERS: tuple[str, ...] = get_args(Filter)

LEAST_WORDS, MOST_WORDS, MOST_IMAGES = 3, 20, 10
"""Of ALIGN (Jia et al. 2021, section 3): captions of fewer or more words, or of more images, are noise."""

UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Thai, Lao, Japanese, Chinese and Korean, where a space does not end a word: each sign counts as one."""
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
UNREADABLE = "\ufffd"
"""What bytes become that are no UTF-8."""
NO_SENTENCE = re.compile(
    r"(?i)^(https?://|www\.)\S+$|^\S+\.(jpe?g|png|gif|webp|tiff?|bmp)$"
    r"|^(img|dsc|dscn|dcim|screenshot)[-_ ]?\d"
)
"""An address, a file's name, a camera's number."""

Captions = Sequence[tuple[str, ...]]


def cleaned(text: str) -> str:
    """Without control characters, and with single spaces; characters composed (NFC)."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text).split())


def words_in(text: str) -> int:
    """Words, however its script separates them."""
    return len(WORD.findall(text))


def kept(captions: Captions, rule: Filter) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """The captions that stay, and how many were left out for which reason.

    Args:
        captions: Of each image, as they were found.
        rule: "none" leaves out what is empty, unreadable or repeated for one image; "align" noise from the
            web as well.
    """
    left_out: Counter[str] = Counter()
    found = [tuple(map(cleaned, texts)) for texts in captions]
    left_out["empty"] = sum(not text for texts in found for text in texts)
    left_out["not UTF-8 text"] = sum(UNREADABLE in text for texts in found for text in texts)
    unique = [tuple(dict.fromkeys(one for one in texts if one and UNREADABLE not in one)) for texts in found]
    left_out["repeated for one image"] = sum(map(len, found)) - left_out.total() - sum(map(len, unique))
    if rule == "none":
        return unique, _counted(left_out)
    images = Counter(text for texts in unique for text in texts)
    noise: Mapping[str, Callable[[str], bool]] = {
        "an address or a file's name": lambda text: bool(NO_SENTENCE.search(text)),
        f"fewer than {LEAST_WORDS} words": lambda text: words_in(text) < LEAST_WORDS,
        f"more than {MOST_WORDS} words": lambda text: words_in(text) > MOST_WORDS,
        f"shared by more than {MOST_IMAGES} images": lambda text: images[text] > MOST_IMAGES,
    }
    reasons = {text: next((why for why, says in noise.items() if says(text)), "") for text in images}
    for text, why in reasons.items():
        left_out[why] += images[text] if why else 0
    return [tuple(text for text in texts if not reasons[text]) for texts in unique], _counted(left_out)


def _counted(left_out: Counter[str]) -> dict[str, int]:
    return {why: count for why, count in left_out.items() if why and count}
