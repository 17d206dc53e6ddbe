"""What comes into a collection is checked here: items on their way in, and the numbers of a search.

Each message says the value, what is allowed and the fix; `param` names the field within the item or request.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import EmbedServeError, InvalidField, TooLarge
from embedserve.items import IMAGE, KIND, MAX_TEXT_WEIGHT, Kind, NewItem
from embedserve.ranking import direction
from indexes.base import InvalidId, InvalidMetadata, InvalidVector, check_ids, check_vectors
from indexes.base import check_metadata as store_metadata

__all__ = [
    "Draft",
    "check_content",
    "check_field",
    "check_id",
    "check_metadata",
    "check_one_of",
    "check_range",
    "check_vector",
    "check_weight",
    "check_whole",
    "default_id",
    "drafts",
    "is_id",
]

Vector = NDArray[np.float32]

MAX_METADATA_BYTES = 64 * 1024
DEFAULT_ID_LENGTH = 32  # hex digits of the sha256: 128 bits, no collision among any number one can store


class Draft:
    """An item on its way in: an id, then a vector, perhaps a thumbnail, or an error.

    After the checks `image`, `text`, both or `vector` is set, and nothing if there is an `error`.
    """

    __slots__ = (
        "error",
        "id",
        "image",
        "kind",
        "metadata",
        "sha256",
        "text",
        "text_weight",
        "thumbnail",
        "vector",
    )

    def __init__(self, item: NewItem, dim: int) -> None:
        self.error: EmbedServeError | None = None
        self.id = ""
        self.kind: Kind = "vector"
        self.metadata: dict[str, Any] = {}
        self.image: bytes | None = None
        self.text: str | None = None
        self.text_weight = item.text_weight
        self.sha256: str | None = None
        self.thumbnail: bytes | None = None
        self.vector: Vector | None = None
        try:
            self._check(item, dim)
        except EmbedServeError as error:
            self.error, self.image, self.text = error, None, None

    def _check(self, item: NewItem, dim: int) -> None:
        check_content({"image": item.image, "text": item.text, "vector": item.vector})
        check_range(item.text_weight, "text_weight", 0, MAX_TEXT_WEIGHT)
        self.metadata = check_metadata(item.metadata)
        content = b""
        if item.vector is not None:
            self.vector = check_vector(item.vector, dim)
            content = self.vector.tobytes()
        if item.text is not None:
            if not item.text.strip():
                raise InvalidField("The text is empty; give at least one word.", param="text")
            self.kind, self.text = "text", item.text
            content = item.text.encode(errors="surrogatepass")
        if item.image is not None:
            self.kind, self.image = "image", item.image
            self.sha256 = hashlib.sha256(item.image).hexdigest()
            content = item.image  # and not the caption: a picture with a new one is still the same item
        self.id = default_id(content) if item.id is None else check_id(item.id)

    def take(self, result: Vector | EmbedServeError, param: str) -> None:
        """What a tower made of the image, then of the text. The first error stays."""
        if self.error is not None:
            return
        if isinstance(result, EmbedServeError):
            self.error = result.at(param)
        elif self.vector is None:
            self.vector = result
        else:
            self.vector = direction(np.stack([self.vector, result]), (1, self.text_weight))
            if self.vector is None:
                self.error = InvalidField(
                    f"The image and {self.text_weight:g} times the text cancel out, which leaves no "
                    "direction to store; change 'text_weight', or leave the text out.",
                    param="text_weight",
                )

    def stored_metadata(self) -> dict[str, Any]:
        return {**self.metadata, KIND: self.kind, **({IMAGE: self.sha256} if self.sha256 else {})}


def drafts(items: Sequence[NewItem], dim: int) -> list[Draft]:
    return [Draft(item, dim) for item in items]


def check_id(id: str, param: str = "id") -> str:
    """`id` if a store can keep it, else InvalidField."""
    try:
        check_ids([id])
    except InvalidId as error:
        raise InvalidField(str(error).replace("id 0 is", "The id is", 1), param=param) from None
    return id


def is_id(id: str) -> bool:
    """Whether an item could have this id."""
    try:
        check_ids([id])
    except InvalidId:
        return False
    return True


def check_vector(vector: object, dim: int) -> NDArray[np.float32]:
    """`vector` as float32 (dim,) of unit length, else InvalidField."""
    try:
        given = np.asarray(vector)
    except ValueError:  # lists of different lengths
        given = np.empty(0, dtype=object)
    if given.dtype.kind not in "fiu":
        raise InvalidField(f"The vector is not a list of {dim} numbers.", param="vector")
    with np.errstate(over="ignore"):  # becomes infinite, and is told so below
        array = given.astype(np.float32)
    if array.shape != (dim,):
        found = f"{array.shape[0]} numbers" if array.ndim == 1 else f"the shape {array.shape}"
        raise InvalidField(
            f"The vector has {found}; this collection holds vectors of {dim}. "
            "Send vectors that the same encoder made.",
            param="vector",
        )
    try:
        unit: NDArray[np.float32] = check_vectors(array[None], dim)[0]
    except InvalidVector as error:
        raise InvalidField(str(error).replace("vector 0", "The vector", 1), param="vector") from None
    return unit


def check_metadata(metadata: object) -> dict[str, Any]:
    """`metadata` as the JSON object it will be read back as. Raises InvalidField or TooLarge."""
    if not isinstance(metadata, Mapping):
        raise InvalidField(
            f'Metadata is {_kind_of(metadata)}; it must be an object such as {{"colour": "red"}}.',
            param="metadata",
        )
    for key in metadata:
        if not isinstance(key, str) or key[:1] in {"_", "$"}:
            raise InvalidField(
                f"Metadata key {key!r} is not allowed: keys are strings, and those that start with "
                "'_' or '$' are reserved. Rename it.",
                param="metadata",
            )
    try:
        (text,) = store_metadata([metadata], 1)
    except InvalidMetadata as error:
        raise InvalidField(str(error).replace("metadata 0", "Metadata", 1), param="metadata") from None
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise TooLarge(
            f"Metadata is {size:,} bytes as JSON; at most {MAX_METADATA_BYTES:,} are allowed. "
            "Store large values elsewhere and keep a reference.",
            param="metadata",
        )
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def check_content(given: Mapping[str, object | None]) -> None:
    """What an item's vector is to be made from, of `image`, `text` and `vector`. Raises InvalidField."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) == 1 or names == ["image", "text"]:
        return
    found = " and ".join(f"'{name}'" for name in names) or "none of them"
    raise InvalidField(
        f"The item has {found}; give 'image', 'text', 'vector', or 'image' and 'text' together.",
        param=names[-1] if names else None,
    )


def check_one_of(given: Mapping[str, object | None], what: str) -> str:
    """The one key of `given` whose value is not None, else InvalidField."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) == 1:
        return names[0]
    allowed = ", ".join(f"'{name}'" for name in given)
    found = " and ".join(f"'{name}'" for name in names) or "none of them"
    raise InvalidField(
        f"{what} has {found}; give exactly one of {allowed}.", param=names[1] if names else None
    )


def check_range(value: float, param: str, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise InvalidField(f"'{param}' is {value!r}; it must be a number from {low} to {high}.", param=param)


def check_whole(value: int, param: str, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InvalidField(
            f"'{param}' is {value!r}; it must be a whole number from 1 to {high}.", param=param
        )


def check_weight(value: float, param: str) -> float:
    if not _is_number(value):
        raise InvalidField(f"'{param}' is {value!r}; it must be a finite number.", param=param)
    return float(value)


def check_field(field: str, param: str) -> None:
    """The name of a metadata field, to group or vote by."""
    if not isinstance(field, str) or not field or field.startswith("$"):
        raise InvalidField(
            f"'{param}' is {field!r}; it must name a metadata field, such as 'category'.", param=param
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def default_id(content: bytes) -> str:
    """The id of an item that was given none: the same content, written twice, is one item."""
    return hashlib.sha256(content).hexdigest()[:DEFAULT_ID_LENGTH]


def _kind_of(value: object) -> str:
    names = {str: "a string", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
