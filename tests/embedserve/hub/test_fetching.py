"""Only what is needed is fetched, once; what cannot be fetched is explained."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from embedserve.errors import BundleError, EmbedServeError, NotFound, NotReady
from embedserve.hub.fetching import Hub, Repository, open_repository
from tests.embedserve.hub.conftest import Pull
from tests.embedserve.hub.published import CLIP, DINOV2, IMMICH
from tests.embedserve.hub.small_hub import SmallHub

NOWHERE = "http://127.0.0.1:9"  # the port "discard", which nobody listens on


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1, which `huggingface_hub` reads when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_only_the_files_of_the_variant_are_fetched(from_hub: Pull, small_hub: SmallHub) -> None:
    from_hub(CLIP, variant="fp16")
    assert small_hub.fetched() == {
        f"{CLIP}/onnx/vision_model_fp16.onnx",
        f"{CLIP}/onnx/text_model_fp16.onnx",
    }


def test_a_second_pull_takes_everything_from_the_cache(from_hub: Pull, small_hub: SmallHub) -> None:
    first = from_hub(DINOV2).bundle
    small_hub.asked.clear()
    again = from_hub(DINOV2).bundle
    assert again.fingerprint == first.fingerprint
    assert not [key for key in small_hub.asked if key.startswith("GET") and "/api/" not in key]


def test_without_a_network_the_cache_is_enough(from_hub: Pull, small_hub: SmallHub, tmp_path: Path) -> None:
    fetched = from_hub(DINOV2).bundle
    away = open_repository(DINOV2, Hub(endpoint=NOWHERE, cache=tmp_path / "cache"))
    assert away.commit == small_hub.commit(DINOV2)
    assert away.at in fetched.description.source


def test_offline_mode_asks_nobody(
    from_hub: Pull, small_hub: SmallHub, request: pytest.FixtureRequest
) -> None:
    online = from_hub(DINOV2).bundle
    small_hub.asked.clear()
    request.getfixturevalue("offline")
    assert from_hub(DINOV2).bundle.fingerprint == online.fingerprint
    assert not small_hub.asked


def test_offline_without_the_file_says_what_to_do(from_hub: Pull, request: pytest.FixtureRequest) -> None:
    from_hub(CLIP)
    request.getfixturevalue("offline")
    with pytest.raises(NotFound, match=r"no 'onnx/vision_model_fp16\.onnx'\. .* are there: fp32"):
        from_hub(CLIP, variant="fp16")
    with pytest.raises(NotReady, match="HF_HUB_OFFLINE is set, and the cache lacks 'immich-app/tiny__new'"):
        from_hub(IMMICH)


def test_a_transfer_that_breaks_off_is_tried_again(from_hub: Pull, small_hub: SmallHub, pulled: Pull) -> None:
    small_hub.cut = True
    assert from_hub(DINOV2).bundle.fingerprint == pulled(DINOV2).bundle.fingerprint
    assert small_hub.asked[f"GET /cdn/{DINOV2}/onnx/model.onnx"] == 2


def test_a_revision_is_pinned(from_hub: Pull, small_hub: SmallHub) -> None:
    commit = small_hub.commit(DINOV2)
    for revision in ("v1", commit):
        assert f"{DINOV2}@{commit}" in from_hub(f"{DINOV2}@{revision}").bundle.description.source


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="cannot be reached") as raised:
        open_repository(CLIP, Hub(endpoint=NOWHERE, cache=tmp_path))
    assert NOWHERE in str(raised.value)
    for way_out in ("copy the bundle", "pull that folder", "HF_ENDPOINT"):
        assert way_out in str(raised.value)


def test_a_server_that_closes_at_once_is_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        hang_up = threading.Thread(target=lambda: server.accept()[0].close())
        hang_up.start()
        with pytest.raises(NotReady, match="cannot be reached"):
            open_repository(CLIP, Hub(endpoint=endpoint, cache=tmp_path))
        hang_up.join()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Xenova/tiny-clop", r"has no repository 'Xenova/tiny-clop', or keeps it private.*HF_TOKEN"),
        (f"{CLIP}@v9", r"'Xenova/tiny-clip' has no revision 'v9'.*branch, a tag or a full commit"),
        ("tiny-clip", r"neither a folder here nor a repository's name such as"),
        ("../no/such/folder", r"neither a folder here"),
        ("", r"neither a folder"),
    ],
)
def test_what_is_not_there_is_named(from_hub: Pull, source: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        from_hub(source)


def test_a_gated_repository_says_how_to_get_in(from_hub: Pull, small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.gated.add(CLIP)
    with pytest.raises(EmbedServeError, match="accepted its conditions") as raised:
        from_hub(CLIP)
    assert f"{small_hub.url}/{CLIP}" in str(raised.value)
    assert "hf auth login" in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_a_hub_in_trouble_is_not_reached(from_hub: Pull, small_hub: SmallHub) -> None:
    small_hub.broken.add(CLIP)
    with pytest.raises(NotReady, match="cannot be reached"):
        from_hub(CLIP)


def test_an_address_copied_from_the_browser_is_understood(small_hub: SmallHub, tmp_path: Path) -> None:
    hub = Hub(endpoint=small_hub.url, cache=tmp_path)
    assert open_repository(f"https://huggingface.co/{CLIP}/", hub).name == CLIP


def test_a_cache_that_cannot_be_written_is_named(small_hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(EmbedServeError, match=r"cannot be stored in the cache.*HF_HOME"):
        open_repository(CLIP, Hub(endpoint=small_hub.url, cache=tmp_path / "cache"))


# ---- local folders ---------------------------------------------------------------------------------------


def test_a_folder_is_a_repository(from_folder: Pull, root: Path, pulled: Pull) -> None:
    bundle = from_folder(root / DINOV2).bundle
    assert bundle.description.source.startswith("folder 'tiny-dinov2'")
    assert str(root) not in bundle.description.model_dump_json()
    assert bundle.description.image == pulled(DINOV2).bundle.description.image
    assert bundle.description.files["image.onnx"] == pulled(DINOV2).bundle.description.files["image.onnx"]


def test_a_folder_goes_before_a_repository_of_that_name(
    copy_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(DINOV2)
    monkeypatch.chdir(tmp_path)
    assert open_repository(DINOV2, Hub(endpoint=NOWHERE)).folder is not None


def test_a_missing_file_is_named_with_its_likes(copy_of: Callable[[str], Path], from_folder: Pull) -> None:
    folder = copy_of(IMMICH)
    (folder / "visual/preprocess_cfg.json").unlink()
    with pytest.raises(
        NotFound, match=r"no file 'visual/preprocess_cfg\.json'\. .*'textual/tokenizer\.json'"
    ):
        from_folder(folder)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_json_file_is_named(
    copy_of: Callable[[str], Path], from_folder: Pull, content: str
) -> None:
    folder = copy_of(IMMICH)
    (folder / "config.json").write_text(content)
    with pytest.raises(BundleError, match=r"'config\.json' of folder 'tiny__new' is not (a )?JSON"):
        from_folder(folder)


# ---- licences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        (
            "---\nlicense: other\nlicense_name: apple-ascl\nlicense_link: LICENSE\n---\n",
            "apple-ascl, LICENSE",
        ),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\ntags: [x]\n---\n", None),
        ("no header\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a list\n---\n", None),
    ],
)
def test_the_licence_is_the_cards(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    repository = Repository(name="r", commit=None, files=frozenset({"README.md"}), folder=tmp_path)
    assert repository.licence() == licence


def test_a_licence_that_nobody_names_is_said_to_be_unknown(pulled: Pull) -> None:
    found = pulled(IMMICH)
    assert found.bundle.description.licence == f"unknown: ask {IMMICH}"
    assert any("names no licence" in warning for warning in found.warnings)
