"""Images in tars, read from where they lie."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from embedserve.errors import BadRequest, NotFound
from tests.training.data.samples import array, encoded, folder_of, picture
from training.data import open_pixels, open_source
from training.data.webdataset import expand


def tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def sample(number: int, label: str = "", **fields: object) -> dict[str, bytes]:
    members = {f"{number:06}.png": encoded(picture(number))}
    if label:
        members[f"{number:06}.cls"] = label.encode()
    if fields:
        members[f"{number:06}.json"] = json.dumps(fields).encode()
    return members


def test_images_are_read_from_anywhere_in_any_order(tmp_path: Path) -> None:
    for shard in range(3):
        numbers = range(shard * 4, shard * 4 + 4)
        tar(tmp_path / f"s-{shard}.tar", {k: v for n in numbers for k, v in sample(n, str(n % 3)).items()})
    source = open_source(tmp_path)
    assert len(source) == 12
    assert source.keys[5] == "s-1.tar/000005.png"
    assert source.class_names == ("0", "1", "2")
    for row in np.random.default_rng(0).permutation(12):
        assert (array(source.read(int(row))) == array(picture(int(row)))).all()
        assert source.labels[row] == row % 3


def test_one_tar_a_folder_and_a_pattern_agree(tmp_path: Path) -> None:
    for shard in range(9, 12):
        tar(tmp_path / f"s-{shard:03}.tar", sample(shard, "1"))
    by_folder = open_source(tmp_path)
    by_pattern = open_source(tmp_path / "s-{009..011}.tar")
    alone = open_source(tmp_path / "s-010.tar")
    assert by_folder.keys == by_pattern.keys == tuple(f"s-{n:03}.tar/{n:06}.png" for n in (9, 10, 11))
    assert alone.keys == by_folder.keys[1:2]
    assert by_folder.fingerprint == by_pattern.fingerprint


def test_patterns_expand_as_in_a_shell() -> None:
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("a-{8..10}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar"]
    assert expand("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand("plain.tar") == ["plain.tar"]


def test_fields_of_json_can_label_and_group(tmp_path: Path) -> None:
    members = sample(0, label="boot", model=7, deep={"x": 1}) | sample(1, label="hat", model=7) | sample(2)
    source = open_source(tar(tmp_path / "a.tar", members), group_by="model")
    assert source.class_names == ("boot", "hat")
    assert source.labels.tolist() == [0, 1, -1]
    assert source.groups is not None
    assert source.groups[0] == source.groups[1] != source.groups[2]


def test_members_in_folders_can_be_grouped_by_them(tmp_path: Path) -> None:
    members = {f"./{name}.png": encoded(picture(0)) for name in ("x/1", "x/2", "y/1")}
    source = open_source(tar(tmp_path / "a.tar", members), group_by="folder")
    assert source.keys == ("a.tar/x/1.png", "a.tar/x/2.png", "a.tar/y/1.png")
    assert source.groups is not None
    assert source.groups.tolist() == [0, 0, 1]


def test_the_plain_image_of_a_sample_is_taken_and_samples_without_are_counted(tmp_path: Path) -> None:
    members = {
        "1.depth.png": encoded(picture(9)),
        "1.jpg": encoded(picture(1), "JPEG"),
        "2.txt": b"no image",
        "._3.png": b"what a Mac leaves behind",
    }
    source = open_source(tar(tmp_path / "a.tar", members))
    assert source.keys == ("a.tar/1.jpg",)
    assert source.ignored == 1


def test_long_names_are_read(tmp_path: Path) -> None:
    name = "folder/" * 40 + "1.png"
    source = open_source(tar(tmp_path / "a.tar", {name: encoded(picture(1))}))
    assert source.keys == (f"a.tar/{name}",)
    assert (array(source.read(0)) == array(picture(1))).all()


def test_a_damaged_json_says_nothing(tmp_path: Path) -> None:
    members = sample(0, label="a") | {"000001.png": encoded(picture(1)), "000001.json": b"{"}
    assert open_source(tar(tmp_path / "a.tar", members)).labels.tolist() == [0, -1]


def test_a_tar_that_was_cut_short_gives_what_comes_before(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", sample(0) | sample(1) | sample(2))
    whole.write_bytes(whole.read_bytes()[:4000])
    tar(tmp_path / "b.tar", sample(3))
    source = open_source(tmp_path)
    assert "a.tar" in [one.key for one in source.skipped]
    pixels = open_pixels(source, 8, device="cpu", folder=tmp_path / "cache", workers=1)
    assert pixels.source.keys == ("a.tar/000000.png", "b.tar/000003.png")
    assert {one.key for one in pixels.skipped} >= {"a.tar"}


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    plain = tar(tmp_path / "a.tar", sample(0))
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(BadRequest, match=r"'a.tar is compressed, cut short or no tar.*unpack a \.tar\.gz"):
        open_source(plain)


def test_missing_tars_of_a_pattern_are_named(tmp_path: Path) -> None:
    tar(tmp_path / "s-0.tar", sample(0))
    with pytest.raises(NotFound, match=r"3 tars; 2 are missing: '.*s-1.tar', '.*s-2.tar'"):
        open_source(tmp_path / "s-{0..2}.tar")


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="only 1 sample without one"):
        open_source(tar(tmp_path / "a.tar", {"1.txt": b"x"}))


def test_a_tar_beside_images_does_not_hide_them(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a.png"])
    tar(tmp_path / "backup.tar", sample(0))
    assert open_source(tmp_path).keys == ("a.png",)
