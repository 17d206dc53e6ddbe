"""A list of image files with columns: CSV, TSV, JSON lines or Parquet.

    path,label,group,split
    shoes/17.jpg,boot,model-4,train

`path` is relative to the list. `label`, `group` and `split` are used where they are there; any column can be
asked for by `label_by` and `group_by`. An image has several captions where its path comes several times, each
time with another caption, or where a cell of JSON or Parquet is a list of texts.
"""

from __future__ import annotations

import csv
import io
import json
import math
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest, EmbedServeError, InvalidField, NotFound
from training.data.listing import Column, Files, Listing, Skipped, is_test, name_column, shown

__all__ = ["is_table", "list_table"]

Cell = str | tuple[str, ...] | None
"""A text, several of them, or nothing."""

Table = dict[str, Sequence[Cell]]


def is_table(path: Path) -> bool:
    return path.suffix.lower() in READERS and path.is_file()


def list_table(path: Path) -> Listing:
    """Reads the list and looks for its files.

    A file that is missing or listed twice is skipped; NotFound when there is none at all. Raises BadRequest
    for a list that cannot be read or has no rows, InvalidField without `path` or for an unknown `split`.
    """
    try:
        table = READERS[path.suffix.lower()](path)
    except OSError as error:
        raise BadRequest(f"'{path}' cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise BadRequest(f"'{path}' is not UTF-8 text; save it as UTF-8.") from None
    if "path" not in table:
        raise InvalidField(
            f"'{path}' has the columns {shown(table, most=20)}; one must be called 'path' and hold the paths "
            "of the images, relative to this file."
        )
    if not table["path"]:
        raise BadRequest(f"'{path}' has no rows; give one per image.")
    found = _look_up(path, [_first(cell) for cell in table["path"]])
    rows = [own[0] for own in found.rows]
    keys = [str(_first(table["path"][row])) for row in rows]
    cells = {name: column for name, column in table.items() if name != "path"}
    columns = {name: [_first(column[row]) for row in rows] for name, column in cells.items()}
    several = {name: _all_texts(column, found.rows) for name, column in cells.items()}
    several = {name: texts for name, texts in several.items() if any(len(one) > 1 for one in texts)}
    test = _tests(path, columns["split"]) if "split" in columns else None
    columns.setdefault("folder", [PurePosixPath(key).parent.as_posix() for key in keys])
    columns.setdefault("name", name_column(keys))
    return Listing(
        keys=keys,
        stamps=np.array(found.stamps, np.int64),
        fetch=Files(found.files),
        columns=columns,
        several=several,
        label="label" if "label" in columns else "",
        group="group" if "group" in columns else "",
        test=test,
        skipped=[*found.skipped, *_repeated(found, keys, cells)],
    )


def _first(cell: Cell) -> str | None:
    return cell[0] if isinstance(cell, tuple) else cell


def _all_texts(column: Sequence[Cell], rows: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
    """The different texts of each image, in the order of its rows."""
    return [
        tuple(dict.fromkeys(text for row in own for text in _texts(column[row])))
        if len(own) > 1
        else _texts(column[own[0]])
        for own in rows
    ]


def _texts(cell: Cell) -> tuple[str, ...]:
    return cell if isinstance(cell, tuple) else () if cell is None else (cell,)


def _repeated(found: _Found, keys: Sequence[str], cells: Table) -> list[Skipped]:
    """Rows that list an image again and do not add a text, such as another caption, in any column."""
    return [
        Skipped(key, f"listed again in row {row + 1}; the first one counts")
        for key, own in zip(keys, found.rows, strict=True)
        for row in own[1:]
        if all(
            set(_texts(column[row]))
            <= {text for other in own if other < row for text in _texts(column[other])}
            for name, column in cells.items()
            if name not in {"label", "group", "split"}
        )
    ]


@dataclass(slots=True)
class _Found:
    """The images of a list whose files are there."""

    rows: list[list[int]] = field(default_factory=list)
    """The rows of each; more than one where its path is repeated."""
    files: list[Path] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def _look_up(table: Path, paths: Column) -> _Found:
    """Which rows have a file, the file, its stamp; and the other rows."""
    found = _Found()
    skipped = found.skipped
    seen: dict[str, list[int]] = {}
    for row, name in enumerate(paths):
        if not name:
            skipped.append(Skipped(f"row {row + 1}", "its 'path' is empty"))
            continue
        if name in seen:
            seen[name].append(row)
            continue
        seen[name] = [row]
        file = table.parent / name
        try:
            about = file.stat()
        except (OSError, ValueError) as error:  # ValueError: a null byte
            reason = error.strerror if isinstance(error, OSError) else str(error)
            skipped.append(Skipped(name, f"cannot be found: {reason}"))
            continue
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
            skipped.append(Skipped(name, "is not a file"))
            continue
        found.rows.append(seen[name])
        found.files.append(file)
        found.stamps.append((about.st_size, about.st_mtime_ns))
    if not found.rows:
        raise NotFound(
            f"None of the {len(paths):,} images that '{table}' lists can be found below '{table.parent}': "
            f"{shown((f'{one.key}: {one.reason}' for one in skipped), most=3)}. "
            "Paths are relative to the list, or absolute."
        )
    return found


def _tests(path: Path, words: Column) -> NDArray[np.bool_]:
    meaning = {word: False if word is None else is_test(word) for word in set(words)}
    unknown = [word for word, test in meaning.items() if word is not None and test is None]
    if unknown:
        raise InvalidField(
            f"'{path}' has {shown(sorted(unknown))} in the column 'split'; allowed are 'train', 'val' and "
            "'test' (or nothing, for train).",
            param="split",
        )
    return np.array([meaning[word] for word in words], bool)


# -------------------------------------------------------------------------------------------- readers


def _read_csv(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = []
        for row in reader:
            if len(row) > len(header):
                raise BadRequest(
                    f"'{path}', line {reader.line_num} has {len(row)} cells, the header has {len(header)}."
                )
            if row:
                rows.append(row + [""] * (len(header) - len(row)))
    except csv.Error as error:
        raise BadRequest(f"'{path}', line {reader.line_num}: {error}.") from None
    return {name: [row[place] or None for row in rows] for place, name in enumerate(header)}


def _delimiter(path: Path, text: str) -> str:
    """Spreadsheets write `;` where the comma is the decimal sign."""
    header = text.partition("\n")[0]
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)


def _read_jsonl(path: Path) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRequest(f"'{path}', line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise BadRequest(f"'{path}', line {number} is not a JSON object.")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_as_cell(row.get(name)) for row in rows] for name in names}


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EmbedServeError(
            f"'{path}' is Parquet, which needs pyarrow: pip install 'embedserve[train]'. "
            "CSV, TSV and JSON lines need nothing more."
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise BadRequest(f"'{path}' cannot be read as Parquet: {str(error).splitlines()[0]}.") from None
    columns = zip(table.column_names, table.columns, strict=True)
    return {name: [_as_cell(value) for value in column.to_pylist()] for name, column in columns}


def _as_cell(value: object) -> Cell:
    return as_texts(value) or None if isinstance(value, list) else as_text(value)


def as_texts(value: object) -> tuple[str, ...]:
    """The texts of a list or of a single value, without what is empty or nested."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in map(as_text, values) if text is not None)


def as_text(value: object) -> str | None:
    """A cell as text: None for what is empty, no finite number or nested; 3.0 is 3."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value) if math.isfinite(value) else None
    if isinstance(value, str | int):
        return str(value) or None
    return None


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
