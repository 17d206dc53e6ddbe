"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the Python and in the binary version.

    cifar-10-batches-py:  data_batch_1 … 5, test_batch, batches.meta          (pickled dictionaries)
    cifar-10-batches-bin: data_batch_1.bin … 5, test_batch.bin, batches.meta.txt
    cifar-100-python:     train, test, meta                                   (pickled dictionaries)
    cifar-100-binary:     train.bin, test.bin, fine_label_names.txt, coarse_label_names.txt

A pickle can run any code when it is loaded. These are loaded by a reader that knows arrays, text and numbers
and refuses everything else.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest
from training.data.listing import Column, Listing
from training.data.stacks import Stack, list_stacks

__all__ = ["is_cifar", "list_cifar", "unpickle"]

SIDE = 32
PIXELS = 3 * SIDE * SIDE
TEN = tuple(f"data_batch_{number}" for number in range(1, 6))


@dataclass(frozen=True, slots=True)
class _Version:
    """One of the four ways these data sets are published."""

    files: Mapping[str, bool]
    """Name → whether it is for testing."""
    labels: Mapping[str, tuple[str, str]]
    """Column → what holds its numbers in the pickle, and where the names of the classes are: a key of the
    pickle `meta`, or a text file. The last column is the usual label."""
    meta: str = ""
    """The pickle with the names; "" in the binary versions."""

    @property
    def binary(self) -> bool:
        return not self.meta


VERSIONS: dict[str, _Version] = {
    "cifar-10-batches-py": _Version(
        {**dict.fromkeys(TEN, False), "test_batch": True},
        {"label": ("labels", "label_names")},
        "batches.meta",
    ),
    "cifar-10-batches-bin": _Version(
        {**{f"{name}.bin": False for name in TEN}, "test_batch.bin": True},
        {"label": ("", "batches.meta.txt")},
    ),
    "cifar-100-python": _Version(
        {"train": False, "test": True},
        {"coarse": ("coarse_labels", "coarse_label_names"), "fine": ("fine_labels", "fine_label_names")},
        "meta",
    ),
    "cifar-100-binary": _Version(
        {"train.bin": False, "test.bin": True},
        {"coarse": ("", "coarse_label_names.txt"), "fine": ("", "fine_label_names.txt")},
    ),
}
"""The folder an archive unpacks to → what is in it. The names of the files tell them apart."""


def is_cifar(path: Path) -> bool:
    """A folder with files of one version, or the folder above it."""
    return _find(path) is not None


def list_cifar(path: Path) -> Listing:
    """The images of those files that are there, with keys such as `data_batch_1/17`.

    The columns are `label`, or `fine` (the usual label) and `coarse`. Raises BadRequest for a file that is
    cut short, damaged, or a pickle of anything but arrays, text and numbers.
    """
    found = _find(path)
    if found is None:
        raise BadRequest(f"'{path}' holds no CIFAR files.")
    folder, version = found
    names = {column: _names(folder, version, column) for column in version.labels}
    read = _read_binary if version.binary else _read_pickle
    stacks = [
        read(folder / name, version, names, test)
        for name, test in version.files.items()
        if (folder / name).is_file()
    ]
    usual = list(version.labels)[-1]
    return list_stacks(stacks, label=usual, class_names=names[usual])


def _find(path: Path) -> tuple[Path, _Version] | None:
    if not path.is_dir():
        return None
    for name, version in VERSIONS.items():
        for folder in (path, path / name):
            there = [folder / file for file in version.files if (folder / file).is_file()]
            if there and (version.meta == "" or all(_is_pickle(file) for file in there)):
                return folder, version
    return None


def _is_pickle(file: Path) -> bool:
    """Protocol 2 and later begin with their number; files called `train` may be anything."""
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
    except OSError:
        return False
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= pickle.HIGHEST_PROTOCOL


# ------------------------------------------------------------------------------------------- readers


def _names(folder: Path, version: _Version, column: str) -> tuple[str, ...]:
    """The names of the classes by number; () where their file is missing."""
    _, where = version.labels[column]
    file = folder / (version.meta or where)
    if not file.is_file():
        return ()
    if version.binary:
        return tuple(file.read_text("utf-8").split())
    return tuple(str(name) for name in _list(unpickle(file), where, file))


def _read_pickle(file: Path, version: _Version, names: Mapping[str, Sequence[str]], test: bool) -> Stack:
    content = unpickle(file)
    flat = content.get("data") if isinstance(content, dict) else None
    if (
        not isinstance(flat, np.ndarray)
        or flat.dtype != np.uint8
        or flat.ndim != 2
        or flat.shape[1] != PIXELS
    ):
        raise BadRequest(f"'{file}' has no 'data' of {PIXELS:,} bytes an image. Download it again.")
    labels = {column: _list(content, key, file) for column, (key, _) in version.labels.items()}
    return _stack(file, flat, labels, names, test)


def _read_binary(file: Path, version: _Version, names: Mapping[str, Sequence[str]], test: bool) -> Stack:
    record = len(version.labels) + PIXELS
    flat = np.fromfile(file, np.uint8)
    if len(flat) % record:
        raise BadRequest(
            f"'{file}' has {len(flat):,} bytes, which are no whole number of images of {record:,} bytes: it "
            "was cut short. Download it again."
        )
    flat = flat.reshape(-1, record)
    labels = {column: flat[:, place].tolist() for place, column in enumerate(version.labels)}
    return _stack(file, flat[:, len(version.labels) :], labels, names, test)


def _stack(
    file: Path,
    flat: NDArray[np.uint8],
    labels: Mapping[str, Sequence[Any]],
    names: Mapping[str, Sequence[str]],
    test: bool,
) -> Stack:
    """Pixels come as three planes per image, red first."""
    pixels = flat.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    columns: dict[str, Column] = {}
    for column, numbers in labels.items():
        known = names[column]
        if len(numbers) != len(pixels):
            raise BadRequest(f"'{file}' has {len(numbers):,} labels for {len(pixels):,} images.")
        classes = range(len(known) or 256)
        if not all(isinstance(number, int) and number in classes for number in numbers):
            raise BadRequest(f"'{file}' has a label that is none of the {len(classes)} classes.")
        columns[column] = [known[number] if known else str(number) for number in numbers]
    return Stack(
        prefix=file.name.removesuffix(".bin"),
        pixels=np.ascontiguousarray(pixels),
        columns=columns,
        test=test,
        modified=file.stat().st_mtime_ns,
    )


# ------------------------------------------------------------------------------------------- pickles


def unpickle(file: Path) -> Any:
    """Loads a pickle of arrays, text, numbers, lists and dictionaries. BadRequest for any other, without
    running what it asks for."""
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except OSError as error:
        raise BadRequest(f"'{file}' cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # noqa: BLE001 -- a damaged pickle may raise anything
        raise BadRequest(f"'{file}' is damaged, or no file of CIFAR ({error}). Download it again.") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which only other pickles do"
            ) from None


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}")
    return codecs.latin_1_encode(text)[0]


def _reconstruct(_: type, shape: tuple[int, ...], kind: bytes) -> NDArray[Any]:
    """An empty plain array, whatever kind of array the pickle names; the pickle then fills it."""
    return np.ndarray(shape, dtype=kind.decode("ascii"))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


def _list(content: Any, key: str, file: Path) -> Sequence[Any]:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, list):
        raise BadRequest(f"'{file}' has no list '{key}'. Download it again.")
    return value
