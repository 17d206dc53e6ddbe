"""CIFAR's four versions, written here as they are published; and pickles that are something else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedserve.errors import BadRequest
from tests.training.data.samples import array, folder_of
from training.data import open_source
from training.data.cifar import unpickle

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def flat(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def upright(row: np.ndarray) -> np.ndarray:
    """Three planes, red first, row after row, as CIFAR's page says."""
    image = np.empty((32, 32, 3), np.uint8)
    for channel in range(3):
        image[:, :, channel] = row[channel * 1024 : (channel + 1) * 1024].reshape(32, 32)
    return image


def dump(file: Path, content: Any, protocol: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_10_for_python(tmp_path: Path, protocol: int) -> None:
    for batch in (1, 2):
        content = {"data": flat(3, batch), "labels": [2, 0, 9], "batch_label": "b", "filenames": ["a"] * 3}
        dump(tmp_path / f"data_batch_{batch}", content, protocol)
    dump(tmp_path / "test_batch", {"data": flat(2, 5), "labels": [1, 3]}, protocol)
    dump(tmp_path / "batches.meta", {"label_names": TEN, "num_vis": 3072}, protocol)
    source = open_source(tmp_path)
    assert source.class_names == tuple(TEN)
    assert source.labels.tolist() == [2, 0, 9, 2, 0, 9, 1, 3]
    assert source.test.tolist() == [False] * 6 + [True] * 2
    assert source.keys[4] == "data_batch_2/1"
    assert (array(source.read(4)) == upright(flat(3, 2)[1])).all()


def test_text_of_python_2_is_understood(tmp_path: Path) -> None:
    """The published files: opcodes for byte strings, and the names of numpy's modules of that time."""
    data = flat(1)
    written = pickle.dumps({"data": data, "labels": [7]}, 2)
    written = written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    written = written.replace(b"X\x04\x00\x00\x00data", b"U\x04data")
    written = written.replace(b"X\x06\x00\x00\x00labels", b"U\x06labels")
    assert b"numpy._core" not in written
    (tmp_path / "data_batch_1").write_bytes(written)
    source = open_source(tmp_path)
    assert source.class_names == ("7",)
    assert (array(source.read(0)) == upright(data[0])).all()


def test_cifar_10_binary(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels = flat(4)
    labels = np.array([[3], [0], [9], [3]], np.uint8)
    (folder / "data_batch_1.bin").write_bytes(np.hstack([labels, pixels]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    source = open_source(tmp_path)  # the folder above
    assert source.class_names == tuple(TEN)
    assert source.labels.tolist() == [3, 0, 9, 3]
    assert (array(source.read(2)) == upright(pixels[2])).all()


def test_cifar_100_for_python_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    content = {"data": flat(3), "fine_labels": [0, 99, 5], "coarse_labels": [4, 1, 4]}
    dump(tmp_path / "train", content)
    dump(tmp_path / "test", content)
    names = {
        "fine_label_names": [f"f{number}" for number in range(100)],
        "coarse_label_names": [f"c{number}" for number in range(20)],
    }
    dump(tmp_path / "meta", names)
    source = open_source(tmp_path, group_by="coarse")
    assert source.labels.tolist() == [0, 99, 5, 0, 99, 5]
    assert source.class_names == tuple(names["fine_label_names"])
    assert source.groups is not None
    assert source.groups.tolist() == [0, 1, 0, 0, 1, 0]
    assert open_source(tmp_path, label_by="coarse").class_names == ("c1", "c4")


def test_cifar_100_binary_has_the_coarse_label_first(tmp_path: Path) -> None:
    pixels = flat(2)
    labels = np.array([[4, 0], [1, 99]], np.uint8)
    (tmp_path / "train.bin").write_bytes(np.hstack([labels, pixels]).tobytes())
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"f{number}" for number in range(100)))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [0, 99]
    assert (array(source.read(1)) == upright(pixels[1])).all()
    assert open_source(tmp_path, label_by="coarse").class_names == ("1", "4")


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


class Evaluates:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    for number, harmful in enumerate((Runs(mark), Evaluates(), {"data": Runs(mark), "labels": []})):
        dump(tmp_path / f"{number}" / "data_batch_1", harmful)
        with pytest.raises(BadRequest, match=r"asks for (posix.system|__builtin__.eval)"):
            open_source(tmp_path / f"{number}")
    assert not mark.exists()


@pytest.mark.parametrize(
    "written",
    [
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tU\x01btR.",
        b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__reduce\x93.",
        b"\x80\x02cnumpy\nload\n(X\x01\x00\x00\x00atR.",
        b"\x80\x02",
        b"\x80\x02K\x01",
    ],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "data_batch_1").write_bytes(written)
    with pytest.raises(BadRequest, match="damaged, or no file of CIFAR"):
        unpickle(tmp_path / "data_batch_1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "has no 'data'"),
        ({"data": flat(2)[:, :100], "labels": [0, 1]}, "has no 'data'"),
        ({"data": flat(2).astype(np.float64), "labels": [0, 1]}, "has no 'data'"),
        ({"data": flat(2)}, "has no list 'labels'"),
        ({"data": flat(2), "labels": [0]}, "has 1 labels for 2 images"),
        ({"data": flat(2), "labels": [0, 10]}, "none of the 10 classes"),
        ({"data": flat(2), "labels": [0, -1]}, "none of the 10 classes"),
        ({"data": flat(2), "labels": [0, "x"]}, "none of the 10 classes"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    dump(tmp_path / "batches.meta", {"label_names": TEN})
    dump(tmp_path / "data_batch_1", content)
    with pytest.raises(BadRequest, match=message):
        open_source(tmp_path)


def test_a_binary_batch_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(5000))
    with pytest.raises(BadRequest, match="5,000 bytes, which are no whole number of images of 3,073"):
        open_source(tmp_path)


def test_folders_called_train_and_test_are_no_cifar(tmp_path: Path) -> None:
    folder_of(tmp_path, ["train/a/1.png", "test/a/2.png"])
    assert open_source(tmp_path).keys == ("test/a/2.png", "train/a/1.png")
