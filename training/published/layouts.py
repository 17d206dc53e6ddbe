"""How each method's authors name the tensors in their files, as small rules.

A layout says by which names a file is known, where in it the network lies whose features the paper evaluates,
how its names become torchvision's or timm's, and what everything else in the file is. A tensor that nothing
explains is an error, as is (in `training.backbones.loading`) one that the network misses.

Sources, read for names and shapes: the authors' repositories that `training.published.table` links, and for
SimCLR the converters github.com/tonylins/simclr-converter and github.com/Separius/SimCLRv2-Pytorch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from embedserve.errors import InvalidField

__all__ = ["LAYOUTS", "Layout", "Rule", "sniff", "take"]


def hwio(weight: Tensor) -> Tensor:
    """A convolution of TensorFlow or JAX, [height, width, in, out] → [out, in, height, width]."""
    return weight.permute(3, 2, 0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class Rule:
    """Names that match `pattern` in whole become `name` (as `re.Match.expand` reads it)."""

    pattern: str
    name: str
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Regular expressions over names; those of nested dictionaries are joined by dots."""

    owner: str
    """Whose files look so: "MoCo v2's"."""
    marks: tuple[str, ...]
    """A file is of this layout if each of these is the whole name of one of its tensors."""
    network: str
    """What comes before the network's names."""
    head: str = ""
    """Names behind `network` that are attached to its end: projection, prediction, classes."""
    rest: Mapping[str, str] | None = None
    """What the names of all else begin with → what it is."""
    rules: tuple[Rule, ...] = ()
    """The first that matches renames; with none, names stay."""
    finish: Callable[[dict[str, Tensor]], None] | None = None
    """What rules on single tensors cannot say."""

    @property
    def foreign(self) -> bool:
        """Whether names differ from torchvision's and timm's."""
        return bool(self.rules)


def sniff(names: Iterable[str]) -> Layout | None:
    """The layout that a file with tensors of these names has."""
    names = list(names)
    for layout in LAYOUTS:
        if all(any(re.fullmatch(mark, name) for name in names) for mark in layout.marks):
            return layout
    return None


def take(layout: Layout, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The network's tensors under torchvision's or timm's names.

    Raises:
        InvalidField: Tensors that the layout does not explain; the first few are named.
    """
    found: dict[str, Tensor] = {}
    unexplained = []
    for name, tensor in tensors.items():
        inside = re.match(layout.network, name)
        if inside is None:
            if not any(re.match(start, name) for start in layout.rest or ()):
                unexplained.append(name)
            continue
        own = name[inside.end() :]
        if layout.head and re.match(layout.head, own):
            continue
        for rule in layout.rules:
            match = re.fullmatch(rule.pattern, own)
            if match:
                found[match.expand(rule.name)] = rule.change(tensor) if rule.change else tensor
                break
        else:
            if layout.rules:
                unexplained.append(name)
            else:
                found[own] = tensor
    if unexplained:
        raise InvalidField(
            f"{origin} is {layout.owner}, but {len(unexplained)} of its {len(tensors)} tensors are not known "
            f"there ({', '.join(unexplained[:3])}{', …' if len(unexplained) > 3 else ''}). Give the file as "
            "its authors published it.",
            param="weights",
        )
    if layout.finish:
        layout.finish(found)
    return found


OPTIMIZER = {r"optimizer\.": "the optimiser's state", r"(scaler|fp16_scaler|amp)\.": "the loss scale"}

PLAIN = Layout("a plain ResNet's, torchvision's names without a class layer", (r"conv1\.weight",), "")

CLASSIFIER = Layout(
    "a ResNet classifier's, torchvision's names", (r"conv1\.weight", r"fc\.weight"), "", head=r"fc\."
)

MOCO_V1 = Layout(
    "MoCo v1's",
    (r"state_dict\.module\.encoder_q\.conv1\.weight", r"state_dict\.module\.encoder_q\.fc\.weight"),
    r"state_dict\.module\.encoder_q\.",
    head=r"fc\.",
    rest={
        r"state_dict\.module\.encoder_k\.": "the momentum encoder",
        r"state_dict\.module\.queue": "the queue of keys",
        **OPTIMIZER,
    },
)

MOCO_V2 = Layout(
    "MoCo v2's",
    (r"state_dict\.module\.encoder_q\.conv1\.weight", r"state_dict\.module\.encoder_q\.fc\.2\.weight"),
    MOCO_V1.network,
    head=MOCO_V1.head,
    rest=MOCO_V1.rest,
)

MOCO_V3_REST = {
    r"state_dict\.module\.momentum_encoder\.": "the momentum encoder",
    r"state_dict\.module\.predictor\.": "the predictor",
    **OPTIMIZER,
}

MOCO_V3 = Layout(
    "MoCo v3's of a ResNet",
    (r"state_dict\.module\.base_encoder\.conv1\.weight",),
    r"state_dict\.module\.base_encoder\.",
    head=r"fc\.",
    rest=MOCO_V3_REST,
)

MOCO_V3_VIT = Layout(
    "MoCo v3's of a vision transformer",
    (r"state_dict\.module\.base_encoder\.patch_embed\.proj\.weight",),
    MOCO_V3.network,
    head=r"head\.",
    rest=MOCO_V3_REST,
)

SIMSIAM = Layout(
    "SimSiam's",
    (r"state_dict\.module\.encoder\.conv1\.weight", r"state_dict\.module\.predictor\.0\.weight"),
    r"state_dict\.module\.encoder\.",
    head=r"fc\.",
    rest={r"state_dict\.module\.predictor\.": "the predictor", **OPTIMIZER},
)

SWAV = Layout(
    "SwAV's",
    (r"(state_dict\.)?module\.conv1\.weight", r"(state_dict\.)?module\.prototypes\.(prototypes\d+\.)?weight"),
    r"(state_dict\.)?module\.",
    head=r"(projection_head|prototypes)\.",
    rest=OPTIMIZER,
)
"""Of DeepCluster-v2 and SeLa-v2 as well, which the same authors published."""

BARLOW_TWINS = Layout(
    "Barlow Twins' full checkpoint's",
    (r"model\.module\.backbone\.conv1\.weight", r"model\.module\.bn\.running_mean"),
    r"model\.module\.backbone\.",
    rest={r"model\.module\.(projector|bn)\.": "the projector", **OPTIMIZER},
)

VICREG = Layout(
    "VICReg's full checkpoint's",
    (r"model\.module\.backbone\.conv1\.weight", r"model\.module\.projector\.0\.bias"),
    r"model\.module\.backbone\.",
    rest={r"model\.module\.projector\.": "the projector", **OPTIMIZER},
)

DENSECL = Layout("DenseCL's", (r"state_dict\.conv1\.weight",), r"state_dict\.")
"""What its authors' script cuts out of a checkpoint of theirs, as they published it."""

DENSECL_FULL = Layout(
    "DenseCL's full checkpoint's",
    (r"state_dict\.backbone\.conv1\.weight", r"state_dict\.queue2"),
    r"state_dict\.backbone\.",
    rest={
        r"state_dict\.encoder_q\.0\.": "the same network once more",
        r"state_dict\.encoder_q\.1\.": "the projections",
        r"state_dict\.encoder_k\.": "the momentum encoder",
        r"state_dict\.queue": "the queues of keys",
        **OPTIMIZER,
    },
)

DINO_VIT = Layout("DINO's of a vision transformer", (r"patch_embed\.proj\.weight", r"cls_token"), "")

DINO_FULL = Layout(
    "DINO's full checkpoint's",
    (r"teacher\.(module\.)?backbone\.(conv1|patch_embed\.proj)\.weight",),
    r"teacher\.(module\.)?backbone\.",
    head=r"(fc|head)\.",
    rest={
        r"teacher\.(module\.)?head\.": "the teacher's projection",
        r"student\.": "the student, of which the teacher is the average",
        r"dino_loss\.": "the centre",
        **OPTIMIZER,
    },
)


def _class_position_into_token(found: dict[str, Tensor]) -> None:
    """timm gives the patches of a network with registers positions and the class token none."""
    if "reg_token" in found and "pos_embed" in found and "cls_token" in found:
        positions = found["pos_embed"]
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["pos_embed"] = positions[:, 1:]


DINO_V2 = Layout(
    "DINOv2's",
    (r"patch_embed\.proj\.weight", r"blocks\.0\.ls1\.gamma", r"mask_token"),
    "",
    rules=(
        Rule(r"register_tokens", "reg_token"),
        Rule(r"(blocks\.\d+\.mlp)\.w12\.(weight|bias)", r"\1.fc1.\2"),
        Rule(r"(blocks\.\d+\.mlp)\.w3\.(weight|bias)", r"\1.fc2.\2"),
        Rule(r"((?:cls_token|pos_embed|mask_token|patch_embed\.|blocks\.\d+\.|norm\.).*)", r"\1"),
    ),
    finish=_class_position_into_token,
)

SIMCLR = Layout(
    "SimCLR's as simclr-converter writes it",
    (r"state_dict\.conv1\.weight", r"state_dict\.fc\.weight"),
    r"state_dict\.",
    head=r"fc\.",
)

BLOCK = r"net\.([1-4])\.blocks\.(\d+)\."


def _in_block(theirs: str, ours: str) -> Rule:
    # Stages are counted from 1 by both, so that net.1 is layer1.
    return Rule(rf"{BLOCK}{theirs}\.(\w+)", rf"layer\1.\2.{ours}.\3")


BLOCK_RULES = (
    _in_block(r"net\.0", "conv1"),
    _in_block(r"net\.1\.0", "bn1"),
)

SIMCLR_V2 = Layout(
    "SimCLRv2's as SimCLRv2-Pytorch writes it",
    (r"resnet\.net\.0\.0\.weight", r"resnet\.net\.1\.blocks\.0\.projection\.shortcut\.weight"),
    r"resnet\.",
    head=r"fc\.",
    rest={r"head\.": "the projection"},
    rules=(
        Rule(r"net\.0\.0\.(\w+)", r"conv1.\1"),
        Rule(r"net\.0\.1\.0\.(\w+)", r"bn1.\1"),
        *BLOCK_RULES,
        _in_block(r"net\.2", "conv2"),
        _in_block(r"net\.3\.0", "bn2"),
        _in_block(r"net\.4", "conv3"),
        _in_block(r"net\.5\.0", "bn3"),
        _in_block(r"projection\.shortcut", "downsample.0"),
        _in_block(r"projection\.bn\.0", "downsample.1"),
    ),
)

SIMCLR_V2_SK = Layout(
    "SimCLRv2's with selective kernels as SimCLRv2-Pytorch writes it",
    (r"resnet\.net\.0\.0\.weight", r"resnet\.net\.1\.blocks\.0\.net\.2\.main_conv\.0\.weight"),
    r"resnet\.",
    head=r"fc\.",
    rest=SIMCLR_V2.rest,
    rules=(
        Rule(r"net\.0\.0\.(\w+)", r"conv1.0.\1"),
        Rule(r"net\.0\.1\.0\.(\w+)", r"conv1.1.\1"),
        Rule(r"net\.0\.2\.(\w+)", r"conv1.3.\1"),
        Rule(r"net\.0\.3\.0\.(\w+)", r"conv1.4.\1"),
        Rule(r"net\.0\.4\.(\w+)", r"conv1.6.\1"),
        Rule(r"net\.0\.5\.0\.(\w+)", r"bn1.\1"),
        *BLOCK_RULES,
        _in_block(r"net\.2\.main_conv\.0", "conv2.streams"),
        _in_block(r"net\.2\.main_conv\.1\.0", "conv2.streams_bn"),
        _in_block(r"net\.2\.mixing_conv\.0", "conv2.narrow"),
        _in_block(r"net\.2\.mixing_conv\.1\.0", "conv2.narrow_bn"),
        _in_block(r"net\.2\.mixing_conv\.2", "conv2.mix"),
        _in_block(r"net\.3", "conv3"),
        _in_block(r"net\.4\.0", "bn3"),
        _in_block(r"projection\.shortcut\.2", "downsample.1"),
        _in_block(r"projection\.bn\.0", "downsample.2"),
    ),
)


def _haiku(theirs: str, conv: str, norm: str) -> Iterator[Rule]:
    """A convolution, and the batch norm behind it with its running averages, by haiku's names for both."""
    where = theirs.format(kind="conv")
    yield Rule(rf"{where}\.w", f"{conv}.weight", hwio)
    where = theirs.format(kind="batchnorm")
    yield Rule(rf"{where}\.scale", f"{norm}.weight", Tensor.flatten)
    yield Rule(rf"{where}\.offset", f"{norm}.bias", Tensor.flatten)
    for average in ("mean", "var"):
        yield Rule(rf"{where}/~/{average}_ema\.average", f"{norm}.running_{average}", Tensor.flatten)


def _byol_rules() -> Iterator[Rule]:
    yield from _haiku(r".*/initial_{kind}(?:_1)?", "conv1", "bn1")
    for stage in range(4):
        block, layer = rf".*/block_group_{stage}/.*block_(\d+)/~/", rf"layer{stage + 1}.\1"
        yield from _haiku(block + "shortcut_{kind}", f"{layer}.downsample.0", f"{layer}.downsample.1")
        for i in range(3):
            yield from _haiku(block + f"{{kind}}_{i}", f"{layer}.conv{i + 1}", f"{layer}.bn{i + 1}")


BYOL = Layout(
    "BYOL's",
    (r"experiment_state\.online_params\..*/initial_conv(_1)?\.w",),
    r"experiment_state\.online_(params|state)\.",
    head=r"(projector|predictor|classifier)\b|.*_ema\.(hidden|counter)$",
    rest={
        r"experiment_state\.target_": "the target network, the average of the other",
        r"experiment_state\.opt_state": "the optimiser's state",
        r"(rng|step)$": "the state of the random numbers",
    },
    rules=tuple(_byol_rules()),
)

LAYOUTS = (
    MOCO_V1, MOCO_V2, MOCO_V3, MOCO_V3_VIT, SIMSIAM, SWAV, BARLOW_TWINS, VICREG, DENSECL_FULL, DINO_FULL,
    BYOL, SIMCLR_V2, SIMCLR_V2_SK, SIMCLR, DENSECL, DINO_V2, DINO_VIT, CLASSIFIER, PLAIN,
)  # fmt: skip
"""A file is of the first one whose marks it bears: those that say less come last."""
