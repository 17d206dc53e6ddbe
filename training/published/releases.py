"""The methods whose authors published checkpoints: licence, preprocessing and file layout of each.

A licence is that of the repository that publishes the files; where it forbids commercial use, or says two
things, `notes` says so and the model card repeats it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embedserve.bundle import Preprocessing
from training.published import layouts
from training.published.layouts import Layout

__all__ = ["Release"]

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)

SIZE = 224
BILINEAR = Preprocessing(height=SIZE, width=SIZE, resize_to=256, interpolation="bilinear")
BICUBIC = Preprocessing(height=SIZE, width=SIZE, resize_to=256, interpolation="bicubic")

NON_COMMERCIAL = "Its licence forbids commercial use."
TENSORFLOW = (
    "Its authors resize in TensorFlow without a low-pass filter. Serving resizes with one, as Pillow does; "
    "vectors of large images differ slightly from theirs."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What the checkpoints of one method have in common."""

    method: str
    title: str
    paper: str
    page: str
    """Where the authors publish the files."""
    licence: str
    layouts: tuple[Layout, ...]
    """That of the published file, then others that hold the same network."""
    preprocessing: Preprocessing = BILINEAR
    """How its authors evaluate on ImageNet."""
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    """Of RGB values 0..1."""
    vector: Literal["pooled features", "class token"] = "pooled features"
    """What the figures were measured on, or the part of it that one forward pass gives."""
    notes: tuple[str, ...] = ()
    converter: str = ""
    """The program that turns the authors' format into the file that is read here."""


MOCO_NOTES = (
    NON_COMMERCIAL,
    "Its README says CC-BY-NC-4.0, headers of its code have said MIT since 2023; the stricter is named here.",
)
MOCO_V1 = Release(
    method="moco_v1",
    title="MoCo v1",
    paper="arXiv:1911.05722",
    page="https://github.com/facebookresearch/moco",
    licence="CC-BY-NC-4.0",
    layouts=(layouts.MOCO_V1,),
    notes=MOCO_NOTES,
)
MOCO_V2 = Release(
    method="moco_v2",
    title="MoCo v2",
    paper="arXiv:2003.04297",
    page=MOCO_V1.page,
    licence="CC-BY-NC-4.0",
    layouts=(layouts.MOCO_V2,),
    notes=MOCO_NOTES,
)
MOCO_V3 = Release(
    method="moco_v3",
    title="MoCo v3",
    paper="arXiv:2104.02057",
    page="https://github.com/facebookresearch/moco-v3/blob/main/CONFIG.md",
    licence="CC-BY-NC-4.0",
    layouts=(layouts.MOCO_V3,),
    notes=(NON_COMMERCIAL,),
)
MOCO_V3_VIT = Release(
    method="moco_v3",
    title="MoCo v3",
    paper=MOCO_V3.paper,
    page=MOCO_V3.page,
    licence="CC-BY-NC-4.0",
    layouts=(layouts.MOCO_V3_VIT,),
    vector="class token",
    notes=(NON_COMMERCIAL,),
)
SIMCLR = Release(
    method="simclr",
    title="SimCLR",
    paper="arXiv:2002.05709",
    page="https://github.com/google-research/simclr",
    licence="Apache-2.0",
    layouts=(layouts.SIMCLR,),
    preprocessing=BICUBIC,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    notes=(TENSORFLOW,),
    converter="https://github.com/tonylins/simclr-converter",
)
SIMCLR_V2 = Release(
    method="simclr_v2",
    title="SimCLRv2",
    paper="arXiv:2006.10029",
    page="https://console.cloud.google.com/storage/browser/simclr-checkpoints/simclrv2/pretrained",
    licence="Apache-2.0",
    layouts=(layouts.SIMCLR_V2, layouts.SIMCLR_V2_SK),
    preprocessing=BICUBIC,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    notes=(TENSORFLOW,),
    converter="https://github.com/Separius/SimCLRv2-Pytorch",
)
BYOL = Release(
    method="byol",
    title="BYOL",
    paper="arXiv:2006.07733",
    page="https://github.com/google-deepmind/deepmind-research/tree/master/byol",
    licence="Apache-2.0",
    layouts=(layouts.BYOL, layouts.CLASSIFIER),
    preprocessing=BICUBIC,
    notes=(TENSORFLOW,),
)
"""The second layout is what github.com/chigur/byol-convert writes."""


def _swav(method: str, title: str, paper: str) -> Release:
    return Release(
        method=method,
        title=title,
        paper=paper,
        page="https://github.com/facebookresearch/swav",
        licence="CC-BY-NC-4.0",
        layouts=(layouts.SWAV,),
        std=(0.228, 0.224, 0.225),  # as in their code, for evaluation too
        notes=(NON_COMMERCIAL,),
    )


SWAV = _swav("swav", "SwAV", "arXiv:2006.09882")
DEEPCLUSTER_V2 = _swav("deepcluster_v2", "DeepCluster-v2", "arXiv:2006.09882")
SELA_V2 = _swav("sela_v2", "SeLa-v2", "arXiv:2006.09882")
BARLOW_TWINS = Release(
    method="barlow_twins",
    title="Barlow Twins",
    paper="arXiv:2103.03230",
    page="https://github.com/facebookresearch/barlowtwins",
    licence="MIT",
    layouts=(layouts.PLAIN, layouts.BARLOW_TWINS),
)
VICREG = Release(
    method="vicreg",
    title="VICReg",
    paper="arXiv:2105.04906",
    page="https://github.com/facebookresearch/vicreg",
    licence="MIT",
    layouts=(layouts.PLAIN, layouts.VICREG),
)
SIMSIAM = Release(
    method="simsiam",
    title="SimSiam",
    paper="arXiv:2011.10566",
    page="https://github.com/facebookresearch/simsiam",
    licence="CC-BY-NC-4.0",
    layouts=(layouts.SIMSIAM,),
    notes=(NON_COMMERCIAL,),
)
DENSECL = Release(
    method="densecl",
    title="DenseCL",
    paper="arXiv:2011.09157",
    page="https://github.com/WXinlong/DenseCL",
    licence="GPL-3.0-only",
    layouts=(layouts.DENSECL, layouts.DENSECL_FULL),
    notes=("GPL-3.0 is the licence of its code; none is stated for the weights: ask its authors.",),
)
DINO = Release(
    method="dino",
    title="DINO",
    paper="arXiv:2104.14294",
    page="https://github.com/facebookresearch/dino",
    licence="Apache-2.0",
    layouts=(layouts.PLAIN, layouts.DINO_FULL),
    preprocessing=BICUBIC,
)
DINO_VIT = Release(
    method="dino",
    title="DINO",
    paper=DINO.paper,
    page=DINO.page,
    licence="Apache-2.0",
    layouts=(layouts.DINO_VIT, layouts.DINO_FULL),
    preprocessing=BICUBIC,
    vector="class token",
    notes=(
        "The vector is the class token behind the last norm, as in the authors' k-NN. Their linear figure is "
        "of the class tokens of the last four blocks (ViT-S), or of class token and patch mean (ViT-B).",
    ),
)
DINO_V2 = Release(
    method="dinov2",
    title="DINOv2",
    paper="arXiv:2304.07193",
    page="https://github.com/facebookresearch/dinov2",
    licence="Apache-2.0",
    layouts=(layouts.DINO_V2,),
    preprocessing=BICUBIC,
    vector="class token",
)
DINO_V2_REG = Release(
    method="dinov2",
    title="DINOv2 with registers",
    paper="arXiv:2309.16588",
    page=DINO_V2.page,
    licence="Apache-2.0",
    layouts=(layouts.DINO_V2,),
    preprocessing=BICUBIC,
    vector="class token",
)
