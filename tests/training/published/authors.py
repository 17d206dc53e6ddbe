"""Checkpoints as each method's authors save them: wrappers, heads, second networks, optimiser's state."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training import torchvision_ops

__all__ = ["RESNETS", "State", "converted_simclr_v2", "named", "resnet", "transformer_file"]

State = dict[str, Tensor]


def resnet(*blocks: int) -> nn.Module:
    """torchvision's ResNet of bottlenecks without `fc`, in eval mode, whose every number plays a part."""
    torchvision_ops.register()
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, list(blocks)).eval()
    network.fc = nn.Identity()
    return unsettled(network)


FAINT = ("token", "tokens", "qkv.weight")
"""What starts so small that it would hardly play a part: heads would all look everywhere."""


def unsettled(network: nn.Module) -> nn.Module:
    """With numbers for everything that starts at zero or one."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "gamma")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and (tensor.ndim < 2 or name.endswith(FAINT)):
                tensor.normal_(0, 0.2)
    return network


def named(prefix: str, module: nn.Module) -> State:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def other(network: nn.Module) -> nn.Module:
    """The other network of a pair: the same names, other numbers."""
    return _Named({name: tensor + 1 for name, tensor in network.state_dict().items()})


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def sgd(rate: Any = 0.03) -> dict[str, Any]:
    """State after one step. SwAV and DINO set numpy's numbers as learning rates."""
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    return optimizer.state_dict()


def moco(head: nn.Module) -> Callable[[nn.Module], Any]:
    def write(network: nn.Module) -> Any:
        momentum = other(network)
        state = named("module.encoder_q.", network) | named("module.encoder_q.fc.", head)
        state |= named("module.encoder_k.", momentum) | named("module.encoder_k.fc.", other(head))
        state |= {"module.queue": torch.rand(8, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": sgd()}

    return write


def moco_v3(network: nn.Module, head: str = "fc") -> Any:
    projection = nn.Sequential(
        nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4, bias=False),
        nn.BatchNorm1d(4, affine=False),
    )  # fmt: skip
    state = named("module.base_encoder.", network) | named(f"module.base_encoder.{head}.", projection)
    state |= named("module.momentum_encoder.", other(network))
    state |= named(f"module.momentum_encoder.{head}.", other(projection))
    state |= named("module.predictor.", mlp(4, 8, 4, bias=False))
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": sgd(), "scaler": scaler,
    }  # fmt: skip


def simsiam(network: nn.Module) -> Any:
    state = named("module.encoder.", network) | named("module.encoder.fc.", mlp(8, 8, 8, 8))
    state |= named("module.predictor.", mlp(8, 4, 8))
    return {"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": sgd()}


def swav(network: nn.Module) -> Any:
    state = named("module.", network) | named("module.projection_head.", mlp(8, 8, 4))
    return state | {"module.prototypes.weight": torch.rand(30, 4)}


def swav_in_training(network: nn.Module) -> Any:
    return {
        "epoch": 800,
        "state_dict": swav(network),
        "optimizer": sgd(np.float64(0.5)),
        "amp": {"loss_scaler0": {"loss_scale": 1024.0, "unskipped": 3}},
    }


def deepcluster(network: nn.Module) -> Any:
    state = swav(network)
    del state["module.prototypes.weight"]
    return state | {f"module.prototypes.prototypes{i}.weight": torch.rand(30, 4) for i in range(3)}


def backbone_alone(network: nn.Module) -> Any:
    return dict(network.state_dict())


def barlow_twins(network: nn.Module) -> Any:
    state = named("module.backbone.", network) | named("module.projector.", mlp(8, 8, 8, bias=False))
    state |= named("module.bn.", nn.BatchNorm1d(8, affine=False))
    return {"epoch": 1000, "model": state, "optimizer": sgd()}


def vicreg(network: nn.Module) -> Any:
    state = named("module.backbone.", network) | named("module.projector.", mlp(8, 8, 8))
    return {"epoch": 1000, "model": state, "optimizer": sgd()}


def densecl(network: nn.Module) -> Any:
    return {"state_dict": dict(network.state_dict()), "author": "DenseCL"}


def densecl_in_training(network: nn.Module) -> Any:
    neck = nn.ModuleDict({"mlp": mlp(8, 8), "mlp2": nn.Sequential(nn.Conv2d(8, 8, 1))})
    state = named("encoder_q.0.", network) | named("encoder_q.1.", neck)
    state |= named("encoder_k.0.", other(network)) | named("encoder_k.1.", other(neck))
    state |= named("backbone.", network)
    for queue in ("queue", "queue2"):
        state |= {queue: torch.rand(8, 16), f"{queue}_ptr": torch.zeros(1, dtype=torch.long)}
    meta = {"epoch": 200, "iter": 100, "mmcv_version": "1.0.3", "time": "Mon"}
    return {"meta": meta, "state_dict": state, "optimizer": sgd()}


def dino_in_training(network: nn.Module, teacher: str = "module.") -> Any:
    head = mlp(8, 8, 4)
    last = {"head.last_layer.weight_g": torch.ones(6, 1), "head.last_layer.weight_v": torch.rand(6, 4)}
    student = other(network)
    return {
        "student": named("module.backbone.", student)
        | named("module.head.mlp.", head)
        | {f"module.{name}": tensor for name, tensor in last.items()},
        "teacher": named(f"{teacher}backbone.", network)
        | named(f"{teacher}head.mlp.", other(head))
        | {f"{teacher}{name}": tensor for name, tensor in last.items()},
        "optimizer": sgd(np.float64(0.01)),
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.25)),
        "dino_loss": {"center": torch.rand(1, 6)},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 5},
    }


def converted_simclr(network: nn.Module) -> Any:
    return {"state_dict": dict(network.state_dict()) | named("fc.", nn.Linear(2048, 10))}


RESNETS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "MoCo v1": ("moco_v1/resnet50-200ep", moco(nn.Linear(8, 4))),
    "MoCo v2": ("moco_v2/resnet50-800ep", moco(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))),
    "MoCo v3": ("moco_v3/resnet50-1000ep", moco_v3),
    "SimSiam": ("simsiam/resnet50-100ep", simsiam),
    "SwAV": ("swav/resnet50-800ep", swav),
    "SwAV in training": ("swav/resnet50-400ep", swav_in_training),
    "DeepCluster-v2": ("deepcluster_v2/resnet50-800ep", deepcluster),
    "Barlow Twins": ("barlow_twins/resnet50-1000ep", backbone_alone),
    "Barlow Twins in training": ("barlow_twins/resnet50-1000ep", barlow_twins),
    "VICReg": ("vicreg/resnet50", backbone_alone),
    "VICReg in training": ("vicreg/resnet50", vicreg),
    "DenseCL": ("densecl/resnet50-imagenet-200ep", densecl),
    "DenseCL in training": ("densecl/resnet50-coco-800ep", densecl_in_training),
    "DINO": ("dino/resnet50", backbone_alone),
    "DINO in training": ("dino/resnet50", dino_in_training),
}
"""Form → a checkpoint that has it, and what writes it for a ResNet. SimCLR's pads in another way."""


def transformer_file(method: str, network: State) -> Any:
    """A vision transformer's names are its authors' own and timm's at once."""
    module = _Named(network)
    if method == "dino":
        return network
    return moco_v3(module, "head") if method == "moco_v3" else dino_in_training(module, "")


class _Named(nn.Module):
    """A module in name: its state is what it is given."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *_: Any, **__: Any) -> State:  # type: ignore[override]
        return self.state


def converted_simclr_v2(state: State, *, selective: bool) -> Any:
    """The names that SimCLRv2-Pytorch gives, from those of `training.backbones.widened`."""
    stem = {"conv1": "net.0.0", "bn1": "net.0.1.0"}
    block = {
        "downsample.0": "projection.shortcut", "downsample.1": "projection.bn.0", "conv1": "net.0",
        "bn1": "net.1.0", "conv2": "net.2", "bn2": "net.3.0", "conv3": "net.4", "bn3": "net.5.0",
    }  # fmt: skip
    if selective:
        stem = {
            "conv1.0": "net.0.0", "conv1.1": "net.0.1.0", "conv1.3": "net.0.2", "conv1.4": "net.0.3.0",
            "conv1.6": "net.0.4", "bn1": "net.0.5.0",
        }  # fmt: skip
        block = {
            "downsample.1": "projection.shortcut.2", "downsample.2": "projection.bn.0", "conv1": "net.0",
            "bn1": "net.1.0", "conv2.streams": "net.2.main_conv.0", "conv2.streams_bn": "net.2.main_conv.1.0",
            "conv2.narrow": "net.2.mixing_conv.0", "conv2.narrow_bn": "net.2.mixing_conv.1.0",
            "conv2.mix": "net.2.mixing_conv.2", "conv3": "net.3", "bn3": "net.4.0",
        }  # fmt: skip
    named_so = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("layer"):
            stage, number, inside = module.removeprefix("layer").split(".", 2)
            named_so[f"net.{stage}.blocks.{number}.{block[inside]}.{kind}"] = tensor
        else:
            named_so[f"{stem[module]}.{kind}"] = tensor
    named_so |= named("fc.", nn.Linear(4, 3))
    return {"resnet": named_so, "head": named("layers.", mlp(4, 4, 4, bias=False))}
