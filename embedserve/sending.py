"""What the client sends: images, ids and options as JSON, paths and multipart headers."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from embedserve.answers import JsonObject
from embedserve.errors import BadRequest

__all__ = [
    "ImageInput",
    "ascii_name",
    "embed_input",
    "given",
    "image_text",
    "item_path",
    "media_type",
    "part",
    "segment",
]

ImageInput = Path | bytes | str
"""A file, an encoded image's bytes, or a string: http(s) URL, data URI or base64."""


def given(**fields: object) -> dict[str, Any]:
    """The fields that are not None: what is left out takes the server's default."""
    return {name: value for name, value in fields.items() if value is not None}


def segment(name: str) -> str:
    return quote(name, safe="")


def item_path(collection: str, what: str, id: str) -> str:
    return f"/v1/collections/{segment(collection)}/{what}/{quote(id, safe='/')}"


def image_text(image: ImageInput) -> str:
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BadRequest(f"'{error.filename}' cannot be read: {error.strerror}.", param="image") from None
    if isinstance(image, bytes):
        return base64.b64encode(image).decode("ascii")
    return image


def embed_input(one: ImageInput | JsonObject) -> JsonObject:
    if isinstance(one, Mapping):
        return part(one)
    return {"image": image_text(one)}


def part(one: JsonObject) -> JsonObject:
    return {**one, "image": image_text(one["image"])} if "image" in one else one


def media_type(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def ascii_name(name: str) -> str:
    """A file name for a multipart header; the id itself travels in the part `items`."""
    return quote(name.rpartition("/")[2], safe=" ") or "image"
