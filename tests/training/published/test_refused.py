"""Files that are not what they are named, or not safe: a clear error, and no code run."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

from embedserve.errors import BadRequest, InvalidField  # noqa: E402
from tests.training.published import authors, haiku  # noqa: E402
from training.backbones import build  # noqa: E402
from training.backbones.loading import load  # noqa: E402
from training.published import find, read  # noqa: E402

SMALL = "resnet14x1"


def reading(name: str, content: Any, tmp_path: Path) -> None:
    """Reads a file with `content`, or with these bytes, as the published checkpoint `name`."""
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    weights = read(replace(find(name), network=SMALL), path)
    load(build(SMALL, 224), weights)


@pytest.mark.parametrize("form", authors.RESNETS)
def test_a_file_of_another_method_is_named_by_what_it_looks_like(
    tmp_path: Path, stem: nn.Module, form: str
) -> None:
    written, write = authors.RESNETS[form]
    # Sister methods share a layout, and so do all that publish a backbone alone.
    method = written.partition("/")[0]
    asked = "swav/resnet50-800ep" if method in {"simsiam", "moco_v1"} else "simsiam/resnet50-100ep"
    with pytest.raises(InvalidField) as caught:
        reading(asked, write(stem), tmp_path)
    message = str(caught.value)
    assert f"a.pth' is not the file of '{asked}': it looks like" in message
    whose = {
        "Barlow Twins": "a plain ResNet's", "VICReg": "a plain ResNet's", "DINO": "a plain ResNet's",
        "DeepCluster-v2": "SwAV's",
    }  # fmt: skip
    assert f"it looks like {whose.get(form, form.removesuffix(' in training'))}" in message
    assert find(asked).release.page in message


def test_moco_v1_and_v2_are_told_apart_by_their_heads(tmp_path: Path, stem: nn.Module) -> None:
    for name, form, other in (
        ("moco_v1/resnet50-200ep", "MoCo v2", "moco_v2"),
        ("moco_v2/resnet50-800ep", "MoCo v1", "moco_v1"),
    ):
        with pytest.raises(InvalidField, match=rf"it looks like {form}'s \(such as '{other}/"):
            reading(name, authors.RESNETS[form][1](stem), tmp_path)


def test_a_supervised_classifier_is_not_taken_for_a_backbone_alone(tmp_path: Path, stem: nn.Module) -> None:
    content = authors.backbone_alone(stem) | authors.named("fc.", nn.Linear(2048, 3))
    with pytest.raises(InvalidField, match="it looks like a ResNet classifier's, torchvision's names"):
        reading("vicreg/resnet50", content, tmp_path)


def test_a_file_that_nobody_here_writes_is_described(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidField, match=r"its tensors begin with model\.a, model\.b\. Give the file that is"
    ):
        reading("dino/resnet50", {"model": {"a": torch.ones(1), "b": torch.ones(1)}}, tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path, network: nn.Module) -> None:
    content = authors.RESNETS["MoCo v2"][1](network)
    del content["state_dict"]["module.encoder_q.layer1.0.conv2.weight"]  # the momentum encoder has one
    with pytest.raises(
        InvalidField, match=r"moco_v2/.*does not fit .* 1 missing \(layer1\.0\.conv2\.weight\)"
    ):
        reading("moco_v2/resnet50-800ep", content, tmp_path)


def test_a_missing_average_of_byols_is_named(tmp_path: Path, network: nn.Module) -> None:
    params, averages = haiku.state_of(network)
    del averages["res_net50/~/block_group_0/~/block_0/~/batchnorm_1/~/var_ema"]
    with pytest.raises(InvalidField, match=r"1 missing \(layer1\.0\.bn2\.running_var\)"):
        reading("byol/resnet50", haiku.checkpoint(params, averages), tmp_path)


def test_a_tensor_that_nothing_explains_is_named(tmp_path: Path, stem: nn.Module) -> None:
    content = authors.RESNETS["SimSiam"][1](stem)
    content["state_dict"]["module.second_encoder.conv1.weight"] = torch.ones(2)
    message = (
        r"is SimSiam's, but 1 of its \d+ tensors are not known there \(state_dict\.module\.second_encoder"
    )
    with pytest.raises(InvalidField, match=message):
        reading("simsiam/resnet50-100ep", content, tmp_path)
    params, averages = haiku.state_of(stem)
    params["res_net50/~/attention"] = {"w": np.ones(3, np.float32)}
    with pytest.raises(InvalidField, match=r"is BYOL's, but 1 of its .*res_net50/~/attention\.w\)"):
        reading("byol/resnet50", haiku.checkpoint(params, averages), tmp_path)


def test_a_network_of_another_depth_is_refused(tmp_path: Path) -> None:
    content = authors.RESNETS["DenseCL"][1](authors.resnet(1, 2, 1, 1))
    with pytest.raises(InvalidField, match=r"does not fit 'resnet14x1'.*left over \(layer2\.1\."):
        reading("densecl/resnet50-imagenet-200ep", content, tmp_path)


def test_a_file_without_tensors_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        BadRequest, match="holds no tensors; give the file of 'vicreg/resnet50' as it is publish"
    ):
        reading("vicreg/resnet50", {"epoch": 3}, tmp_path)


def test_a_truncated_file_is_a_clear_error(tmp_path: Path, stem: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(authors.RESNETS["DenseCL"][1](stem), file)
    pickled = haiku.checkpoint(*haiku.state_of(stem))
    for name, whole in (("densecl/resnet50-coco-800ep", file.getvalue()), ("byol/resnet50", pickled)):
        for length in (1, 2, 3, 100, 5000, len(whole) - 5000, len(whole) - 1):
            with pytest.raises(BadRequest, match=r"cannot be read as .*is it complete\?|holds no weights"):
                reading(name, whole[:length], tmp_path)


# Pickles that would run code


class Runs:
    """Unpickled in full, it would make a folder."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def attacks(trace: Path) -> dict[str, bytes]:
    make = Runs(os.mkdir, str(trace))
    array = np.ones(3, np.float32).__reduce__()
    return {
        "a call": pickle.dumps({"experiment_state": make}, protocol=2),
        "protocol 4": pickle.dumps({"experiment_state": make}, protocol=4),
        "eval": pickle.dumps(Runs(eval, f"__import__('os').mkdir({str(trace)!r})"), protocol=2),
        "getattr": pickle.dumps(Runs(getattr, "", "join"), protocol=2),
        "an old instance": b"\x80\x02(S'" + str(trace).encode() + b"'\nios\nmkdir\n.",
        "as state of an array": pickle.dumps(Runs(array[0], *array[1]), protocol=2)[:-1]
        + pickle.dumps(make, protocol=2)[2:-1]
        + b"b.",
        "in a scalar": b"\x80\x02cnumpy.core.multiarray\nscalar\n"
        + pickle.dumps(make, protocol=2)[2:-1]
        + b"U\x01a\x86R.",
        "as dill's array": b"\x80\x02cdill._dill\n_create_array\n(cos\nmkdir\n(U"
        + bytes([len(str(trace))]) + str(trace).encode() + b"tNNtR.",
        "by a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
        "from the registry": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02U\x01aQ.",
    }  # fmt: skip


@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_no_pickle_runs_code(tmp_path: Path, attack: str) -> None:
    trace = tmp_path / "trace"
    content = attacks(trace)[attack]
    for name in ("byol/resnet50", "moco_v2/resnet50-800ep"):
        with pytest.raises(BadRequest) as caught:
            reading(name, content, tmp_path)
        assert not trace.exists()
        assert "could run code" in str(caught.value) or "cannot be read as a pickle" in str(caught.value)


def test_the_attacks_would_work_on_an_open_door(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for attack in ("a call", "protocol 4", "eval", "an old instance"):
        pickle.loads(attacks(trace)[attack])
        trace.rmdir()


def test_a_torch_file_with_an_object_is_refused(tmp_path: Path, stem: nn.Module) -> None:
    content = authors.RESNETS["DenseCL"][1](stem) | {"meta": Runs(os.mkdir, str(tmp_path / "trace"))}
    with pytest.raises(
        BadRequest, match=r"holds a Python object \((posix|nt)\.mkdir\), which could run code"
    ):
        reading("densecl/resnet50-coco-800ep", content, tmp_path)
    assert not (tmp_path / "trace").exists()


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="an array of dtype 'O8'"):
        reading("byol/resnet50", pickle.dumps({"a": np.array([{}, 1], object)}, protocol=2), tmp_path)
