"""What an evaluation leaves behind: figures as JSON and a picture beside them, each whole or not there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

from embedserve.errors import EmbedServeError
from training.durable import replacing

__all__ = [
    "PICTURE_ONLY",
    "Progress",
    "Result",
    "figures",
    "folder_for",
    "silent",
    "write_json",
    "write_picture",
]

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

PICTURE_ONLY: Mapping[str, bool] = {"picture_only": True}
"""Metadata of a result's field that is drawn and not written as a figure."""


def silent(done: int, total: int) -> None:
    """A `Progress` that says nothing."""


class Result(Protocol):
    """What an evaluation found: a frozen dataclass of figures that can also draw and describe itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def summary(self) -> str:
        """One or two lines for people."""

    def picture(self) -> Image.Image:
        """RGB."""


def figures(result: Result) -> dict[str, Any]:
    """The figures of a result for JSON, in the order of its fields. NaN and infinity become null."""
    shown = [field for field in dataclasses.fields(result) if not field.metadata.get("picture_only")]
    return {field.name: _plain(getattr(result, field.name)) for field in shown}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return figures(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def folder_for(out: Path) -> Path:
    """The folder, made where it is missing. Raises EmbedServeError when it cannot be made or is a file."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EmbedServeError(
            f"The folder '{out}' for the results cannot be made: {error.strerror}. Give another --out."
        ) from None
    return out


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object. Raises EmbedServeError when that cannot be done."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path, needed=len(text)) as file:
        file.write(text.encode())


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a PNG. Raises EmbedServeError when that cannot be done."""
    with replacing(path) as file:
        picture.save(file, "PNG", optimize=True)
