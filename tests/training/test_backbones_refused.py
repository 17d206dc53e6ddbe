"""Weights that do not fit, and files that are no weights: the message names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from embedserve.errors import BadRequest, InvalidField, NotFound  # noqa: E402
from tests.training.weights import VIT, State, behind, checkpoint, plain, saved, trained  # noqa: E402
from training.backbones import build  # noqa: E402


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "norm.weight", "norm.bias"), r"2 missing \(norm.weight, norm.bias\)"),
        (lambda s: {k: v for k, v in s.items() if "attn" not in k}, r"24 missing \(\S+, \S+, \S+, …\)"),
        (lambda s: s | {"blocks.9.x": s["cls_token"]}, r"1 left over \(blocks.9.x\)"),
        (
            lambda s: s | {"norm.bias": torch.zeros(3)},
            r"1 of another shape \(norm.bias is \[3\] instead of \[64\]\)",
        ),
        (lambda s: s | {"norm.bias": s["norm.bias"] * torch.nan}, r"1 not finite \(norm.bias\)"),
        (
            lambda s: s | {"pos_embed": torch.zeros(1, 8, 64)},
            r"1 of another shape \(pos_embed is \[1, 8, 64\] instead of \[1, 17, 64\]",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)},
            r"1 of another shape \(patch_embed.proj.weight is \[64, 3, 4, 4\] instead of \[64, 3, 8, 8\]",
        ),
    ],
    ids=["missing", "many missing", "left over", "shape", "not finite", "positions", "patch size"],
)
def test_wrong_weights_are_named(tmp_path: Path, change: Any, message: str) -> None:
    start = saved(tmp_path / "a.pth", change(plain(trained(VIT))))
    with pytest.raises(
        InvalidField, match=f"does not fit '{VIT}', which has 78 tensors: {message}"
    ) as caught:
        build(VIT, 32, start=start)
    assert caught.value.param == "start"


def test_a_broken_checkpoint_of_ours_is_not_patched_from_its_other_networks(tmp_path: Path) -> None:
    content = checkpoint(trained(VIT))
    del content["model"]["teacher.network.norm.bias"]  # the student has one
    with pytest.raises(InvalidField, match=r"1 missing \(norm.bias\)"):
        build("", 32, start=saved(tmp_path / "a.pt", content))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    start = saved(tmp_path / "a.pth", plain(trained("resnet18")))
    with pytest.raises(InvalidField, match=r"has no tensor named 'cls_token'.* begins with conv1.weight"):
        build(VIT, 32, start=start)
    with pytest.raises(InvalidField, match=r"does not fit 'resnet34', .* 80 missing"):
        build("resnet34", 32, start=start)
    with pytest.raises(InvalidField, match="does not say which network it is for"):
        build("", 32, start=start)


def test_two_copies_of_which_none_is_preferred_are_refused(tmp_path: Path) -> None:
    state = plain(trained(VIT))
    start = saved(tmp_path / "a.pth", behind("left.", state) | behind("right.", state))
    with pytest.raises(InvalidField, match=r"more than once \(behind 'left.', 'right.'\)"):
        build(VIT, 32, start=start)


def test_a_path_that_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound, match="Weights 'imagnet' not found; give 'imagenet', 'starter'"):
        build("resnet18", 32, start="imagnet")


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"holds neither checkpoints/best.pt nor"):
        build("resnet18", 32, start=str(tmp_path))


def test_a_bundle_is_refused_because_it_is_onnx(tiny_folder: Path) -> None:
    with pytest.raises(InvalidField, match=r"is an encoder bundle.*the run that it was exported from"):
        build("resnet18", 32, start=str(tiny_folder))


class Anything:
    pass


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (b"", b"not weights at all", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        with pytest.raises(BadRequest, match=r"holds no weights|cannot be read as weights"):
            build("resnet18", 32, start=str(path))
    whole = Path(saved(path, plain(trained(VIT)))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRequest, match="is it complete"):
        build(VIT, 32, start=str(path))
    with pytest.raises(BadRequest, match="holds no tensors"):
        build("resnet18", 32, start=saved(path, {"epoch": 3}))
    with pytest.raises(BadRequest, match=r"holds a Python object \(\S*Anything\), which could run code"):
        build("resnet18", 32, start=saved(path, {"config": Anything()}))
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(BadRequest, match="cannot be read"):
        build("resnet18", 32, start=str(tmp_path / "a.safetensors"))
