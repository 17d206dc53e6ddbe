"""ResNets of other widths and paddings, against torchvision's and against their definitions written out."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from embedserve.errors import InvalidField  # noqa: E402
from tests.training.published import authors, literal  # noqa: E402
from training.backbones import build, describe, kind_of  # noqa: E402
from training.backbones.convolutional import ResNet  # noqa: E402
from training.backbones.widened import SameConv2d, SameMaxPool2d, SelectiveKernel, ShortcutPool, parse  # noqa: E402


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_of_single_width_it_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = authors.resnet(1, 1, 1, 1)
    ours = build("resnet14x1", 224).eval()
    assert list(ours.network.state_dict()) == list(theirs.state_dict())
    ours.network.load_state_dict(theirs.state_dict())
    images = maps(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.network(images), theirs(images))


def test_a_width_multiplies_every_channel() -> None:
    single, double = (build(name, 224).network.state_dict() for name in ("resnet14x1", "resnet14x2"))
    assert list(single) == list(double)
    for name, tensor in single.items():
        wide = [2 * side if place < 2 else side for place, side in enumerate(tensor.shape)]
        assert list(double[name].shape) == ([128, 3, 7, 7] if name == "conv1.weight" else wide), name


@pytest.mark.parametrize("side", [7, 8, 9, 10])
@torch.no_grad()
def test_same_padding_is_tensorflows_for_even_and_odd_sides(side: int) -> None:
    images = maps(1, 2, side, side + 1).abs()
    for kernel in (3, 7):
        conv = SameConv2d(2, 3, kernel, 2, bias=False)
        expected = F.conv2d(literal.same(images, kernel, 2), conv.weight, stride=2)
        assert expected.shape[2:] == (-(-side // 2), -(-(side + 1) // 2))
        torch.testing.assert_close(conv(images), expected)
    assert torch.equal(SameMaxPool2d()(images), F.max_pool2d(literal.same(images, 3, 2), 3, 2))


@pytest.mark.parametrize("side", [4, 5])
def test_the_mean_of_a_shortcut_leaves_out_what_is_beyond_the_edge_or_counts_it_as_tensorflow_does(
    side: int,
) -> None:
    image = maps(1, 1, side, side)
    for stride in (1, 2):
        pooled = ShortcutPool(stride)(image)[0, 0]
        for row in range(pooled.shape[0]):
            for column in range(pooled.shape[1]):
                window = image[0, 0, row * stride : row * stride + 2, column * stride : column * stride + 2]
                # With stride 1 the library pads; with stride 2 the authors do, with zeros that count.
                expected = window.mean() if stride == 1 else window.sum() / 4
                torch.testing.assert_close(pooled[row, column], expected)


@torch.no_grad()
def test_selective_kernels_mix_two_streams_channel_by_channel() -> None:
    torch.manual_seed(1)
    kernel = authors.unsettled(SelectiveKernel(8, 2)).eval()
    assert kernel.narrow.out_channels == 32
    images = maps(2, 8, 6, 6)
    streams = torch.relu(kernel.streams_bn(kernel.streams(images)))
    expected = torch.zeros(2, 8, 3, 3)
    for item in range(2):
        first, second = streams[item, :8], streams[item, 8:]
        seen = (first + second).mean((1, 2))[None, :, None, None]
        logits = kernel.mix(torch.relu(kernel.narrow_bn(kernel.narrow(seen)))).flatten()
        for channel in range(8):
            share = torch.softmax(logits[[channel, channel + 8]], 0)
            expected[item, channel] = share[0] * first[channel] + share[1] * second[channel]
    torch.testing.assert_close(kernel(images), expected)


@pytest.mark.parametrize(
    "name", ["resnet14x1", "resnet14x1-byol", "resnet14x1-simclr", "resnet14x1-simclr-sk"]
)
def test_every_form_trains_at_small_and_large_sizes(name: str) -> None:
    torch.manual_seed(0)
    for size, stem in ((32, "small"), (128, "large")):
        backbone = build(name, size)
        assert isinstance(backbone, ResNet)
        assert describe(backbone)["stem"] == stem
        assert backbone.name == name
        assert kind_of(name) == "conv"
        features, patches = backbone.features(torch.rand(2, 3, size, size))
        assert features.shape == (2, 2048)
        assert patches.shape == (2, 2048, 4, 4)
        features.sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_large_stem_comes_back_as_it_was() -> None:
    for name in ("resnet14x1-byol", "resnet14x1-simclr-sk"):
        backbone = build(name, 32)
        assert isinstance(backbone, ResNet)
        backbone.set_stem("large")
        whole = build(name, 224)
        shapes = [{key: tensor.shape for key, tensor in b.state_dict().items()} for b in (backbone, whole)]
        assert shapes[0] == shapes[1]
        assert isinstance(backbone.network.maxpool, SameMaxPool2d)


def test_residual_branches_start_at_zero() -> None:
    block = build("resnet26x1", 224).network.layer2[1]
    images = maps(1, 512, 4, 4).abs()
    assert isinstance(block.bn3, nn.BatchNorm2d)
    assert torch.equal(block(images), images)


def test_names_that_mean_no_network_are_refused() -> None:
    assert parse("resnet50x2") is not None
    for name in (
        "resnet50",
        "resnet49x1",
        "resnet50x0",
        "resnet50x1-sk",
        "resnet50x1-byol-sk",
        "wide_resnet50_2",
    ):
        assert parse(name) is None
    with pytest.raises(InvalidField, match="Backbone 'resnet49x1' not found"):
        build("resnet49x1", 224)
