"""WebDataset: samples in tar files, the files of a sample side by side under one name.

    shard-000.tar:  000017.jpg  000017.cls  000017.json  000018.jpg  …

The `webdataset` library streams these from the first byte to the last. Here every epoch has its own order
over all images, so each tar is walked once, header by header, and images are then read where they lie.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest, NotFound
from embedserve.folder import EXTENSIONS
from training.data.listing import Column, Listing, Skipped, counted, name_column, shown
from training.data.table import as_texts

__all__ = ["expand", "is_webdataset", "list_webdataset"]

MOST_TEXT = 2**20
"""Bytes of a `.json`, `.cls` or `.txt` member; what is larger is no label and no caption."""


def is_webdataset(path: Path) -> bool:
    """A tar, a brace pattern of tars, or a folder that holds tars but neither images nor folders."""
    if path.is_dir():
        visible = [file for file in path.iterdir() if not file.name.startswith(".")]
        if not any(file.suffix == ".tar" for file in visible):
            return False
        return not any(file.suffix.lower() in EXTENSIONS or file.is_dir() for file in visible)
    return path.name.endswith(".tar") or (not path.exists() and "{" in path.name)


def list_webdataset(path: Path) -> Listing:
    """Finds the images in a tar, a folder of tars or a pattern such as `shard-{000..009}.tar`.

    The columns are `cls`, `txt` (a caption a line), the fields of `.json` members that are text, numbers or
    lists of them, `name`, and `folder` where members lie in folders. The label is `cls`, or else the field
    `label`. A tar that is damaged gives the images before the damage and is listed as skipped.

    Raises NotFound for tars that are missing, BadRequest when there is no image in them.
    """
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [Path(one) for one in expand(str(path))]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing:
        raise NotFound(
            f"'{path}' stands for {len(tars):,} tars; {len(missing):,} are missing: {shown(missing)}."
        )
    found = _Found(tars)
    for number in range(len(tars)):
        found.walk(number)
    if not found.places:
        raise BadRequest(found.nothing(path))
    return found.listing()


def expand(pattern: str) -> list[str]:
    """`a-{00..02}.tar` → three names; `{a,b}` → two. There may be several braces, not inside each other."""
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
    """The content of what may hold a label or a caption."""

    @property
    def sample(self) -> str:
        """The name up to the first dot of its last part, as WebDataset has it."""
        folder, slash, file = self.name.rpartition("/")
        return f"{folder}{slash}{file.partition('.')[0]}"

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()


def _members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, "r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep every header in memory
            name = info.name.removeprefix("./")
            if not info.isreg() or PurePosixPath(name).name.startswith("."):
                continue
            text = b""
            if name.endswith((".cls", ".json", ".txt")) and info.size <= MOST_TEXT:
                member = tar.extractfile(info)
                text = member.read() if member else b""
            yield _Member(name, info.offset_data, info.size, text)
        # A damaged header after the first one ends the walk as if the tar ended there.
        end = tar.offset
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damage at byte {end:,}")


# ------------------------------------------------------------------------------------------- all tars


@dataclass(frozen=True, slots=True)
class _Places:
    """Fetches images from where they lie in the tars."""

    tars: Sequence[Path]
    places: NDArray[np.int64]
    """[N, 3]: tar, offset, bytes."""

    def __call__(self, row: int) -> bytes:
        tar, offset, size = (int(number) for number in self.places[row])
        with self.tars[tar].open("rb") as file:
            file.seek(offset)
            return file.read(size)


@dataclass(slots=True)
class _Found:
    """Gathers the samples of all tars."""

    tars: Sequence[Path]
    keys: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    modified: list[int] = field(default_factory=list)
    fields: list[dict[str, tuple[str, ...]]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    ignored: int = 0
    """Samples without an image."""

    def walk(self, number: int) -> None:
        tar = self.tars[number]
        try:
            modified = tar.stat().st_mtime_ns
            for _, members in itertools.groupby(_members(tar), key=lambda member: member.sample):
                self._add(number, modified, list(members))
        except OSError as error:
            self.skipped.append(Skipped(tar.name, f"cannot be read: {error.strerror or error}"))
        except tarfile.TarError as error:
            self.skipped.append(Skipped(tar.name, f"is compressed, cut short or no tar ({error})"))

    def _add(self, number: int, modified: int, members: list[_Member]) -> None:
        images = [one for one in members if PurePosixPath(one.name).suffix.lower() in EXTENSIONS]
        if not images:
            self.ignored += 1
            return
        image = min(images, key=lambda one: one.extension.count("."))  # `x.jpg` before `x.mask.png`
        self.keys.append(f"{self.tars[number].name}/{image.name}")
        self.members.append(image.name)
        self.places.append((number, image.offset, image.size))
        self.modified.append(modified)
        self.fields.append(_fields(members))

    def listing(self) -> Listing:
        places = np.array(self.places, np.int64)
        names = dict.fromkeys(name for fields in self.fields for name in fields)
        several = {name: [fields.get(name, ()) for fields in self.fields] for name in names}
        columns: dict[str, Column] = {
            name: [texts[0] if texts else None for texts in column] for name, column in several.items()
        }
        if any("/" in member for member in self.members):
            columns.setdefault("folder", [PurePosixPath(one).parent.as_posix() for one in self.members])
        columns.setdefault("name", name_column(self.members))
        return Listing(
            keys=self.keys,
            stamps=np.stack([places[:, 2], np.array(self.modified, np.int64)], axis=1),
            fetch=_Places(self.tars, places),
            columns=columns,
            several={
                name: column for name, column in several.items() if any(len(texts) > 1 for texts in column)
            },
            label=next((name for name in ("cls", "label") if name in columns), ""),
            skipped=self.skipped,
            ignored=self.ignored,
        )

    def nothing(self, path: Path) -> str:
        if self.skipped:
            reasons = shown((f"{one.key} {one.reason}" for one in self.skipped), most=3)
            return (
                f"'{path}' holds no image that can be read: {reasons}. Images are picked from anywhere in a "
                "tar, so unpack a .tar.gz to a .tar first; a download may have been cut short."
            )
        return (
            f"'{path}' holds no image, only {counted(self.ignored, 'sample')} without one. Images have the "
            f"extensions {', '.join(sorted(EXTENSIONS))}."
        )


def _fields(members: Iterable[_Member]) -> dict[str, tuple[str, ...]]:
    """What a sample's `.cls`, `.txt` and `.json` say. A damaged one says nothing."""
    fields: dict[str, tuple[str, ...]] = {}
    for member in members:
        if member.extension == "cls":
            fields["cls"] = as_texts(member.text.decode("utf-8", "replace").strip())
        elif member.extension == "txt":
            fields["txt"] = as_texts(member.text.decode("utf-8", "replace").splitlines())
        elif member.extension == "json":
            with contextlib.suppress(ValueError):
                parsed = json.loads(member.text)
                if isinstance(parsed, dict):
                    fields = {name: as_texts(value) for name, value in parsed.items()} | fields
    return fields
