"""Checkpoints of self-supervised encoders that their authors published.

Figures are those of the authors' page; what it does not state is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from embedserve.errors import InvalidField, closest
from training.published import releases
from training.published.releases import Release

__all__ = ["NETWORKS", "TABLE", "Checkpoint", "find"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One published file."""

    release: Release
    name: str
    """Behind the method's, as the authors call it where they do."""
    network: str
    """As `training.backbones.build` takes it."""
    url: str
    """"" where the authors' own file has to be converted first."""
    epochs: int | None = None
    top1: float | None = None
    """Linear classification on ImageNet, percent, as the authors report it."""
    md5: str = ""
    """Its beginning, where the page states it."""
    size: str = ""
    """As the page states it."""
    positions: Literal["", "dino"] = ""
    """How positions are resampled to another grid; see `training.backbones.starting.Weights`."""

    @property
    def full_name(self) -> str:
        return f"{self.release.method}/{self.name}"

    @property
    def file(self) -> str:
        """The authors' name of the file."""
        return self.url.rpartition("/")[2]

    @property
    def cached_as(self) -> str:
        """Its name in torch.hub's cache. torch.hub knows files by their authors' name alone, and two methods
        call theirs `resnet50.pth`; here such files get the checkpoint's name."""
        if FILES[self.file] == 1:
            return self.file
        _, dot, suffix = self.file.partition(".")
        return f"{self.release.method}-{self.name}{dot}{suffix}"


NETWORKS = {
    "resnet50": (2048, 23.5),
    "resnet101": (2048, 42.5),
    "resnet50x1-byol": (2048, 23.5),
    "resnet50x1-simclr": (2048, 23.5),
    "resnet50x1-simclr-sk": (2048, 35.2),
    "resnet50x2": (4096, 93.9),
    "resnet50x2-simclr": (4096, 93.9),
    "resnet50x2-simclr-sk": (4096, 140.3),
    "resnet50x4": (8192, 375.4),
    "resnet50x4-simclr": (8192, 375.4),
    "resnet50x5": (10240, 586.5),
    "resnet101x1-simclr": (2048, 42.5),
    "resnet101x1-simclr-sk": (2048, 64.7),
    "resnet101x2-simclr": (4096, 169.8),
    "resnet101x2-simclr-sk": (4096, 257.1),
    "resnet152x1-simclr": (2048, 58.1),
    "resnet152x1-simclr-sk": (2048, 88.9),
    "resnet152x2-simclr": (4096, 232.3),
    "resnet152x2-simclr-sk": (4096, 353.4),
    "resnet152x3-simclr-sk": (6144, 794.7),
    "resnet200x2": (4096, 250.1),
    "resnet200x2-byol": (4096, 250.1),
    "vit_small_12heads/16": (384, 21.7),
    "vit_small/8": (384, 21.7),
    "vit_small/16": (384, 21.7),
    "vit_base/8": (768, 85.8),
    "vit_base/16": (768, 85.8),
    "vit_small_patch14_dinov2": (384, 21.6),
    "vit_base_patch14_dinov2": (768, 85.7),
    "vit_large_patch14_dinov2": (1024, 303.2),
    "vit_giant_patch14_dinov2": (1536, 1134.8),
    "vit_small_patch14_reg4_dinov2": (384, 21.6),
    "vit_base_patch14_reg4_dinov2": (768, 85.7),
    "vit_large_patch14_reg4_dinov2": (1024, 303.2),
    "vit_giant_patch14_reg4_dinov2": (1536, 1134.8),
}
"""Length of the vector, and millions of parameters without heads, for images of 224 pixels."""

MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
SWAV_URL = "https://dl.fbaipublicfiles.com/deepcluster"
DENSECL_URL = "https://huggingface.co/xinlongwang/DenseCL/resolve/main"
DINO_URL = "https://dl.fbaipublicfiles.com/dino"


def _moco_v3(name: str, network: str, folder: str, epochs: int, top1: float) -> Checkpoint:
    return Checkpoint(
        release=releases.MOCO_V3 if network == "resnet50" else releases.MOCO_V3_VIT,
        name=name,
        network=network,
        url=f"https://dl.fbaipublicfiles.com/moco-v3/{folder}/{folder}.pth.tar",
        epochs=epochs,
        top1=top1,
    )


def _simclr_v2() -> Iterator[Checkpoint]:
    for depth, width, plain, selective in (
        (50, 1, 71.7, 74.6),
        (50, 2, 75.6, 77.7),
        (101, 1, 73.6, 76.3),
        (101, 2, 77.0, 79.0),
        (152, 1, 74.5, 77.2),
        (152, 2, 77.4, 79.4),
        (152, 3, None, 79.8),
    ):
        for top1, sk, suffix in ((plain, 0, ""), (selective, 1, "-sk")):
            if top1:
                yield Checkpoint(
                    release=releases.SIMCLR_V2,
                    name=f"r{depth}_{width}x_sk{sk}",
                    network=f"resnet{depth}x{width}-simclr{suffix}",
                    url="",
                    top1=top1,
                )


def _swav_rows() -> Iterator[Checkpoint]:
    for release, name, network, epochs, top1, file in (
        (releases.SWAV, "resnet50-800ep", "resnet50", 800, 75.3, "swav_800ep"),
        (releases.SWAV, "resnet50-400ep", "resnet50", 400, 74.6, "swav_400ep"),
        (releases.SWAV, "resnet50-200ep", "resnet50", 200, 73.9, "swav_200ep"),
        (releases.SWAV, "resnet50-100ep", "resnet50", 100, 72.1, "swav_100ep"),
        (releases.SWAV, "resnet50-200ep-bs256", "resnet50", 200, 72.7, "swav_200ep_bs256"),
        (releases.SWAV, "resnet50-400ep-bs256", "resnet50", 400, 74.3, "swav_400ep_bs256"),
        (releases.SWAV, "resnet50-400ep-2x224", "resnet50", 400, 70.1, "swav_400ep_2x224"),
        (releases.SWAV, "resnet50w2-400ep", "resnet50x2", 400, 77.3, "swav_RN50w2_400ep"),
        (releases.SWAV, "resnet50w4-400ep", "resnet50x4", 400, 77.9, "swav_RN50w4_400ep"),
        (releases.SWAV, "resnet50w5-400ep", "resnet50x5", 400, 78.5, "swav_RN50w5_400ep"),
        (releases.DEEPCLUSTER_V2, "resnet50-800ep", "resnet50", 800, 75.2, "deepclusterv2_800ep"),
        (releases.DEEPCLUSTER_V2, "resnet50-400ep", "resnet50", 400, 74.3, "deepclusterv2_400ep"),
        (releases.DEEPCLUSTER_V2, "resnet50-400ep-2x224", "resnet50", 400, 70.2, "deepclusterv2_400ep_2x224"),
        (releases.SELA_V2, "resnet50-400ep", "resnet50", 400, 71.8, "selav2_400ep"),
        (releases.SELA_V2, "resnet50-400ep-2x224", "resnet50", 400, 67.2, "selav2_400ep_2x224"),
    ):
        url = f"{SWAV_URL}/{file}_pretrain.pth.tar"
        yield Checkpoint(release=release, name=name, network=network, url=url, epochs=epochs, top1=top1)


def _dino(name: str, network: str, folder: str, top1: float) -> Checkpoint:
    return Checkpoint(
        release=releases.DINO if network == "resnet50" else releases.DINO_VIT,
        name=name,
        network=network,
        url=f"{DINO_URL}/{folder}_pretrain/{folder}_pretrain.pth",
        top1=top1,
        positions="" if network == "resnet50" else "dino",
    )


def _dino_v2() -> Iterator[Checkpoint]:
    for letter, network, plain, registers in (
        ("s", "vit_small", 81.1, 80.9),
        ("b", "vit_base", 84.5, 84.6),
        ("l", "vit_large", 86.3, 86.7),
        ("g", "vit_giant", 86.5, 87.1),
    ):
        folder = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{letter}14/dinov2_vit{letter}14"
        yield Checkpoint(
            release=releases.DINO_V2,
            name=f"vit{letter}14",
            network=f"{network}_patch14_dinov2",
            url=f"{folder}_pretrain.pth",
            top1=plain,
            positions="dino",
        )
        yield Checkpoint(
            release=releases.DINO_V2_REG,
            name=f"vit{letter}14_reg",
            network=f"{network}_patch14_reg4_dinov2",
            url=f"{folder}_reg4_pretrain.pth",
            top1=registers,
        )


ROWS = (
    *(
        Checkpoint(
            release=releases.SIMCLR, name=f"resnet50_{w}x", network=f"resnet50x{w}-simclr", url="", top1=top1
        )
        for w, top1 in ((1, 69.1), (2, 74.2), (4, 76.6))
    ),
    *_simclr_v2(),
    *(
        Checkpoint(
            release=release,
            name=f"resnet50-{epochs}ep",
            network="resnet50",
            url=f"{MOCO}/{file}/{file}_pretrain.pth.tar",
            epochs=epochs,
            top1=top1,
            md5=md5,
        )
        for release, epochs, top1, md5, file in (
            (releases.MOCO_V1, 200, 60.6, "b251726a", "moco_v1_200ep"),
            (releases.MOCO_V2, 200, 67.7, "59fd9945", "moco_v2_200ep"),
            (releases.MOCO_V2, 800, 71.1, "a04e12f8", "moco_v2_800ep"),
        )
    ),
    _moco_v3("resnet50-100ep", "resnet50", "r-50-100ep", 100, 68.9),
    _moco_v3("resnet50-300ep", "resnet50", "r-50-300ep", 300, 72.8),
    _moco_v3("resnet50-1000ep", "resnet50", "r-50-1000ep", 1000, 74.6),
    _moco_v3("vit_small-300ep", "vit_small_12heads/16", "vit-s-300ep", 300, 73.2),
    _moco_v3("vit_base-300ep", "vit_base/16", "vit-b-300ep", 300, 76.7),
    *(
        Checkpoint(
            release=releases.BYOL,
            name=name,
            network=network,
            url=f"https://storage.googleapis.com/deepmind-byol/checkpoints/pretrain_{file}.pkl",
            top1=top1,
            size=size,
        )
        for name, network, file, top1, size in (
            ("resnet50", "resnet50x1-byol", "res50x1", 74.4, "570 MB"),
            ("resnet200x2", "resnet200x2-byol", "res200x2", 79.6, "4.6 GB"),
        )
    ),
    *_swav_rows(),
    Checkpoint(
        release=releases.BARLOW_TWINS,
        name="resnet50-1000ep",
        network="resnet50",
        url="https://dl.fbaipublicfiles.com/barlowtwins/ljng/resnet50.pth",
        epochs=1000,
        top1=73.5,
    ),
    *(
        Checkpoint(
            release=releases.VICREG,
            name=network,
            network=network,
            url=f"https://dl.fbaipublicfiles.com/vicreg/{network}.pth",
            top1=top1,
        )
        for network, top1 in (("resnet50", 73.2), ("resnet50x2", 75.5), ("resnet200x2", 77.3))
    ),
    *(
        Checkpoint(
            release=releases.SIMSIAM,
            name=f"resnet50-{folder.replace('256bs', 'bs256')}",
            network="resnet50",
            url=f"https://dl.fbaipublicfiles.com/simsiam/models/{folder}/pretrain/checkpoint_0099.pth.tar",
            epochs=100,
            top1=top1,
        )
        for folder, top1 in (("100ep", 68.1), ("100ep-256bs", 68.3))
    ),
    *(
        Checkpoint(
            release=releases.DENSECL,
            name=f"{network}-{data}-{epochs}ep",
            network=network,
            url=f"{DENSECL_URL}/densecl_{network.replace('esnet', '')}_{data}_{epochs}ep.pth",
            epochs=epochs,
        )
        for network, data, epochs in (
            ("resnet50", "imagenet", 200),
            ("resnet101", "imagenet", 200),
            ("resnet50", "coco", 800),
            ("resnet50", "coco", 1600),
        )
    ),
    _dino("resnet50", "resnet50", "dino_resnet50", 75.3),
    _dino("vits16", "vit_small/16", "dino_deitsmall16", 77.0),
    _dino("vits8", "vit_small/8", "dino_deitsmall8", 79.7),
    _dino("vitb16", "vit_base/16", "dino_vitbase16", 78.2),
    _dino("vitb8", "vit_base/8", "dino_vitbase8", 80.1),
    *_dino_v2(),
)

TABLE = {row.full_name: row for row in ROWS}
"""`METHOD/NAME` → the checkpoint."""

FILES = Counter(row.file for row in ROWS if row.url)


def find(name: str) -> Checkpoint:
    """The checkpoint of this name, with or without "published:" before it.

    Raises:
        InvalidField: There is none; the message has the closest, or all of the method.
    """
    name = name.removeprefix("published:")
    if name in TABLE:
        return TABLE[name]
    method = name.partition("/")[0]
    of_method = [known for known in TABLE if known.startswith(f"{method}/")]
    if of_method:
        hint = f"known of {method}: {', '.join(of_method)}."
    else:
        hint = f"{closest(name, TABLE)} All are listed in docs/published.md."
    raise InvalidField(f"Published checkpoint '{name}' not found; {hint}", param="source")
