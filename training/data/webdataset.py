"""WebDataset: samples in tar files, the files of a sample side by side under one name.

    shard-000.tar:  000017.jpg  000017.cls  000017.json  000018.jpg  …

The `webdataset` library streams these from the first byte to the last. Here every epoch has its own order over
all images, so each tar is walked once, header by header, and images are then read where they lie.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest, NotFound
from embedserve.folder import EXTENSIONS
from training.data.listing import Column, Listing, Skipped, name_column, shown
from training.data.table import as_text

__all__ = ["expand", "is_webdataset", "list_webdataset"]

MOST_TEXT = 2**20
"""Bytes of a `.json` or `.cls` member; what is larger is no label."""


def is_webdataset(path: Path) -> bool:
    """A tar, a brace pattern of tars, or a folder that holds tars and nothing else that is visible."""
    if path.is_dir():
        names = [file.name for file in path.iterdir() if not file.name.startswith(".")]
        tars = [name for name in names if name.endswith(".tar")]
        return bool(tars) and not any((path / name).is_dir() for name in names)
    return path.name.endswith(".tar") or (not path.exists() and "{" in path.name)


def list_webdataset(path: Path) -> Listing:
    """Finds the images in a tar, a folder of tars or a pattern such as `shard-{000..009}.tar`.

    The columns are `cls`, the fields of `.json` members that are text or numbers, `name`, and `folder` where
    members lie in folders. The label is `cls`, or else the field `label`.

    Raises NotFound for tars that are missing, BadRequest for one that is damaged, compressed or unreadable, or
    when there is no image in them.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [Path(one) for one in expand(str(path))]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing:
        raise NotFound(f"'{path}' stands for {len(tars):,} tars, of which are missing: {shown(missing)}.")
    found = _Found()
    for number, tar in enumerate(tars):
        modified = tar.stat().st_mtime_ns
        for sample in _samples(tar):
            found.add(tar, number, modified, sample)
    if not found.keys:
        raise BadRequest(
            f"'{path}' holds no image: {found.ignored:,} members of {len(tars):,} tars have other extensions. "
            f"Known are {', '.join(sorted(EXTENSIONS))}."
        )
    return found.listing(tars)


def expand(pattern: str) -> list[str]:
    """`a-{00..02}.tar` → three names; `{a,b}` → two. Braces may occur more than once, not inside each other."""
    parts: list[list[str]] = []
    for literal, inside in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
        if bounds:
            first, last = bounds.groups()
            width = len(first) if first.startswith("0") else 0
            parts.append([str(number).zfill(width) for number in range(int(first), int(last) + 1)])
        else:
            parts.append([literal] if literal else inside.split(","))
    return ["".join(one) for one in itertools.product(*parts)]


# ------------------------------------------------------------------------------------------- one tar


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int
    text: bytes = b""
    """The content of what may hold a label."""

    @property
    def sample(self) -> str:
        """The name up to the first dot of its last part, as WebDataset has it."""
        folder, slash, file = self.name.rpartition("/")
        return f"{folder}{slash}{file.partition('.')[0]}"

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def _members(path: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                name = info.name.removeprefix("./")
                if not info.isreg() or PurePosixPath(name).name.startswith("."):
                    continue
                text = b""
                if name.endswith((".cls", ".json")) and info.size <= MOST_TEXT:
                    member = tar.extractfile(info)
                    text = member.read() if member else b""
                yield _Member(name, info.offset_data, info.size, text)
    except OSError as error:
        raise BadRequest(f"'{path}' cannot be read: {error.strerror or error}.") from None
    except tarfile.TarError as error:
        raise BadRequest(
            f"'{path}' is no tar that images can be picked from ({error}). A compressed one has to be unpacked "
            "first; a download may have been cut short."
        ) from None


def _samples(path: Path) -> Iterator[list[_Member]]:
    for _, members in itertools.groupby(_members(path), key=lambda member: member.sample):
        yield list(members)
