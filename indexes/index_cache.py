"""The search index on disk: a cache of the database, to open without reading every vector from it.

    index/manifest.json    format, dim, the covered n, and of each segment its file and SHA-256
    index/<hash>.segment   one segment: n's, checksums, then FAISS's own bytes; never written twice

A segment's file is written whole before the manifest that names it, and the manifest changes by a rename: a
crash at any moment leaves an old or a new state, never a mix. Files that no manifest names are removed.
Nothing here is believed: the hash must fit, and the opener compares every n and checksum with the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import faiss
import numpy as np

from indexes.durable import write_durably
from indexes.faiss_index import Segment, View

__all__ = ["IndexCache", "Loaded"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was found: the segments, and every row up to `covered` that was live when they were written."""

    segments: Sequence[Segment]
    covered: int


class IndexCache:
    """The folder of segments. One thread saves at a time."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self._saved: WeakKeyDictionary[Segment, str] = WeakKeyDictionary()
        self._manifest = b""

    def exists(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def bytes(self) -> int:
        total = 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # a save may be tidying up
                total += path.stat().st_size
        return total

    def unsaved(self, view: View) -> int:
        """How many rows of the view's segments are in no file yet."""
        return sum(len(segment.ns) for segment in _segments(view) if segment not in self._saved)

    def save(self, view: View) -> None:
        """Writes what is new of the view, less its tail. Raises OSError; the old state then stands."""
        segments = _segments(view)
        for segment in segments:
            if segment not in self._saved:
                self._saved[segment] = self._write(segment)
        manifest = {
            "format": FORMAT,
            "dim": self.dim,
            "covered": int(segments[-1].ns[-1]) if segments else 0,
            "segments": [{"sha256": self._saved[segment], "rows": len(segment.ns)} for segment in segments],
        }
        text = json.dumps(manifest, indent=1).encode()
        if text != self._manifest and (segments or self.exists()):
            write_durably(self.folder / "manifest.json", [text])
            self._manifest = text
        keep = {f"{self._saved[segment]}.segment" for segment in segments} | {"manifest.json"}
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink()

    def load(self) -> Loaded | None:
        """The segments, or None where there is no cache, or one that is damaged or of another kind."""
        try:
            text = (self.folder / "manifest.json").read_bytes()
            manifest = json.loads(text)
            if manifest["format"] != FORMAT or manifest["dim"] != self.dim:
                return None
            segments = [self._read(entry["sha256"], entry["rows"]) for entry in manifest["segments"]]
            covered = int(manifest["covered"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError is FAISS's
            return None
        edges = [int(n) for segment in segments for n in (segment.ns[0], segment.ns[-1])]
        if edges != sorted(edges) or (edges and covered != edges[-1]):
            return None
        self._manifest = text
        return Loaded(segments, covered)

    def _write(self, segment: Segment) -> str:
        chunks = [
            segment.ns.astype("<i8").tobytes(),
            segment.crcs.astype("<u4").tobytes(),
            faiss.serialize_index(segment.index).tobytes(),
        ]
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        name = digest.hexdigest()
        write_durably(self.folder / f"{name}.segment", chunks)
        return name

    def _read(self, sha256: str, rows: int) -> Segment:
        data = (self.folder / f"{sha256}.segment").read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("the hash does not fit")
        ns = np.frombuffer(data, "<i8", rows).astype(np.int64)
        crcs = np.frombuffer(data, "<u4", rows, 8 * rows).astype(np.uint32)
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8, offset=12 * rows))
        if not isinstance(index, faiss.IndexScalarQuantizer) or index.d != self.dim or index.ntotal != rows:
            raise ValueError("another kind of index")
        if not rows or (np.diff(ns) <= 0).any():
            raise ValueError("numbers out of order")
        segment = Segment(ns, crcs, index)
        self._saved[segment] = sha256
        return segment


def _segments(view: View) -> list[Segment]:
    return [part.data for part in view.parts if isinstance(part.data, Segment)]
