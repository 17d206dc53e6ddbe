"""A folder of pictures on disk: which files it holds, what they are called, and what is known about them."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from embedserve.errors import BadRequest, InvalidField, NotFound

__all__ = ["CAPTION_COLUMN", "FileFound", "Problem", "Walk", "looks_like_image", "read_sidecar", "walk"]

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".avif", ".heic", ".heif"}  # where Pillow cannot read one, the report says so
)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
BOXES = (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1")
CAPTION_COLUMN = "caption_column"
OWN_KEYS = frozenset({"path", "folder", "bytes", "modified", CAPTION_COLUMN})


@dataclass(frozen=True, slots=True)
class FileFound:
    """One file to index. `id` is its path below the folder, with slashes, in Unicode NFC."""

    id: str
    path: Path
    size: int
    modified: str
    """ISO 8601, UTC."""

    def metadata(self) -> dict[str, Any]:
        parent = PurePosixPath(self.id).parent.as_posix()
        return {
            "path": self.id,
            "folder": "" if parent == "." else parent,
            "bytes": self.size,
            "modified": self.modified,
        }


@dataclass(frozen=True, slots=True)
class Problem:
    """One file that could not be indexed, and why."""

    path: str
    reason: str


@dataclass(slots=True)
class Walk:
    """What lies below a folder: `files` in id order, `problems`, and the number of other files."""

    files: list[FileFound] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Folders (as id prefixes, with the final slash) that could not be listed: what they hold is unknown."""
    ignored: int = 0


def walk(folder: Path) -> Walk:
    """Finds the images below `folder`, in an order that never changes.

    Hidden files and folders are passed over. Links are followed, each folder is entered once, its real place
    before any link to it, so loops end. A file without extension counts if it begins as an image does.

    Raises NotFound or BadRequest when `folder` itself cannot be listed.
    """
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        raise NotFound(f"There is no folder '{folder}'; check its name.") from None
    except OSError as error:
        raise BadRequest(f"'{folder}' cannot be listed: {error.strerror}.") from None
    found = Walk()
    entered: set[tuple[int, int]] = set()
    links: list[tuple[Path, str]] = [(folder, "")]
    while links:  # links found on the way wait until all real folders have been entered
        waiting = sorted(links, key=lambda link: link[1])
        links = []
        for path, prefix in waiting:
            links += _enter(path, prefix, found, entered)
    found.files.sort(key=lambda file: file.id)
    found.problems.sort(key=lambda problem: problem.path)
    return _without_twins(found)


def _enter(top: Path, top_prefix: str, found: Walk, entered: set[tuple[int, int]]) -> list[tuple[Path, str]]:
    """Walks real folders from `top` down; returns the linked folders, for later."""
    links: list[tuple[Path, str]] = []
    stack = [(top, top_prefix)]
    while stack:
        path, prefix = stack.pop()
        try:
            about = path.stat()
            key = (about.st_dev, about.st_ino)
            if key in entered:
                continue
            entered.add(key)
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(Problem(_shown(prefix), f"folder cannot be listed: {error.strerror}"))
            found.unreadable.append(prefix)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            name = prefix + unicodedata.normalize("NFC", entry.name)
            try:
                if entry.is_dir(follow_symlinks=False):
                    stack.append((Path(entry.path), name + "/"))
                elif entry.is_dir():
                    links.append((Path(entry.path), name + "/"))
                else:
                    _look_at(entry, name, found)
            except OSError as error:
                found.problems.append(Problem(_shown(name), f"cannot be read: {error.strerror}"))
    return links


def _look_at(entry: os.DirEntry[str], name: str, found: Walk) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix and suffix not in EXTENSIONS:
        found.ignored += 1
        return
    about = entry.stat()
    if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
        found.ignored += 1
        return
    path = Path(entry.path)
    if not suffix and not looks_like_image(path):
        found.ignored += 1
        return
    if name != _shown(name):
        found.problems.append(Problem(_shown(name), "the file's name is not valid UTF-8; rename it"))
        return
    modified = datetime.fromtimestamp(about.st_mtime_ns // 1000 / 1e6, UTC)
    found.files.append(FileFound(name, path, about.st_size, modified.isoformat().replace("+00:00", "Z")))


def _without_twins(found: Walk) -> Walk:
    """Names that differ in nothing but their Unicode form would overwrite each other."""
    kept: list[FileFound] = []
    for file in found.files:
        if kept and kept[-1].id == file.id:
            found.problems.append(
                Problem(file.id, "another file has this name in another Unicode form; rename one")
            )
        else:
            kept.append(file)
    found.files = kept
    return found


def _shown(name: str) -> str:
    """`name` without what UTF-8 cannot carry (file names on Unix are bytes)."""
    return name.encode("utf-8", "backslashreplace").decode() or "."


def looks_like_image(path: Path) -> bool:
    """Whether the first bytes are those of an image format we read."""
    with path.open("rb") as file:
        start = file.read(16)
    return start.startswith(MAGIC) or start[4:12] in BOXES or (start[:4] + start[8:12]) == b"RIFFWEBP"


def read_sidecar(path: Path) -> dict[str, dict[str, Any]]:
    """Metadata by id from a CSV (with a header) or JSONL file that has a `path` column.

    Cells of a CSV column that are all numbers become numbers; empty cells are left out.

    Raises BadRequest (unreadable, malformed) or InvalidField (no `path`, a reserved name).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadRequest(f"--metadata '{path}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadRequest(f"--metadata '{path}' is not UTF-8 text; save it as UTF-8.") from None
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    rows = list(_json_rows(path, text)) if lines else _csv_rows(path, text)
    known: dict[str, dict[str, Any]] = {}
    for number, row in rows:
        name = row.get("path")
        if not isinstance(name, str) or not name:
            raise InvalidField(
                f"--metadata '{path}', line {number}: 'path' is missing; give the path below the folder."
            )
        fields = {key: value for key, value in row.items() if key != "path"}
        for key in fields:
            if key in OWN_KEYS or key.startswith(("_", "$")):
                raise InvalidField(
                    f"--metadata '{path}': the name '{key}' is reserved; rename the column "
                    f"(reserved: {', '.join(sorted(OWN_KEYS))}, and names that start with _ or $)."
                )
        clean = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))).as_posix()
        known[clean] = fields
    return known


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadRequest(f"--metadata '{path}', line {number} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise BadRequest(f"--metadata '{path}', line {number} is not a JSON object.")
            yield number, row


def _csv_rows(path: Path, text: str) -> list[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="", restval="")
    if "path" not in (reader.fieldnames or ()):
        raise InvalidField(
            f"--metadata '{path}' has the columns {reader.fieldnames}; one must be called 'path'. "
            "Files ending in .jsonl are read as JSON lines."
        )
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        for row in reader:
            if row.pop("", None):
                raise BadRequest(
                    f"--metadata '{path}', line {reader.line_num} has more cells than the header."
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise BadRequest(f"--metadata '{path}', line {reader.line_num}: {error}.") from None
    numeric = {
        name
        for name in reader.fieldnames or ()
        if name != "path" and _all_numbers(row[name] for _, row in rows if row[name])
    }
    return [
        (number, {name: _number(cell) if name in numeric else cell for name, cell in row.items() if cell})
        for number, row in rows
    ]


def _all_numbers(cells: Iterable[str]) -> bool:
    return all(_number(cell) is not None for cell in cells)


def _number(cell: str) -> int | float | None:
    """The number a cell holds, as JSON writes numbers: '007' and 'nan' are words."""
    try:
        value = json.loads(cell, parse_constant=lambda _: None)
    except ValueError:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
