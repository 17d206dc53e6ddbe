"""From what a data set says about its images to a list of captions for each.

""         files beside the images (shoe.txt for shoe.jpg, a caption a line), else a column that is called
           caption, captions, text, txt or description
"txt"      those files, or the column
"name"     the file's name: "red-boot_03.jpg" is "red boot"
"label"    the class's name in each of the templates: "a photo of a red boot"
COLUMN     any column of the list, or field of a WebDataset's JSON
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest, InvalidField, closest
from training.captions.filters import Filter, kept
from training.data.listing import Files, Listing, Skipped, counted

__all__ = ["COLUMNS", "TEMPLATES", "CaptionRules", "Worded", "in_words", "worded"]

COLUMNS = ("caption", "captions", "text", "txt", "description")
"""Columns that are taken for captions unasked, the first that is there."""
BESIDE, NAME, LABEL = "txt", "name", "label"
TEMPLATES = ("{}", "a photo of a {}", "a picture of a {}")
MOST_TEXT = 2**20
"""Bytes of a file beside an image; what is larger is no caption."""

Texts = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """Where captions come from and which stay."""

    by: str = ""
    """See the module."""
    templates: Texts = TEMPLATES
    """Sentences with {} for a class's name."""
    filter: Filter = "none"

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise InvalidField(
                    f"The template '{template}' has {template.count('{}')} places for the class's name; put "
                    "{} where it belongs, once. Several templates are separated by |.",
                    param="templates",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Worded:
    """The captions of a data set."""

    captions: Sequence[Texts]
    """Of each image that has any: one or more."""
    rows: NDArray[np.int64]
    """These images, as rows of the listing."""
    skipped: Sequence[Skipped]
    """The others."""
    origin: str
    """Where captions came from, for people."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Captions by why they do not count."""


def worded(
    listing: Listing, rules: CaptionRules, name: str, classes: tuple[NDArray[np.int64], Texts] | None = None
) -> Worded:
    """Finds the captions of every image; images without one are skipped.

    Args:
        listing: Of the data set.
        rules: Where to look, and what to leave out.
        name: The data set's, for messages.
        classes: The label of each image, -1 without one, and the names of all; the listing's own by default.

    Raises:
        InvalidField: There is no such column, or nothing that could be a caption.
        BadRequest: No image has a caption, or all have the same one.
    """
    origin, find = _finder(listing, rules, name, classes or listing.labels(""))
    found = find()
    captions, left_out = kept(found, rules.filter)
    rows = np.array([row for row, texts in enumerate(captions) if texts], np.int64)
    skipped = [
        Skipped(
            listing.keys[row], "its captions were all left out" if found[row] else f"no caption in {origin}"
        )
        for row, texts in enumerate(captions)
        if not texts
    ]
    stay = [captions[row] for row in rows]
    reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
    if not stay:
        raise BadRequest(
            f"None of the {counted(len(captions), 'image')} of '{name}' has a caption in {origin}"
            + (f" (left out: {reasons})" if reasons else "")
            + ". Say where they are with captions=, or use captions=name or captions=label.",
            param="captions",
        )
    different = {text for texts in stay for text in texts}
    if len(different) < 2:
        raise BadRequest(
            f"All images of '{name}' have the caption '{stay[0][0]}'; it cannot tell them apart. Give "
            "captions that say what each image shows.",
            param="captions",
        )
    return Worded(captions=stay, rows=rows, skipped=skipped, origin=origin, left_out=left_out)


def _finder(
    listing: Listing, rules: CaptionRules, name: str, classes: tuple[NDArray[np.int64], Texts]
) -> tuple[str, Callable[[], list[Texts]]]:
    """Where captions are, in words, and what collects them."""
    by, columns = rules.by, listing.columns
    if by in {"", BESIDE} and (texts := _beside(listing)) is not None:
        return "the .txt files beside the images", lambda: texts
    if not by:
        by = next((column for column in COLUMNS if column in columns or column in listing.several), "")
    if by in columns and by not in {NAME, LABEL}:
        return f"the column '{by}'", lambda: listing.texts(by)
    if by == NAME:
        return "the file names", lambda: [(named(key),) for key in listing.keys]
    if by == LABEL:
        labels, names = classes
        if names:
            return "the class names", lambda: [_of_class(names, int(one), rules.templates) for one in labels]
        raise InvalidField(
            f"captions=label, but '{name}' has no labels; put the images into a folder for each class, or "
            "say what labels them with label_by=.",
            param="captions",
        )
    known = [one for one in columns if one not in {"folder", NAME, LABEL}]
    words = [*known, NAME, *([LABEL] if classes[1] else [])]
    here = "captions=name (their file names)" + (", captions=label (class names)" if classes[1] else "")
    if by in {"", BESIDE}:
        columns_too = BESIDE if by else ", ".join(COLUMNS)
        raise InvalidField(
            f"'{name}' has no captions: no .txt files beside the images and no column {columns_too}. "
            f"Say where they are: {here}" + (f", or a column: {', '.join(known)}." if known else "."),
            param="captions",
        )
    raise InvalidField(
        f"captions='{by}' is not known here; {closest(by, words)} There are: {', '.join(words)}.",
        param="captions",
    )


def _beside(listing: Listing) -> list[Texts] | None:
    """The lines of the .txt files beside the images; None where no image has one."""
    if not isinstance(listing.fetch, Files):
        return None
    texts = [_lines(path.with_suffix(".txt")) for path in listing.fetch.paths]
    return texts if any(texts) else None


def _lines(path: Path) -> Texts:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_TEXT + 1)
    except OSError:
        return ()
    return () if len(content) > MOST_TEXT else tuple(content.decode("utf-8-sig", "replace").splitlines())


def named(key: str) -> str:
    """A file's name as words: without extension, number at the end, and what joins words."""
    stem = re.sub(r"[\s_-]*\d+$", "", PurePosixPath(key).stem) or PurePosixPath(key).stem
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[_\-+]+", " ", stem)).strip()


def _of_class(names: Sequence[str], label: int, templates: Texts) -> Texts:
    if label < 0:
        return ()
    return tuple(template.replace("{}", in_words(names[label])) for template in templates)


def in_words(name: str) -> str:
    """A class's name as it is said: "red_boot" is "red boot"."""
    return re.sub(r"[_\-]+", " ", name).strip() or name
