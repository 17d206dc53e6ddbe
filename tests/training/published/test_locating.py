"""Where a published file is taken from, and what is said when it cannot be had."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from embedserve.errors import BadRequest, InvalidField, NotFound  # noqa: E402
from training.published import find, locate  # noqa: E402

CHECKPOINT = find("moco_v2/resnet50-800ep")
CONTENT = b"as its authors published it"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path: Path) -> str:
    """The address of the authors' file."""
    path = tmp_path / "server" / CHECKPOINT.file
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path.as_uri()


def test_a_local_copy_is_taken_as_it_is(tmp_path: Path, hub: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(CONTENT)
    assert locate(CHECKPOINT, path) == path
    assert not hub.exists()


def test_a_local_copy_that_does_not_exist_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(
        NotFound, match=r"mine.pth' not found; give the file of 'moco_v2/resnet50-800ep', which"
    ):
        locate(CHECKPOINT, tmp_path / "mine.pth")


def test_a_download_goes_to_torchs_cache_once(hub: Path, published: str) -> None:
    checkpoint = replace(CHECKPOINT, url=published, md5=hashlib.md5(CONTENT).hexdigest()[:8])
    found = locate(checkpoint, None)
    assert found == hub / "moco_v2_800ep_pretrain.pth.tar"
    assert found.read_bytes() == CONTENT
    assert [path.name for path in hub.iterdir()] == [found.name]
    Path(published.removeprefix("file://")).unlink()
    assert locate(checkpoint, None) == found


def test_a_download_with_another_hash_is_thrown_away(hub: Path, published: str) -> None:
    checkpoint = replace(CHECKPOINT, url=published)
    with pytest.raises(BadRequest, match=r"has the md5 \w{32}, not a04e12f8… as its authors state at https"):
        locate(checkpoint, None)
    assert list(hub.iterdir()) == []


def test_without_a_network_page_file_and_flag_are_named(hub: Path) -> None:
    checkpoint = replace(CHECKPOINT, url="http://127.0.0.1:9/moco_v2_800ep_pretrain.pth.tar")
    with pytest.raises(InvalidField) as caught:
        locate(checkpoint, None)
    message = str(caught.value)
    assert "'moco_v2_800ep_pretrain.pth.tar' from https://github.com/facebookresearch/moco" in message
    assert "--weights FILE" in message
    assert "start=published:moco_v2/resnet50-800ep@FILE" in message
    assert list(hub.iterdir()) == []


def test_what_has_to_be_converted_first_names_the_converter() -> None:
    with pytest.raises(
        InvalidField, match=r"published as a TensorFlow checkpoint at .*Convert it with https://g"
    ):
        locate(find("simclr_v2/r50_1x_sk1"), None)
