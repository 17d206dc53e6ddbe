"""The table of published checkpoints: names, files, networks; and the page that is written from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from embedserve.bundle import Description  # noqa: E402
from embedserve.errors import InvalidField  # noqa: E402
from training.backbones import build  # noqa: E402
from training.published import TABLE, document, find, rows  # noqa: E402
from training.published.table import NETWORKS  # noqa: E402

DOCUMENT = Path(__file__).parents[3] / "docs" / "published.md"


def test_the_page_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        "write it anew: python -m training.published > docs/published.md"
    )


def test_names_are_a_method_and_one_of_its_checkpoints() -> None:
    for name, checkpoint in TABLE.items():
        assert name == checkpoint.full_name
        assert re.fullmatch(r"[a-z0-9_]+/[a-z0-9_-]+", name), name
        assert find(f"published:{name}") is find(name) is checkpoint
        bundle_name = Description.model_fields["name"].metadata[0].pattern
        assert re.fullmatch(bundle_name, name.replace("/", "-"))


def test_every_method_that_the_issue_names_is_there() -> None:
    methods = {name.partition("/")[0] for name in TABLE}
    assert methods >= {
        "simclr", "simclr_v2", "moco_v1", "moco_v2", "moco_v3", "byol", "swav", "barlow_twins", "vicreg",
        "simsiam", "densecl", "dino", "dinov2",
    }  # fmt: skip


def test_every_checkpoint_says_where_it_is_from_and_under_which_licence() -> None:
    for checkpoint in TABLE.values():
        release = checkpoint.release
        assert release.page.startswith("https://")
        assert checkpoint.url.startswith("https://") or release.converter.startswith("https://")
        assert release.licence
        if "NC" in release.licence:
            assert any("forbids commercial use" in note for note in release.notes)
        assert checkpoint.top1 is None or 55 < checkpoint.top1 < 90
        assert all(0 <= mean < 1 for mean in release.mean)
        assert all(0 < std <= 1 for std in release.std)


def test_no_two_files_share_a_name_in_the_cache() -> None:
    # torch.hub itself would give VICReg's resnet50.pth for Barlow Twins', whichever came first.
    cached = [checkpoint.cached_as for checkpoint in TABLE.values() if checkpoint.url]
    assert len(set(cached)) == len(cached)
    assert find("barlow_twins/resnet50-1000ep").file == find("vicreg/resnet50").file == "resnet50.pth"
    assert find("vicreg/resnet50").cached_as == "vicreg-resnet50.pth"
    assert find("simsiam/resnet50-100ep-bs256").cached_as == "simsiam-resnet50-100ep-bs256.pth.tar"
    assert find("dino/vits16").cached_as == "dino_deitsmall16_pretrain.pth"


def test_a_listing_has_a_row_of_text_for_each() -> None:
    listed = list(rows())
    assert [row["name"] for row in listed] == [f"published:{name}" for name in TABLE]
    assert all(isinstance(value, str) for row in listed for value in row.values())
    row = next(row for row in listed if row["name"] == "published:moco_v2/resnet50-800ep")
    assert row["linear"] == "71.1"
    assert row["licence"] == "CC-BY-NC-4.0"
    assert row["file"] == "moco_v2_800ep_pretrain.pth.tar"


def test_an_unknown_name_is_answered_with_those_of_the_method_or_the_closest() -> None:
    with pytest.raises(
        InvalidField, match=r"'vicreg/resnet18' not found; known of vicreg: vicreg/resnet50, "
    ):
        find("vicreg/resnet18")
    with pytest.raises(InvalidField, match=r"did you mean 'dino/vits16'\? All are listed in docs/published"):
        find("dno/vits16")


@pytest.mark.parametrize("name", [name for name in NETWORKS if "giant" not in name and "152" not in name])
def test_networks_are_of_the_size_that_is_listed(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name, 224)
    dim, millions = NETWORKS[name]
    assert backbone.dim == dim
    assert round(sum(parameter.numel() for parameter in backbone.parameters()) / 1e6, 1) == millions


def test_every_network_of_the_table_is_listed() -> None:
    assert {checkpoint.network for checkpoint in TABLE.values()} == set(NETWORKS)
