"""A folder of images: its classes, parts and groups; and one image, upright and RGB."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedserve.errors import BadRequest, InvalidField, NotFound
from tests.training.data.samples import NOBODY, array, encoded, folder_of, in_child, picture
from training.data import Source, open_source
from training.data.source import upright_size


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are for one user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_other_user(function):  # type: ignore[no-untyped-def]
    """Root may read everything, so permissions are tried as somebody else."""
    return in_child(function, user=NOBODY if os.geteuid() == 0 else None)


def labelled(source: Source) -> dict[str, str | None]:
    names = (*source.class_names, None)
    return {key: names[label] for key, label in zip(source.keys, source.labels, strict=True)}


def grouped(source: Source) -> set[frozenset[str]]:
    assert source.groups is not None
    keys = np.array(source.keys)
    return {frozenset(keys[source.groups == group]) for group in set(source.groups)}


# ------------------------------------------------------------------------------------------- classes


def test_the_folders_below_the_root_are_the_classes(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["cat/1.png", "cat/old/2.jpg", "dog/3.png"]))
    assert source.class_names == ("cat", "dog")
    assert labelled(source) == {"cat/1.png": "cat", "cat/old/2.jpg": "cat", "dog/3.png": "dog"}
    assert not source.test.any()
    assert source.name == str(tmp_path)


@pytest.mark.parametrize(
    "names", [["a/1.png", "b/2.png", "3.png"], ["a/1.png", "a/2.png"], ["1.png", "2.png"]]
)
def test_an_image_in_no_class_or_a_single_class_means_no_labels(tmp_path: Path, names: list[str]) -> None:
    source = open_source(folder_of(tmp_path, names))
    assert source.class_names == ()
    assert source.labels.tolist() == [-1] * len(names)


def test_folders_around_everything_are_no_classes(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["set/images/cat/1.png", "set/images/dog/2.png"]))
    assert source.class_names == ("cat", "dog")


def test_train_and_val_are_parts_and_not_classes(tmp_path: Path) -> None:
    names = ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"]
    source = open_source(folder_of(tmp_path, names))
    assert source.class_names == ("cat", "dog")
    assert dict(zip(source.keys, source.test.tolist(), strict=True)) == {
        name: name.startswith("val") for name in names
    }


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["test/1.png", "exam/2.png"]))
    assert source.class_names == ("exam", "test")
    assert not source.test.any()


def test_labels_can_be_taken_from_the_inner_folder(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a/x/1.png", "a/y/2.png", "b/x/3.png"]), label_by="folder")
    assert source.class_names == ("a/x", "a/y", "b/x")


# -------------------------------------------------------------------------------------------- groups


def test_images_are_grouped_by_the_folder_that_holds_them(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a/1.png", "a/2.png", "b/c/3.png", "4.png"]), group_by="folder")
    assert grouped(source) == {
        frozenset({"a/1.png", "a/2.png"}),
        frozenset({"b/c/3.png"}),
        frozenset({"4.png"}),
    }


def test_images_are_grouped_by_name_without_the_last_number(tmp_path: Path) -> None:
    names = ["boot_1.png", "boot-22.jpg", "left/boot.png", "boot_red_3.png", "2024.png"]
    source = open_source(folder_of(tmp_path, names), group_by="name")
    assert grouped(source) == {
        frozenset({"boot_1.png", "boot-22.jpg", "left/boot.png"}),
        frozenset({"boot_red_3.png"}),
        frozenset({"2024.png"}),
    }


def test_an_unknown_group_is_refused_with_what_there_is(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", "b.png"])
    with pytest.raises(InvalidField, match=r"group_by='nmae'.*did you mean 'name'\?.*'folder', 'name'"):
        open_source(tmp_path, group_by="nmae")
    with pytest.raises(InvalidField, match=r"label_by='colour'"):
        open_source(tmp_path, label_by="colour")


def test_without_group_by_there_are_no_groups(tmp_path: Path) -> None:
    assert open_source(folder_of(tmp_path, ["a.png"])).groups is None


# -------------------------------------------------------------------------------- what is passed over


def test_hidden_files_and_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png", ".hidden.png", ".cache/b.png"])
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert source.keys == ("a.png",)
    assert source.ignored == 1
    assert source.remarks() == ["Passed over 1 file that cannot be an image."]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"is empty\. Give a folder with JPEG"):
        open_source(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BadRequest, match=r"holds no image, only 1 other file"):
        open_source(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "s3://bucket/images", "shard-{00..01}.tar"])
def test_a_path_that_is_not_there_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises((NotFound, InvalidField), match=r"nowhere|Download|missing"):
        open_source(path if "://" in path else tmp_path / path)


def test_a_file_of_no_known_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BadRequest, match=r"no data set that can be read here.*a folder of images"):
        open_source(tmp_path / "notes.txt")


def test_a_folder_that_may_not_be_read_is_refused(anyones: Path) -> None:
    folder_of(anyones / "mine", ["a.png"])
    (anyones / "mine").chmod(0o000)
    with pytest.raises(BadRequest, match=r"mine' cannot be read: Permission denied"):
        as_other_user(lambda: open_source(anyones / "mine"))


def test_a_part_that_may_not_be_read_is_reported(anyones: Path) -> None:
    folder_of(anyones, ["open/a.png", "shut/b.png"])
    (anyones / "shut").chmod(0o000)
    keys, remarks = as_other_user(lambda: ((found := open_source(anyones)).keys, found.remarks()))
    assert keys == ("open/a.png",)
    assert "1 image cannot be used: 'shut/: folder cannot be listed: Permission denied'." in remarks


def test_nothing_but_parts_that_may_not_be_read_is_refused(anyones: Path) -> None:
    folder_of(anyones, ["shut/b.png"])
    (anyones / "shut").chmod(0o000)
    with pytest.raises(BadRequest, match=r"no image that can be read: 'shut/: folder cannot be listed"):
        as_other_user(lambda: open_source(anyones))


def test_a_file_that_may_not_be_read_says_so(anyones: Path) -> None:
    folder_of(anyones, ["a.png"])
    (anyones / "a.png").chmod(0o000)
    with pytest.raises(BadRequest, match=r"'a.png' of .* cannot be read: Permission denied"):
        as_other_user(lambda: open_source(anyones).read(0))


def test_classes_of_one_image_are_allowed_and_reported(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a/1.png", "a/2.png", "b/3.png"]))
    assert source.remarks() == ["A single image is all there is of 1 class: 'b'."]


def test_groups_without_pairs_are_reported(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a.png", "b.png"]), group_by="name")
    assert source.remarks() == ["Every group has a single image, so no image has a partner."]


# ----------------------------------------------------------------------------------------- one image


def test_a_single_image_is_a_data_set(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["only.png"]))
    assert len(source) == 1
    assert (array(source.read(0)) == array(picture(0))).all()


def test_transparency_is_shown_on_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGBA", (4, 3), (255, 0, 0, 0))))
    image = open_source(tmp_path).read(0)
    assert image.mode == "RGB"
    assert array(image).min() == 255


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_size_in_the_header_is_that_of_the_upright_image(
    tmp_path: Path, form: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, 24, 16), form, exif=exif)
    (tmp_path / "a.png").write_bytes(data)  # the name's extension need not be right
    source = open_source(tmp_path)
    assert source.size_of(0) == source.read(0).size == ((24, 16) if orientation < 5 else (16, 24))
    assert upright_size(data) == source.size_of(0)


def test_a_damaged_image_names_itself(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0))[:60])
    source = open_source(tmp_path)
    with pytest.raises(BadRequest, match=r"'a.png' of .*: The PNG image is damaged"):
        source.read(0)


def test_an_image_that_is_gone_names_itself(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a.png"]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(NotFound, match=r"'a.png' of .* is gone"):
        source.read(0)


# --------------------------------------------------------------------------- selection, fingerprints


def test_a_selection_keeps_the_meaning_of_its_images(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, ["a/1.png", "a/2.png", "b/3.png", "c/4.png"]), group_by="folder")
    some = source.select(np.array([3, 1])).select(np.array([1, 0]))
    assert some.keys == ("a/2.png", "c/4.png")
    assert labelled(some) == {"a/2.png": "a", "c/4.png": "c"}
    assert (array(some.read(1)) == array(source.read(3))).all()
    assert source.groups is not None
    assert some.groups is not None
    assert some.groups.tolist() == [source.groups[1], source.groups[3]]
    assert source.select(source.labels == 0).keys == ("a/1.png", "a/2.png")


def test_a_copy_of_the_data_has_the_same_fingerprint(tmp_path: Path) -> None:
    names = ["a/1.png", "b/2.png"]
    first, copy = folder_of(tmp_path / "x", names), folder_of(tmp_path / "y", names)
    os.utime(copy / "a/1.png", (1, 1))
    assert open_source(first).fingerprint == open_source(copy).fingerprint
    assert open_source(first).content != open_source(copy).content


def test_a_file_that_was_renamed_is_other_content(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png"])
    before = open_source(tmp_path).content
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert open_source(tmp_path).content != before


def test_labels_groups_keys_and_sizes_change_the_fingerprint(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a/1.png", "b/2.png"])
    seen = {
        open_source(tmp_path).fingerprint,
        open_source(tmp_path, label_by="name").fingerprint,
        open_source(tmp_path, group_by="name").fingerprint,
        open_source(tmp_path).select(np.array([0])).fingerprint,
    }
    contents = {open_source(tmp_path).content, open_source(tmp_path, label_by="name").content}
    assert (len(seen), len(contents)) == (4, 1)
    (tmp_path / "a/1.png").write_bytes(encoded(picture(9, 30, 30)))
    assert open_source(tmp_path).fingerprint not in seen
    assert open_source(tmp_path).content not in contents
