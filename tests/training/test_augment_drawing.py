"""What is drawn for a view: against torchvision's own draws, and what the rest of training relies on."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from training import torchvision_ops  # noqa: E402
from training.augment import Parameters, draw  # noqa: E402
from training.augment.drawing import HUE  # noqa: E402
from training.views import Augmentation, View  # noqa: E402

torchvision_ops.register()
from torchvision.transforms import v2  # noqa: E402

FIELDS = ("box", "flip", "factors", "hue", "order", "jitter", "gray", "sigma", "solarize")
MANY = 20_000


def drawn(view: View, aspect: float | Tensor = 1.0, count: int = MANY, seed: int = 0) -> Parameters:
    aspects = aspect if isinstance(aspect, Tensor) else torch.full((count,), aspect)
    return draw(view, aspects, torch.Generator().manual_seed(seed))


def same_distribution(ours: Tensor, theirs: Tensor) -> bool:
    """Two-sample Kolmogorov-Smirnov test at p = .001, on three decimals: torchvision rounds to pixels."""
    ours, theirs = ours.round(decimals=3), theirs.round(decimals=3)
    values = torch.cat((ours, theirs)).sort().values
    gap = (
        torch.searchsorted(ours.sort().values, values, right=True) / len(ours)
        - torch.searchsorted(theirs.sort().values, values, right=True) / len(theirs)
    ).abs()
    return bool(gap.max() < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs)))


def is_probability(hits: Tensor, probability: float) -> bool:
    spread = math.sqrt(probability * (1 - probability) / len(hits))
    return abs(hits.float().mean().item() - probability) <= 4.5 * spread


@pytest.mark.parametrize(
    ("width", "height"), [(2000, 2000), (3000, 2000), (1200, 3000), (6000, 1000)], ids=lambda side: str(side)
)
def test_crops_are_spread_like_torchvisions(width: int, height: int) -> None:
    """Of 6000 × 1000 hardly any crop fits: nearly all are the central fallback."""
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    theirs_of = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    torch.manual_seed(0)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    boxes = [theirs_of.make_params([image]) for _ in range(1000)]
    theirs = torch.tensor(
        [(b["left"] / width, b["top"] / height, b["width"] / width, b["height"] / height) for b in boxes]
    )
    ours = drawn(Augmentation().view(32, scale=scale), width / height).box
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column])
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])


def test_a_crop_keeps_its_area_and_its_shape_in_the_originals_geometry() -> None:
    aspect = torch.linspace(0.4, 2.5, MANY)
    view = Augmentation(crop_min=0.1).view(32, scale=(0.1, 0.3))
    left, top, width, height = drawn(view, aspect).box.unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-6).all()
    assert (top + height <= 1 + 1e-6).all()
    ratio = width * aspect / height
    assert ratio.min() >= 3 / 4 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    area = width * height
    assert area.min() >= 0.1 - 1e-4
    assert area.max() <= 0.3 + 1e-4


def test_a_view_of_everything_is_the_whole_square() -> None:
    view = View(
        size=32, scale=(1, 1), ratio=(1, 1), flip=0, jitter=(0, 0, 0, 0), jitter_probability=0, grayscale=0,
        blur=0, blur_sigma=(0.1, 2),
    )  # fmt: skip
    torch.testing.assert_close(drawn(view, count=50).box, torch.tensor([0.0, 0, 1, 1]).expand(50, 4))


@pytest.mark.parametrize("aspect", [1 / 30_000, 1 / 100, 100, 30_000])
def test_an_image_one_pixel_wide_still_has_a_crop(aspect: float) -> None:
    box = drawn(Augmentation().view(32), aspect, count=100).box
    assert box.isfinite().all()
    assert (box[:, 2:] > 0).all()
    width, height = box[0, 2] * aspect, box[0, 3]
    expected = 4 / 3 if aspect > 1 else 3 / 4
    assert (width / height).item() == pytest.approx(expected, rel=1e-4)
    assert (box[:, :2] + box[:, 2:] / 2).sub(0.5).abs().max() < 1e-6  # it is central


def test_jitter_is_spread_like_torchvisions() -> None:
    theirs_of = v2.ColorJitter(0.4, 0.3, 0.2, 0.1)
    torch.manual_seed(0)
    jitters = [theirs_of.make_params([]) for _ in range(3000)]
    augmentation = Augmentation(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    ours = drawn(augmentation.view(32))
    for column, name in enumerate(("brightness_factor", "contrast_factor", "saturation_factor")):
        assert same_distribution(ours.factors[:, column], torch.tensor([j[name] for j in jitters]))
    assert same_distribution(ours.hue, torch.tensor([j["hue_factor"] for j in jitters]))
    places = torch.stack([j["fn_idx"] for j in jitters])
    for operation in range(4):
        place, other = ((order == operation).int().argmax(1).float() for order in (ours.order, places))
        assert same_distribution(place, other)


def test_every_order_of_the_jitter_is_as_likely() -> None:
    order = drawn(Augmentation().view(32)).order
    assert (order.sort(1).values == torch.arange(4)).all()
    counts = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 24
    expected = MANY / 24
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 49.7  # p = .001 at 23 degrees of freedom


def test_factors_never_fall_below_zero() -> None:
    view = View(
        size=32, scale=(0.2, 1), flip=0, jitter=(1.5, 0, 0, 0.5), jitter_probability=1, grayscale=0, blur=0,
        blur_sigma=(0.1, 2),
    )  # fmt: skip
    parameters = drawn(view)
    brightness = parameters.factors[:, 0]
    assert brightness.min() >= 0
    assert brightness.min() < 0.01
    assert brightness.max() > 2.49
    assert (parameters.factors[:, 1:] == 1).all()
    assert parameters.hue.abs().max() <= 0.5


def test_each_operation_happens_as_often_as_asked() -> None:
    augmentation = Augmentation(flip=0.3, jitter=0.7, grayscale=0.15, blur=0.4)
    parameters = drawn(augmentation.view(96, solarize=0.2))
    assert is_probability(parameters.flip, 0.3)
    assert is_probability(parameters.jitter, 0.7)
    assert is_probability(parameters.gray, 0.15)
    assert is_probability(parameters.sigma > 0, 0.4)
    assert is_probability(parameters.solarize, 0.2)


def test_operations_happen_independently() -> None:
    augmentation = Augmentation(flip=0.5, jitter=0.5, grayscale=0.5, blur=0.5)
    p = drawn(augmentation.view(96, solarize=0.5))
    across, down = (p.box[:, :2] / (1 - p.box[:, 2:])).unbind(1)  # where the crop lies in the room it has
    happens = (p.flip, p.jitter, p.gray, p.sigma > 0, p.solarize)
    columns = (*happens, *p.factors.T, p.hue, p.order[:, 0] == HUE, across, down, p.box[:, 2:].prod(1))
    correlation = torch.corrcoef(torch.stack([column.float() for column in columns]))
    assert (correlation - torch.eye(len(columns))).abs().max() < 4.5 / math.sqrt(MANY)


def test_what_is_certain_always_happens_and_what_is_off_never_does() -> None:
    never = drawn(Augmentation(flip=0, jitter=0, grayscale=0, blur=0).view(32))
    always = drawn(Augmentation(flip=1, jitter=1, grayscale=1, blur=1).view(32, solarize=1))
    for name in ("flip", "jitter", "gray", "sigma", "solarize"):
        assert not getattr(never, name).any()
        assert getattr(always, name).all()


def test_the_blur_grows_with_the_view() -> None:
    for size in (64, 224):
        sigma = drawn(Augmentation(blur=1).view(size)).sigma * 224 / size
        uniform = torch.rand(MANY, generator=torch.Generator().manual_seed(1)) * 1.9 + 0.1
        assert same_distribution(sigma, uniform)


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    view, aspect = Augmentation().view(32, solarize=0.5), torch.linspace(0.5, 2, 200)
    first, again, other = (drawn(view, aspect, seed=seed) for seed in (3, 3, 4))
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_a_generator_goes_on_from_view_to_view() -> None:
    generator = torch.Generator().manual_seed(0)
    view, aspect = Augmentation().view(32), torch.ones(8)
    assert not torch.equal(draw(view, aspect, generator).box, draw(view, aspect, generator).box)


def test_images_of_a_batch_get_different_parameters() -> None:
    parameters = drawn(Augmentation().view(32), count=100)
    assert len(parameters.box.unique(dim=0)) == 100
    assert len(parameters.factors.unique(dim=0)) == 100
    assert len(parameters.hue.unique()) == 100


def test_switching_one_operation_off_leaves_the_others_as_they_were() -> None:
    full = drawn(Augmentation().view(96), count=100)
    without = drawn(Augmentation(blur=0, grayscale=0).view(96), count=100)
    for name in ("box", "flip", "factors", "hue", "order", "jitter"):
        assert torch.equal(getattr(full, name), getattr(without, name))


def test_two_processes_take_halves_of_what_one_draws() -> None:
    whole = drawn(Augmentation().view(32, solarize=0.5), count=10)
    halves = whole.rows(slice(0, 5)), whole.rows(slice(5, 10))
    assert [len(part) for part in (whole, *halves)] == [10, 5, 5]
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))


def test_all_parameters_have_the_types_they_promise() -> None:
    parameters = drawn(Augmentation().view(32), count=7)
    shapes = {
        name: (tuple(getattr(parameters, name).shape), getattr(parameters, name).dtype) for name in FIELDS
    }
    floats, flags = torch.float32, torch.bool
    assert shapes == {
        "box": ((7, 4), floats),
        "flip": ((7,), flags),
        "factors": ((7, 3), floats),
        "hue": ((7,), floats),
        "order": ((7, 4), torch.int64),
        "jitter": ((7,), flags),
        "gray": ((7,), flags),
        "sigma": ((7,), floats),
        "solarize": ((7,), flags),
    }
