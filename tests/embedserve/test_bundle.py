"""A bundle is what its manifest says, or it does not open."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedserve.bundle import new_bundle, open_bundle, pack_vector, seal, unpack_vector
from embedserve.errors import BundleError
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = folder / "encoder.json"
    document = json.loads(manifest.read_text())
    change(document)
    manifest.write_text(json.dumps(document))


def test_what_was_sealed_is_what_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert (bundle.name, bundle.dim) == ("tiny", 8)
    assert set(bundle.description.files) == {"README.md", "image.onnx", "text.onnx", "tokenizer.json"}


def test_an_altered_file_is_named(folder: Path) -> None:
    graph = folder / "image.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleError, match=r"image\.onnx' is not the file described"):
        open_bundle(folder)
    open_bundle(folder, verify=False)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "text.onnx").unlink()
    with pytest.raises(BundleError, match=r"'text\.onnx' cannot be read"):
        open_bundle(folder)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not an encoder bundle: encoder\.json cannot be read"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"name": "x"}', b"[" * 5000])
def test_a_manifest_that_is_not_one_is_an_error(folder: Path, text: bytes) -> None:
    (folder / "encoder.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"encoder\.json"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda document: document.update(dim=0), "dim"),
        (lambda document: document.update(format=2), "format"),
        (lambda document: document.update(unknown=1), "unknown"),
        (lambda document: document.update(name="../up"), "name"),
        (lambda document: document.update(image=None, text=None), "needs an image tower"),
        (lambda document: document["probe"].update(min_cosine=2), "probe.min_cosine"),
    ],
)
def test_the_malformed_field_is_named(
    folder: Path, change: Callable[[dict[str, Any]], object], where: str
) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=where):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "", ".", "a\0b"])
def test_no_name_leaves_the_folder(folder: Path, name: str) -> None:
    original = (folder / "encoder.json").read_text()
    for change in (
        lambda document: document["image"].update(file=name),
        lambda document: document["text"].update(tokenizer=name),
        lambda document: document["files"].update({name: "0" * 64}),
    ):
        (folder / "encoder.json").write_text(original)
        edit(folder, change)
        with pytest.raises(BundleError, match="leaves the bundle's folder"):
            open_bundle(folder, verify=False)


def test_a_graph_without_hash_does_not_open(folder: Path) -> None:
    edit(folder, lambda document: document["files"].pop("image.onnx"))
    with pytest.raises(BundleError, match=r"no sha256 for 'image\.onnx'"):
        open_bundle(folder)


def test_the_rules_of_later_fields_count_for_the_fingerprint_only_where_they_are_used(folder: Path) -> None:
    """Collections remember fingerprints from before these fields existed."""
    described = open_bundle(folder).description
    assert described.image is not None
    assert described.text is not None
    image = described.image.model_dump(mode="json", exclude={"outputs": True, "preprocessing": {"odd_crop"}})
    before = {
        "files": {name: digest for name, digest in described.files.items() if name != "README.md"},
        "image": image,
        "text": described.text.model_dump(mode="json", exclude={"cleaning"}),
        "dim": described.dim,
    }
    expected = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert open_bundle(folder).fingerprint == expected

    text = described.text.model_copy(update={"cleaning": "lower"})
    assert seal(folder, described.model_copy(update={"text": text})).fingerprint != expected
    pixels = described.image.preprocessing.model_copy(update={"odd_crop": "down"})
    image_tower = described.image.model_copy(update={"preprocessing": pixels})
    assert seal(folder, described.model_copy(update={"image": image_tower})).fingerprint != expected


def test_the_fingerprint_follows_the_vectors_and_not_the_card(folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "README.md").write_text("# a better card\n")
    described = bundle.description.model_copy(update={"evaluation": {"recall": 0.5}, "name": "renamed"})
    assert seal(folder, described).fingerprint == bundle.fingerprint
    assert write_tiny_bundle(tmp_path / "other", rotate=1).fingerprint != bundle.fingerprint
    image = bundle.description.image
    assert image is not None
    squashed = image.model_copy(
        update={"preprocessing": image.preprocessing.model_copy(update={"resize": "squash"})}
    )
    assert seal(folder, described.model_copy(update={"image": squashed})).fingerprint != bundle.fingerprint


def test_a_new_bundle_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_bundle(tmp_path / "out") as folder:
            (folder / "image.onnx").write_bytes(b"half")
            raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_new_bundle_that_was_not_sealed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError), new_bundle(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_new_bundle_replaces_an_old_one_only_when_complete(tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "out", name="old")
    with pytest.raises(BundleError), new_bundle(tmp_path / "out"):
        pass
    assert open_bundle(old.folder).name == "old"
    assert write_tiny_bundle(tmp_path / "out", name="new").name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_bundle_fits_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_tiny_bundle(tmp_path / "out").name == "tiny"


def test_a_new_bundle_overwrites_nothing_else(tmp_path: Path) -> None:
    photo = tmp_path / "out" / "holiday.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    with pytest.raises(BundleError, match="is not an encoder bundle"), new_bundle(tmp_path / "out"):
        pass
    assert photo.read_bytes() == b"precious"


def test_a_packed_vector_comes_back() -> None:
    vector = np.array([0.6, -0.8], np.float32)
    assert pack_vector(vector) == "mpkZP83MTL8="  # little-endian on every machine
    np.testing.assert_array_equal(unpack_vector(pack_vector(vector)), vector)


@pytest.mark.parametrize(
    "text", ["", "???", "AAAA", pack_vector(np.array([np.nan, 1], np.float32)), "AAAAAA=="]
)
def test_what_is_no_unit_vector_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="golden vector"):
        unpack_vector(text)
