"""A folder of images, nested as deep as one likes; folders may be classes, or parts such as train and val."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath

import numpy as np

from embedserve.errors import BadRequest
from embedserve.folder import Walk, walk
from training.data.listing import Files, Listing, Skipped, counted, is_test, name_column, shown

__all__ = ["list_folder"]


def list_folder(folder: Path) -> Listing:
    """Finds the images below `folder`.

    The columns are `folder` (the one that holds the image, as a path below the root), `name` (see
    `name_column`) and, where there are classes, `class`: the first folder in which the images' paths differ,
    when every image lies in one. Where these first folders are called train, val, test and the like, they are
    the parts of the data set and the folders in them are the classes.

    Raises NotFound or BadRequest for a folder that cannot be listed or that holds no image.
    """
    tree = walk(folder)
    if not tree.files:
        raise BadRequest(_nothing_found(folder, tree))
    keys = [file.id for file in tree.files]
    folders = [PurePosixPath(key).parent.parts for key in keys]
    depth = _common(folders)
    parts = [is_test(path[depth]) if len(path) > depth else None for path in folders]
    test = None
    if {True, False} == set(parts):
        test = np.array(parts, bool)
        depth += 1 + _common([path[depth + 1 :] for path in folders])
    columns: dict[str, Sequence[str | None]] = {}
    classes = {path[depth] if len(path) > depth else None for path in folders}
    if None not in classes and len(classes) >= 2:
        columns["class"] = [path[depth] for path in folders]
    columns["folder"] = ["/".join(path) or "." for path in folders]
    columns["name"] = name_column(keys)
    return Listing(
        keys=keys,
        stamps=np.array([(file.size, _nanoseconds(file.modified)) for file in tree.files], np.int64),
        fetch=Files([file.path for file in tree.files]),
        columns=columns,
        label="class" if "class" in columns else "",
        test=test,
        skipped=[Skipped(problem.path, problem.reason) for problem in tree.problems],
        ignored=tree.ignored,
    )


def _common(folders: Sequence[tuple[str, ...]]) -> int:
    """How many folders all paths begin with."""
    first, last = min(folders), max(folders)
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    return depth


def _nanoseconds(modified: str) -> int:
    moment = datetime.fromisoformat(modified)
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def _nothing_found(folder: Path, tree: Walk) -> str:
    if tree.problems:
        return (
            f"'{folder}' holds no image that can be read: "
            f"{shown(f'{one.path}: {one.reason}' for one in tree.problems)}. Check its permissions."
        )
    if tree.ignored:
        return (
            f"'{folder}' holds no image, only {counted(tree.ignored, 'other file')}. "
            "Images are JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF files with such an extension."
        )
    return f"'{folder}' is empty. Give a folder with JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF files."
