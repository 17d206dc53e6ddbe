"""Repositories as others publish them, made once for all tests here, and a hub that serves them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra 'train')")
pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra 'hub')")

from embedserve.hub.fetching import Hub
from embedserve.hub.pull import Pulled, Wishes, pull
from tests.embedserve.hub import networks
from tests.embedserve.hub.networks import Network
from tests.embedserve.hub.published import CLIP, LARGE, MAKERS
from tests.embedserve.hub.small_hub import SmallHub, serve

Pull = Callable[..., Pulled]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories lie below it as 'owner/name'."""
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="session")
def published(root: Path) -> dict[str, Network]:
    """Each repository's name and the network that it was made from."""
    made = {name: make(root / name) for name, make in MAKERS.items()}
    shutil.copytree(root / CLIP, root / LARGE)
    networks.move_weights_outside(root / LARGE)
    networks.add_variants(root / CLIP)
    return {**made, LARGE: made[CLIP]}


@pytest.fixture
def small_hub(root: Path, published: dict[str, Network]) -> Iterator[SmallHub]:
    with serve(root) as hub:
        yield hub


@pytest.fixture
def from_hub(small_hub: SmallHub, tmp_path: Path) -> Pull:
    """Pulls from the small hub through a cache of this test's own to 'bundle' in its folder."""

    def call(*sources: str, **wishes: object) -> Pulled:
        hub = Hub(endpoint=small_hub.url, cache=tmp_path / "cache")
        return pull(sources, tmp_path / "bundle", Wishes(**wishes), hub)

    return call


@pytest.fixture(scope="session")
def pulled(
    root: Path, published: dict[str, Network], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Pulled]]:
    """What pulling repositories from the small hub gives without wishes; the same to all who ask, not to be
    changed."""
    folder = tmp_path_factory.mktemp("pulled")
    with serve(root) as hub:

        @cache
        def call(*sources: str) -> Pulled:
            out = folder / sources[0].replace("/", "-")
            return pull(sources, out, Wishes(), Hub(endpoint=hub.url, cache=folder / "cache"))

        yield call


@pytest.fixture
def copy_of(root: Path, published: dict[str, Network], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a repository that may be changed."""
    return lambda name: Path(shutil.copytree(root / name, tmp_path / name))


@pytest.fixture
def from_folder(tmp_path: Path) -> Pull:
    """Pulls local folders to 'bundle' in the test's folder."""

    def call(*folders: Path, **wishes: object) -> Pulled:
        return pull([str(one) for one in folders], tmp_path / "bundle", Wishes(**wishes), Hub())

    return call
