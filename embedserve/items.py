"""What goes into a collection and what comes out of it: plain frozen values.

`embedserve.collections` re-exports those that callers need; import them from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IMAGE",
    "KIND",
    "MAX_TEXT_WEIGHT",
    "TEXT_WEIGHT",
    "CollectionInfo",
    "DuplicateGroup",
    "Duplicates",
    "Hit",
    "Kind",
    "Neighbour",
    "NewItem",
    "Part",
    "Stored",
    "StoredItem",
    "Thumbnail",
    "hit_of",
    "item_of",
]

Kind = Literal["image", "text", "vector"]
"""What an item's vector was made from; with a caption, an image is still an image."""

TEXT_WEIGHT, MAX_TEXT_WEIGHT = 0.5, 10.0
"""What a caption counts beside its image, as `benchmarks.demo_quality` weighed it, and the most allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewItem:
    """One item to write. Its vector comes from `image`, `text`, `vector`, or `image` and `text` together.

    An image with a text is found by its caption as well as by its looks: its vector is the direction of
    image + `text_weight` · text (unit vectors). The text is only embedded; to have it back, put it into the
    metadata as well.
    """

    id: str | None = None
    """1 to 1024 bytes of UTF-8; None takes the first 32 hex digits of the sha256 of the image, else of the
    text or the vector."""
    image: bytes | None = field(default=None, repr=False)
    """An encoded picture (JPEG, PNG, …)."""
    text: str | None = field(default=None, repr=False)
    text_weight: float = TEXT_WEIGHT
    """0 to 10: how much the text counts beside the image's 1. Alone, an image or a text counts fully."""
    vector: Sequence[float] | NDArray[np.float32] | None = field(default=None, repr=False)
    """`dim` finite numbers of any length but zero; stored at unit length."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """A JSON object of at most 64 KiB; keys that start with `_` or `$` are reserved."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The good outcome of one `NewItem`: it is durable."""

    id: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item as stored, without the reserved metadata keys."""

    id: str
    kind: Kind
    metadata: Mapping[str, Any]
    image_sha256: str | None = None
    """sha256 (hex) of the source image's bytes; None when the item was made from a text or a vector."""
    vector: NDArray[np.float32] | None = field(default=None, repr=False)
    """float32 (dim,), unit length; only when asked for."""

    @property
    def has_thumbnail(self) -> bool:
        return self.image_sha256 is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a query. Exactly one of `image`, `text`, `id` and `vector` is given."""

    image: bytes | None = field(default=None, repr=False)
    text: str | None = None
    id: str | None = None
    """An item of the collection; it is left out of the hits."""
    vector: Sequence[float] | NDArray[np.float32] | None = field(default=None, repr=False)
    weight: float = 1.0
    """Negative weights push away: "like this picture, but not red"."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a search."""

    id: str
    score: float
    """Cosine similarity with the query, -1 to 1; higher is more alike."""
    kind: Kind
    metadata: Mapping[str, Any]
    image_sha256: str | None = None
    vector: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def has_thumbnail(self) -> bool:
        return self.image_sha256 is not None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A labelled neighbour, for a k-NN vote. `labels` holds the field's value, or each element of a list."""

    id: str
    score: float
    labels: tuple[str | int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """Items that are nearly the same, by single linkage: each is within the threshold of *some* other."""

    ids: tuple[str, ...]
    """In code point order."""
    similarity: float
    """Every member has another one at least this alike (cosine)."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Near-duplicate groups, the largest first, then the most alike."""

    groups: tuple[DuplicateGroup, ...]
    """At most `limit` of them."""
    total_groups: int
    total_items: int
    """Items in all groups, those beyond `limit` included."""
    scanned: int
    """Items compared."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A WebP picture. `sha256` is that of the source image, and serves as an ETag."""

    data: bytes = field(repr=False)
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionInfo:
    """What `describe` and the list say about a collection."""

    name: str
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The collection's own, as given to `create`."""
    items: int | None = None
    """None when the collection cannot be used; `problem` says why."""
    dim: int | None = None
    encoder: str | None = None
    fingerprint: str | None = None
    """sha256 (hex) of what decides the encoder's vectors."""
    created: datetime | None = None
    bytes: int = 0
    """On disk: vectors, metadata, index and thumbnails."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """The store's own statistics."""
    problem: str | None = None
    """Why the collection cannot be used, and what to do; None when it can."""


# --- from what is stored --------------------------------------------------------------------------------

KIND, IMAGE = "_kind", "_image"
"""The reserved metadata keys: what made the vector, and the sha256 (hex) of the source image."""


def item_of(id: str, metadata: Mapping[str, Any], vector: NDArray[np.float32] | None = None) -> StoredItem:
    """A store's item without the reserved keys."""
    return StoredItem(id, metadata.get(KIND, "vector"), _own(metadata), metadata.get(IMAGE), vector)


def hit_of(
    id: str, score: float, metadata: Mapping[str, Any], vector: NDArray[np.float32] | None = None
) -> Hit:
    """A store's hit without the reserved keys."""
    return Hit(id, score, metadata.get(KIND, "vector"), _own(metadata), metadata.get(IMAGE), vector)


def _own(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if not key.startswith("_")}
