"""MNIST's files and those made alike: Fashion-MNIST, KMNIST, EMNIST.

    train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]  t10k-images-idx3-ubyte[.gz]  …

The format (LeCun et al., "The MNIST database"): two zero bytes, the type (8: unsigned bytes), the number of
dimensions, each dimension as a big-endian 32-bit number, and the values.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest
from training.data.listing import Listing
from training.data.stacks import Stack, list_stacks

__all__ = ["is_idx", "list_idx", "read_idx"]

_IMAGES = re.compile(r"(.*?)[-.]?images[-.]idx3-ubyte(\.gz)?", re.IGNORECASE)

FOLDERS = ("", "raw", "*/raw")
"""Where a folder has them: itself, or where torchvision's downloader puts them."""


def is_idx(path: Path) -> bool:
    """A file of images in this format, or a folder that holds some."""
    if path.is_dir():
        return bool(_image_files(path))
    return bool(_IMAGES.fullmatch(path.name)) and path.is_file()


def list_idx(path: Path) -> Listing:
    """The images of a file, or of all files in a folder, with their labels where the file beside has them.

    Keys are `train-images/17`. Files named `t10k-images`, `test-images` or so after a prefix are for testing.
    Raises BadRequest for a file that is cut short, damaged or does not fit its labels.
    """
    files = _image_files(path) if path.is_dir() else {_part(path): path}
    stacks = []
    for part, file in sorted(files.items(), reverse=True):  # train before t10k
        images = read_idx(file, 3)
        labels = _labels(file, len(images))
        stacks.append(
            Stack(
                prefix=f"{part}-images" if part else "images",
                pixels=images,
                columns={} if labels is None else {"label": [str(label) for label in labels]},
                test=bool(re.search(r"(^|[-_.])(t10k|test)$", part)),
                modified=file.stat().st_mtime_ns,
            )
        )
    return list_stacks(stacks, label="label")


def _image_files(folder: Path) -> dict[str, Path]:
    """Part (`train`, `t10k`) → its file; a compressed one only where there is no other."""
    for where in FOLDERS:
        found = sorted(folder.glob(f"{where}/*" if where else "*"), reverse=True)  # `x` overwrites `x.gz`
        files = {_part(file): file for file in found if _IMAGES.fullmatch(file.name)}
        if files:
            return files
    return {}


def _part(file: Path) -> str:
    match = _IMAGES.fullmatch(file.name)
    return match[1].lower() if match else file.name


def _labels(images: Path, count: int) -> NDArray[np.uint8] | None:
    name = images.name.removesuffix(".gz")
    name = re.sub("images", "labels", name, flags=re.IGNORECASE).replace("idx3", "idx1")
    for suffix in dict.fromkeys((images.suffix if images.suffix == ".gz" else "", "", ".gz")):
        file = images.with_name(name + suffix)
        if file.exists():
            labels = read_idx(file, 1)
            if len(labels) != count:
                raise BadRequest(
                    f"'{file}' has {len(labels):,} labels for the {count:,} images of '{images}'."
                )
            return labels
    return None


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of a file of unsigned bytes. Raises BadRequest where it is not one of so many dimensions."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadRequest(f"'{file}' is damaged or cut short ({error}). Download it again.") from None
    except OSError as error:
        raise BadRequest(f"'{file}' cannot be read: {error.strerror or error}.") from None
    if data[:4] != bytes((0, 0, 8, dimensions)):
        raise BadRequest(
            f"'{file}' begins with {data[:4].hex(' ')}; an idx file of unsigned bytes with {dimensions} "
            f"dimensions begins with 00 00 08 0{dimensions}. Download it again."
        )
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4))
    if len(data) - start != math.prod(shape):
        raise BadRequest(
            f"'{file}' should hold {' × '.join(map(str, shape))} bytes after its header and holds "
            f"{max(0, len(data) - start):,}: it was cut short. Download it again."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
