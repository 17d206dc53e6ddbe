"""MNIST's files, written here and as Debian ships Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from embedserve.errors import BadRequest, InvalidField
from tests.training.data.samples import array
from training.data import native_size, open_source

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4), dtype=np.uint8)


def write(folder: Path, part: str, count: int, seed: int = 0, suffix: str = "") -> None:
    pack = gzip.compress if suffix else bytes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images(count, seed))))
    labels = (np.arange(count) % 3).astype(np.uint8)
    (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_labels_and_tests_are_read(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "train", 7, seed=0, suffix=suffix)
    write(tmp_path, "t10k", 3, seed=1, suffix=suffix)
    source = open_source(tmp_path)
    assert source.keys[:2] == ("train-images/0", "train-images/1")
    assert source.keys[7] == "t10k-images/0"
    assert source.test.tolist() == [False] * 7 + [True] * 3
    assert source.class_names == ("0", "1", "2")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2]
    assert (array(source.read(6)) == images(7)[6][:, :, None]).all()
    assert (array(source.read(9)) == images(3, seed=1)[2][:, :, None]).all()
    assert native_size(source) == 4


def test_an_unpacked_file_comes_before_the_packed_one_and_torchvisions_folder_is_found(
    tmp_path: Path,
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write(raw, "train", 5, suffix=".gz")
    write(raw, "train", 4)
    assert len(open_source(tmp_path)) == 4
    assert len(open_source(raw / "train-images-idx3-ubyte.gz")) == 5


def test_a_prefix_such_as_emnists_is_understood(tmp_path: Path) -> None:
    write(tmp_path, "emnist-letters-train", 2)
    write(tmp_path, "emnist-letters-test", 1)
    source = open_source(tmp_path)
    assert source.test.tolist() == [False, False, True]


def test_images_without_labels_have_none(tmp_path: Path) -> None:
    write(tmp_path, "train", 2)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    source = open_source(tmp_path)
    assert source.labels.tolist() == [-1, -1]
    with pytest.raises(InvalidField, match="can be told apart by: nothing"):
        open_source(tmp_path, group_by="folder")


def test_labels_can_be_groups(tmp_path: Path) -> None:
    write(tmp_path, "train", 6)
    groups = open_source(tmp_path, group_by="label").groups
    assert groups is not None
    assert groups.tolist() == [0, 1, 2, 0, 1, 2]


def test_other_pixels_are_other_content_even_with_equal_names_sizes_and_times(tmp_path: Path) -> None:
    """MNIST and Fashion-MNIST differ in nothing else; their pixels must not be taken for each other's."""
    contents = []
    for seed in (0, 1):
        write(tmp_path, "train", 4, seed)
        for file in tmp_path.iterdir():
            os.utime(file, (0, 0))
        source = open_source(tmp_path)
        contents.append((source.content, source.fingerprint))
    assert contents[0][0] != contents[1][0]
    assert contents[0][1] != contents[1][1]


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("images", idx(images(4))[:-1], r"should hold 4 × 5 × 4 bytes after its header and holds 79"),
        ("images", idx(images(4))[:9], "cut short"),
        ("images", b"<html>", r"begins with 3c 68 74 6d; .* begins with 00 00 08 03"),
        ("images", b"", "begins with ;"),
        ("labels", idx(np.zeros(3, np.uint8)), "has 3 labels for the 4 images"),
        ("images", idx(images(0)), "hold no image"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, part: str, content: bytes, message: str) -> None:
    write(tmp_path, "train", 4)
    number = 3 if part == "images" else 1
    (tmp_path / f"train-{part}-idx{number}-ubyte").write_bytes(content)
    if "hold no image" in message:
        (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(BadRequest, match=message):
        open_source(tmp_path)


def test_a_packed_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", 4, suffix=".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadRequest, match=r"images-idx3-ubyte.gz' is damaged or cut short"):
        open_source(tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_ships_it() -> None:
    source = open_source(FASHION)
    assert len(source) == 70_000
    assert source.test.sum() == 10_000
    assert np.bincount(source.labels[source.test]).tolist() == [1000] * 10
    assert np.bincount(source.labels[~source.test]).tolist() == [6000] * 10
    assert native_size(source) == 28
    boot = array(source.read(0))
    assert (source.labels[0], boot.shape, int(boot[:, :, 0].sum())) == (9, (28, 28, 3), 76247)
