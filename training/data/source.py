"""A data set as its images: a key, a label and a group for each, and its pixels on demand.

    source = open_source("photos/", group_by="name")
    image = source.read(0)

Whatever its form on disk, a data set is listed once, here; `training.data.pixels` decodes it once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from embedserve.config import Limits
from embedserve.decode import FORMATS, decode
from embedserve.errors import BadRequest, EmbedServeError, InvalidField, NotFound
from training.data.cifar import is_cifar, list_cifar
from training.data.folder import list_folder
from training.data.idx import is_idx, list_idx
from training.data.listing import Fetch, Listing, Skipped, counted, shown
from training.data.table import is_table, list_table
from training.data.webdataset import is_webdataset, list_webdataset

if TYPE_CHECKING:
    from training.captions.wording import CaptionRules

__all__ = ["LIMITS", "Source", "open_source"]

LIMITS = Limits(max_image_bytes=2**30, max_pixels=300_000_000)
"""One's own images may be larger than what a server takes from strangers."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Source:
    """N images, listed but not decoded."""

    name: str
    """For people: the path as it was given."""
    location: str
    """The same, absolute."""
    keys: tuple[str, ...]
    """One stable name per image."""
    labels: NDArray[np.int64]
    """[N], -1 where there is none."""
    class_names: tuple[str, ...] = ()
    """() without labels."""
    groups: NDArray[np.int64] | None = None
    """[N]; images with the same number belong together. None without groups."""
    test: NDArray[np.bool_]
    """[N]; True for images that the data set itself keeps for testing."""
    stamps: NDArray[np.int64]
    """[N, 2]: bytes of the image's file, and when it was modified in nanoseconds."""
    fetch: Fetch
    encoded: bool = True
    """Whether `fetch` gives the bytes of files that are to be decoded, or pixels."""
    skipped: tuple[Skipped, ...] = ()
    """What was found but cannot be used."""
    ignored: int = 0
    """Files that are no images."""
    captions: tuple[tuple[str, ...], ...] | None = None
    """[N], one or more for each image; None where nobody asked for them."""
    captions_from: Mapping[str, Any] = field(default_factory=dict)
    """Where captions came from, and how many were left out for which reason; JSON types."""

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what a run sees: keys, sizes of files, labels, groups, tests.

        Neither place nor times are in it: a copy of the data is the same data.
        """
        digest = hashlib.sha256("\0".join((*self.keys, "", *self.class_names)).encode())
        for part in (self.stamps[:, 0], self.labels, self.groups, self.test):
            digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        for texts in self.captions or ():
            digest.update("\0".join((*texts, "\0")).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """sha256 of what the pixels are made from: place, keys, sizes and times. Labels do not change it."""
        digest = hashlib.sha256("\0".join((self.location, *self.keys)).encode())
        digest.update(np.ascontiguousarray(self.stamps).tobytes())
        return digest.hexdigest()

    def select(self, rows: Rows) -> Source:
        """The images of `rows` (int64 or bool [M]), in that order. Labels and groups keep their numbers."""
        rows = np.arange(len(self))[rows]
        fetch = _Chosen(self.fetch, rows)
        if isinstance(self.fetch, _Chosen):
            fetch = _Chosen(self.fetch.fetch, self.fetch.rows[rows])
        return replace(
            self,
            keys=tuple(self.keys[row] for row in rows),
            labels=self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            test=self.test[rows],
            stamps=self.stamps[rows],
            fetch=fetch,
            captions=None if self.captions is None else tuple(self.captions[row] for row in rows),
        )

    def read(self, row: int, *, shrink_to: int | None = None) -> Image.Image:
        """One image: RGB and upright, decoded as the server does, transparency on white.

        Args:
            shrink_to: Pixels. A large JPEG may come smaller, as long as its shorter side keeps this many.

        Raises BadRequest, NotFound, UnsupportedMedia or TooLarge for an image that cannot be read.
        """
        with self._named(row):
            return to_image(self.fetch(row), shrink_to)

    @contextlib.contextmanager
    def _named(self, row: int) -> Iterator[None]:
        """Names the image in whatever goes wrong with it."""
        try:
            yield
        except FileNotFoundError:
            raise NotFound(
                f"'{self.keys[row]}' of '{self.name}' is gone; it was there when listed."
            ) from None
        except OSError as error:
            raise BadRequest(
                f"'{self.keys[row]}' of '{self.name}' cannot be read: {error.strerror or error}."
            ) from None
        except EmbedServeError as error:
            raise type(error)(f"'{self.keys[row]}' of '{self.name}': {error}") from None

    def size_of(self, row: int) -> tuple[int, int]:
        """Width and height in pixels of the upright image, from its header. Raises as `read`."""
        with self._named(row):
            return upright_size(self.fetch(row))

    def remarks(self) -> list[str]:
        """Sentences about what people may want to know before they train on this."""
        said = []
        if self.skipped:
            reasons = shown(f"{one.key}: {one.reason}" for one in self.skipped[:3])
            said.append(f"{counted(len(self.skipped), 'image')} cannot be used: {reasons}.")
        if self.ignored:
            said.append(f"Passed over {counted(self.ignored, 'file')} that cannot be an image.")
        if self.class_names:
            images = np.bincount(self.labels[self.labels >= 0], minlength=len(self.class_names))
            alone = [name for name, count in zip(self.class_names, images, strict=True) if count == 1]
            if alone:
                said.append(
                    f"A single image is all there is of {counted(len(alone), 'class')}: {shown(alone)}."
                )
        if self.groups is not None and len(np.unique(self.groups)) == len(self):
            said.append("Every group has a single image, so no image has a partner.")
        return said


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Fetches some rows of another source."""

    fetch: Fetch
    rows: Rows

    def __call__(self, row: int) -> bytes | NDArray[np.uint8]:
        return self.fetch(int(self.rows[row]))


# ------------------------------------------------------------------------------------------ one image


def to_image(data: bytes | NDArray[np.uint8], shrink_to: int | None = None) -> Image.Image:
    """What `Fetch` gives → RGB and upright. Raises as `embedserve.decode.decode`."""
    if isinstance(data, bytes):
        return decode(data, LIMITS, shrink_to=shrink_to)
    return Image.fromarray(data).convert("RGB")


def upright_size(data: bytes | NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height of what `Fetch` gives, after turning it upright, from the header alone."""
    if not isinstance(data, bytes):
        return data.shape[1], data.shape[0]
    for matches, reader in FORMATS.values():
        if matches(data):
            try:
                with reader(io.BytesIO(data)) as image:
                    width, height = image.size
                    # TIFF's reader gives the size that it has after turning.
                    turned = not isinstance(image, TiffImageFile) and image.getexif().get(
                        ExifTags.Base.Orientation, 1
                    ) in {5, 6, 7, 8}
            except Exception as error:
                raise BadRequest(f"The image's header is damaged ({error}).") from error
            return (height, width) if turned else (width, height)
    return decode(data, LIMITS).size  # says what the file is instead


# --------------------------------------------------------------------------------------- what there is

OPENERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Listing]]] = {
    "MNIST's files (train-images-idx3-ubyte, also .gz)": (is_idx, list_idx),
    "CIFAR's files (data_batch_1, train.bin)": (is_cifar, list_cifar),
    "WebDataset tars (a .tar, a folder of them, 'shard-{000..009}.tar')": (is_webdataset, list_webdataset),
    "a list with a column 'path' (.csv, .tsv, .jsonl, .parquet)": (is_table, list_table),
    "a folder of images": (Path.is_dir, list_folder),
}
"""Form → whether a path is of it, and what lists its images. The first that matches is taken."""


def open_source(
    path: Path | str, *, group_by: str = "", label_by: str = "", captions: CaptionRules | None = None
) -> Source:
    """Lists a data set.

    Args:
        path: Anything that `OPENERS` knows.
        group_by: What makes images belong together (positives of each other): "folder" (the one that holds
            the image), "name" (the file's, without a last number) or a column.
        label_by: What to take labels from, where it is not the usual: the same words.
        captions: Where captions are; images without one are then skipped. None: nobody needs them.

    Raises NotFound (no such path), BadRequest (unreadable, empty, malformed), InvalidField (unknown column).
    """
    if "://" in str(path):
        raise InvalidField(
            f"'{path}' is a URL; images are read from disks. Download them first.", param="data"
        )
    path = Path(path)
    try:
        for matches, list_images in OPENERS.values():
            if matches(path):
                listing = list_images(path)
                source = _source(path, listing, group_by, label_by)
                return source if captions is None else _with_captions(source, listing, captions)
        exists = path.exists()
    except OSError as error:
        raise BadRequest(f"'{path}' cannot be read: {error.strerror or error}.") from None
    if not exists:
        raise NotFound(f"There is no '{path}'; check its name.")
    raise BadRequest(f"'{path}' is no data set that can be read here: {'; '.join(OPENERS)}.")


def _with_captions(source: Source, listing: Listing, rules: CaptionRules) -> Source:
    from training.captions.wording import worded  # which imports what lies beside this module

    found = worded(listing, rules, source.name, (source.labels, source.class_names))
    return replace(
        source.select(found.rows),
        captions=tuple(found.captions),
        captions_from={"from": found.origin, "left_out": dict(found.left_out)},
        skipped=(*source.skipped, *found.skipped),
    )


def _source(path: Path, listing: Listing, group_by: str, label_by: str) -> Source:
    labels, class_names = listing.labels(label_by)
    test = np.zeros(len(listing.keys), bool) if listing.test is None else listing.test
    return Source(
        name=str(path),
        location=str(path.absolute()),
        keys=tuple(listing.keys),
        labels=labels,
        class_names=class_names,
        groups=listing.groups(group_by),
        test=test,
        stamps=listing.stamps,
        fetch=listing.fetch,
        encoded=listing.encoded,
        skipped=tuple(listing.skipped),
        ignored=listing.ignored,
    )
