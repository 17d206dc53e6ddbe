"""A collection's files, the vector store and the thumbnails, kept in step. Everything here blocks."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound
from embedserve.intake import Draft, is_id
from embedserve.items import IMAGE, Thumbnail
from embedserve.thumbnails import Thumbnails, ThumbnailsDamaged
from indexes import open_store
from indexes.base import (
    Filter,
    InvalidFilter,
    InvalidId,
    InvalidMetadata,
    InvalidQuery,
    InvalidVector,
    StoreCorrupt,
    StoreError,
    StoreLocked,
)

__all__ = ["STORE", "Shelf", "translate", "unknown_item"]

STORE, THUMBNAILS = "store", "thumbnails.sqlite"


class Shelf:
    """The open files of one collection. May be used from several threads at once.

    Attributes:
        store: Vectors, ids and metadata; what is not about pictures goes to it directly.
        thumbnails: The pictures.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        """Opens the files in a collection's folder, or makes them.

        Raises Conflict (open in another process), EmbedServeError with code "collection_damaged".
        """
        self.name = folder.name
        try:
            self.store = open_store(str(folder / STORE), dim)
        except (StoreError, OSError) as error:
            raise translate(error, self.name) from error
        try:
            self.thumbnails = Thumbnails(folder / THUMBNAILS)
        except ThumbnailsDamaged as error:
            self.store.close()
            raise EmbedServeError(
                f"Collection '{self.name}' is damaged: {error}", code="collection_damaged"
            ) from None

    def write(self, drafts: Sequence[Draft]) -> None:
        """Makes drafts with vectors durable. Those that the engine refuses get their `error`."""
        shows: dict[str, str | None] = {draft.id: draft.sha256 for draft in drafts}
        pictures = {draft.sha256: draft.thumbnail for draft in drafts if draft.sha256 and draft.thumbnail}
        with self.thumbnails.writing(shows):
            if pictures:
                self.thumbnails.put(pictures, [(draft.id, draft.sha256) for draft in drafts if draft.sha256])
            try:
                self._upsert(drafts)
            except (InvalidId, InvalidVector, InvalidMetadata):
                # Our checks are those of the protocol; an engine may have narrower rules, and then each item
                # has to fail alone.
                for draft in drafts:
                    try:
                        self._upsert([draft])
                    except (InvalidId, InvalidVector, InvalidMetadata) as error:
                        draft.error = translate(error, self.name)
                        shows[draft.id] = None

    def _upsert(self, drafts: Sequence[Draft]) -> None:
        self.store.upsert(
            [draft.id for draft in drafts],
            np.stack([draft.vector for draft in drafts if draft.vector is not None]),
            [draft.stored_metadata() for draft in drafts],
        )

    def delete(self, ids: Sequence[str] | None, filter: Filter | None) -> int:
        """Deletes by ids or, where they are None, by filter; returns how many items went."""
        if ids is not None:
            known = [name for name in ids if is_id(name)]
            with self.thumbnails.writing(dict.fromkeys(known)):
                return self.store.delete(known)
        self.thumbnails.sweep_soon()  # before, for the case that we are killed in between
        try:
            return self.store.delete(filter=filter)
        finally:
            self.thumbnails.sweep_soon()  # after, as one may have run meanwhile

    def shown(self, ids: Sequence[str]) -> dict[str, str]:
        """The sha256 (hex) of the picture of each of the items; those without one are left out."""
        try:
            found = self.store.get(ids)
        except StoreCorrupt:  # whoever stores a damaged item again brings its picture along
            found = {}
            for name in ids:
                with suppress(StoreCorrupt):
                    found |= self.store.get([name])
        return {name: item.metadata[IMAGE] for name, item in found.items() if IMAGE in item.metadata}

    def thumbnail(self, id: str) -> Thumbnail:
        """Raises NotFound: no such item, or one without a picture."""
        sha256 = None
        for _ in range(2):  # again, if the item got another picture after its old one was looked up
            item = self.store.get([id]).get(id) if is_id(id) else None
            if item is None:
                raise unknown_item(id)
            sha256 = item.metadata.get(IMAGE)
            data = self.thumbnails.get(sha256) if sha256 else None
            if sha256 and data:
                return Thumbnail(data, sha256)
        if sha256:
            raise NotFound(f"The thumbnail of item '{id[:80]}' is lost; upload the image again.")
        raise NotFound(f"Item '{id[:80]}' has no thumbnail; only items made from images have one.")

    def close(self) -> None:
        try:
            self.thumbnails.close()
        finally:
            self.store.close()


def unknown_item(id: str) -> NotFound:
    return NotFound(
        f"Item '{id[:80]}' is not in this collection; ids are case-sensitive, `GET …/items` lists them.",
        code="item_not_found",
    )


def translate(error: StoreError | OSError | sqlite3.Error, name: str) -> EmbedServeError:
    """What went wrong in a collection's files, as an error that the API can show."""
    params: dict[type[StoreError], str | None] = {
        InvalidFilter: "filter",
        InvalidId: "id",
        InvalidMetadata: "metadata",
        InvalidQuery: None,  # its message names the number
        InvalidVector: "vector",
    }
    for kind, param in params.items():
        if isinstance(error, kind):
            return InvalidField(_capital(str(error)), param=param)
    if isinstance(error, StoreLocked):
        return Conflict(
            f"Collection '{name}' cannot be used: {error} If that is a server, talk to it with --url.",
            code="collection_locked",
        )
    if isinstance(error, StoreCorrupt):
        return EmbedServeError(
            f"Collection '{name}' is damaged: {error} Restore its folder from a backup, or delete the "
            "collection and index its images again.",
            code="collection_damaged",
        )
    return EmbedServeError(
        f"Collection '{name}' cannot be read or written: {error}. Check the disk's free space, and that the "
        "data folder belongs to the server's user.",
        code="storage_failed",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
