"""Each method's file, as its authors' code saves it, gives the features of the network that was saved."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tests.training.published import authors, haiku, literal  # noqa: E402
from training.backbones import Backbone, build  # noqa: E402
from training.backbones.loading import load  # noqa: E402
from training.published import find, read  # noqa: E402
from training.published.layouts import sniff  # noqa: E402

SMALL = "resnet14x1"
"""Of bottlenecks, as every published ResNet, but one a stage."""


def images(size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def loaded(name: str, network: str, path: Path, size: int = 224) -> Backbone:
    """The file at `path`, named as the published checkpoint `name`, as if that had the small network."""
    checkpoint = replace(find(name), network=network)
    backbone = build(network, size)
    load(backbone, read(checkpoint, path))
    return backbone.eval()


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


@torch.no_grad()
def assert_features(backbone: nn.Module, expected: Tensor, size: int = 64) -> None:
    torch.testing.assert_close(backbone(images(size)), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("form", authors.RESNETS)
def test_a_resnets_file_gives_its_features(tmp_path: Path, network: nn.Module, form: str) -> None:
    name, write = authors.RESNETS[form]
    backbone = loaded(name, SMALL, saved(tmp_path / "a.pth", write(network)))
    with torch.no_grad():
        assert_features(backbone, network(images()))


def test_files_from_before_torchs_zip_format_are_read(tmp_path: Path, network: nn.Module) -> None:
    name, write = authors.RESNETS["MoCo v2"]
    path = saved(tmp_path / "a.pth.tar", write(network), _use_new_zipfile_serialization=False)
    with torch.no_grad():
        assert_features(loaded(name, SMALL, path), network(images()))


def test_learning_rates_that_numpy_1_wrote_are_read(tmp_path: Path, network: nn.Module) -> None:
    # DINO and SwAV put numpy's numbers into the optimiser; their private name has changed since.
    name, write = authors.RESNETS["DINO in training"]
    new = saved(tmp_path / "new.pth", write(network))
    old = tmp_path / "old.pth"
    changed = 0
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.namelist():
            content = source.read(item)
            changed += content.count(b"numpy._core")
            target.writestr(item, content.replace(b"numpy._core", b"numpy.core"))
    assert changed
    with torch.no_grad():
        assert_features(loaded(name, SMALL, old), network(images()))


# Vision transformers


@pytest.mark.parametrize("method", ["dino", "dino in training", "moco_v3"])
@torch.no_grad()
def test_a_vision_transformers_file_gives_its_class_token(tmp_path: Path, method: str) -> None:
    torch.manual_seed(4)
    state = dict(authors.unsettled(build("test_vit/8", 64).network).state_dict())
    path = saved(tmp_path / "a.pth", authors.transformer_file(method, state))
    name = "moco_v3/vit_base-300ep" if method == "moco_v3" else "dino/vits8"
    expected = literal.vision_transformer(state, images(), heads=2)
    assert_features(loaded(name, "test_vit/8", path, 64), expected)


@torch.no_grad()
def test_dino_positions_are_resampled_as_its_authors_do(tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = dict(authors.unsettled(build("test_vit/8", 64).network).state_dict())
    state["pos_embed"] = torch.randn(1, 1 + 28 * 28, 64)
    path = saved(tmp_path / "a.pth", state)
    expected = literal.vision_transformer(state, images(), heads=2)
    assert_features(loaded("dino/vits8", "test_vit/8", path, 64), expected)


@torch.no_grad()
def test_the_small_transformer_of_moco_v3_has_twelve_heads(tmp_path: Path) -> None:
    # timm's and DINO's have six, and the weights fit both.
    torch.manual_seed(5)
    state = dict(authors.unsettled(build("vit_small/16", 32).network).state_dict())
    path = saved(tmp_path / "a.pth", authors.transformer_file("moco_v3", state))
    six, twelve = (literal.vision_transformer(state, images(32), heads=heads) for heads in (6, 12))
    assert (six - twelve).abs().max() > 0.1
    assert_features(loaded("moco_v3/vit_small-300ep", "vit_small_12heads/16", path, 32), twelve, 32)
    assert build("", 32, start=str(path)).name == "vit_small_12heads/16"


def dinov2(network: nn.Module, *, registers: bool) -> dict[str, Tensor]:
    """The names and shapes of the authors' file, trained at 518 pixels, for a network of timm's."""
    state = dict(authors.unsettled(network).state_dict())
    dim = state["cls_token"].shape[-1]
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, dim)
    state["mask_token"] = torch.randn(1, dim)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
    return state


@pytest.mark.parametrize("registers", [False, True])
@torch.no_grad()
def test_dinov2s_file_gives_its_class_token_at_another_size(tmp_path: Path, registers: bool) -> None:
    torch.manual_seed(6)
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    state = dinov2(build(name, 56).network, registers=registers)
    path = saved(tmp_path / "a.pth", state)
    expected = literal.vision_transformer(state, images(56), heads=6, antialias=registers)
    published = "dinov2/vits14_reg" if registers else "dinov2/vits14"
    assert_features(loaded(published, name, path, 56), expected, 56)
    start = build(name, 56, start=str(path), mask_token=True).eval()
    assert_features(start, expected, 56)  # a plain path is recognised too
    assert torch.equal(start.mask_token, state["mask_token"][0])


@torch.no_grad()
def test_the_gated_layers_of_the_giant_keep_their_order() -> None:
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    from training.published.layouts import DINO_V2, take

    torch.manual_seed(7)
    options = {
        "img_size": 28,
        "patch_size": 14,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    timms = VisionTransformer(mlp_layer=SwiGLUPacked, init_values=1e-5, act_layer=nn.SiLU, **options).eval()
    theirs = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor
        for name, tensor in authors.unsettled(timms).state_dict().items()
    } | {"mask_token": torch.randn(1, 32)}
    assert sniff(theirs) is DINO_V2
    found = take(DINO_V2, theirs, "the file")
    del found["mask_token"]
    timms.load_state_dict(found)
    expected = literal.vision_transformer(theirs, images(28), heads=2)
    torch.testing.assert_close(timms.forward_features(images(28))[:, 0], expected, atol=1e-5, rtol=1e-5)


# What TensorFlow and JAX trained


class SamePool(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(literal.same(maps, 3, 2), 3, 2)


@torch.no_grad()
def test_simclrs_converted_file_pools_as_tensorflow_does(tmp_path: Path, network: nn.Module) -> None:
    from copy import deepcopy

    original = deepcopy(network)
    original.maxpool = SamePool()
    for name, content in (
        ("simclr/resnet50_1x", authors.converted_simclr(network)),
        ("simclr_v2/r50_1x_sk0", authors.converted_simclr_v2(plain(network), selective=False)),
    ):
        backbone = loaded(name, f"{SMALL}-simclr", saved(tmp_path / "a.pth", content))
        assert_features(backbone, original(images()))


def plain(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


@torch.no_grad()
def test_simclrv2s_file_with_selective_kernels_gives_its_features(tmp_path: Path) -> None:
    torch.manual_seed(8)
    original = build(f"{SMALL}-simclr-sk", 224).eval()
    authors.unsettled(original.network)
    content = authors.converted_simclr_v2(plain(original.network), selective=True)
    path = saved(tmp_path / "a.pth", content)
    assert_features(loaded("simclr_v2/r50_1x_sk1", f"{SMALL}-simclr-sk", path), original(images()))


@pytest.mark.parametrize("today", [True, False], ids=["names of today", "names of 2020"])
@torch.no_grad()
def test_byols_pickle_gives_its_features(tmp_path: Path, network: nn.Module, today: bool) -> None:
    params, averages = haiku.state_of(network)
    (tmp_path / "a.pkl").write_bytes(haiku.checkpoint(params, averages, today=today))
    backbone = loaded("byol/resnet50", f"{SMALL}-byol", tmp_path / "a.pkl")
    expected = literal.byol_resnet(haiku.tensors(params), haiku.tensors(averages), images())
    assert_features(backbone, expected)
    # torchvision's padding takes the same weights and gives other vectors
    assert F.cosine_similarity(network(images()), expected).min() < 0.999


@torch.no_grad()
def test_byols_converted_file_is_read_as_well(tmp_path: Path, network: nn.Module) -> None:
    params, averages = haiku.state_of(network)
    converted = {name: tensor for name, tensor in plain(network).items() if "num_batches" not in name}
    converted |= {"fc.weight": torch.ones(3, 2048), "fc.bias": torch.ones(3)}
    backbone = loaded("byol/resnet50", f"{SMALL}-byol", saved(tmp_path / "a.pth.tar", converted))
    assert_features(backbone, literal.byol_resnet(haiku.tensors(params), haiku.tensors(averages), images()))
