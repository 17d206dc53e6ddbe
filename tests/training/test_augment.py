"""Whole views: against torchvision's operations image by image, and against what serving sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from embedserve.bundle import Preprocessing  # noqa: E402
from embedserve.preprocess import preprocess  # noqa: E402
from training import torchvision_ops  # noqa: E402
from training.augment import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    Parameters,
    augment,
    centre,
    draw,
    pipeline,
    plan,
    show,
)
from training.views import Augmentation, View  # noqa: E402

torchvision_ops.register()
import torchvision.transforms.v2.functional as F  # noqa: E402

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SIDE = 32


def pixels(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def busy_view(size: int) -> View:
    """Every operation happens to about half of the images."""
    augmentation = Augmentation(flip=0.5, jitter=0.6, grayscale=0.4, blur=0.5)
    return augmentation.view(size, solarize=0.5)


def drawn(view: View, count: int, seed: int = 0) -> Parameters:
    return draw(view, torch.linspace(0.5, 2, count), torch.Generator().manual_seed(seed))


def view_of(stored: Tensor, view: View, parameters: Parameters) -> Tensor:
    size, device = stored.shape[1], stored.device
    return augment(stored, plan(view, parameters, stored_size=size, device=device, mean=MEAN, std=STD))


def one_by_one(stored: Tensor, size: int, p: Parameters) -> Tensor:
    """The same with torchvision, an image and an operation at a time. Boxes lie on whole pixels."""
    made = []
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for row, image in enumerate(stored.permute(0, 3, 1, 2).float() / 255):
        left, top, width, height = (p.box[row] * stored.shape[1]).round().int().tolist()
        picture = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        picture = F.horizontal_flip(picture) if p.flip[row] else picture
        if p.jitter[row]:
            strengths = [*p.factors[row].tolist(), p.hue[row].item()]
            for operation in p.order[row].tolist():
                picture = adjust[operation](picture, strengths[operation])
        if p.gray[row]:
            picture = F.rgb_to_grayscale(picture, num_output_channels=3)
        if p.sigma[row] > 0:
            kernel = int(0.1 * size) | 1
            picture = F.gaussian_blur(picture, [kernel, kernel], [p.sigma[row].item()] * 2)
        if p.solarize[row]:
            picture = F.solarize(picture, 0.5)
        made.append(F.normalize(picture, MEAN, STD))
    return torch.stack(made)


def on_whole_pixels(parameters: Parameters, side: int = SIDE) -> Parameters:
    start, end = parameters.box[:, :2], parameters.box[:, :2] + parameters.box[:, 2:]
    start, end = (start * side).floor(), (end * side).ceil()
    return replace(parameters, box=torch.cat((start, end - start), 1) / side)


@pytest.mark.parametrize("size", [20, 32, 48])
def test_a_batch_of_views_equals_torchvision_image_by_image(size: int) -> None:
    count = 30
    view = busy_view(size)
    parameters = on_whole_pixels(drawn(view, count))
    # Blur that can be seen in views as small as these.
    parameters = replace(parameters, sigma=parameters.sigma * 224 / size)
    ours, theirs = view_of(pixels(count), view, parameters), one_by_one(pixels(count), size, parameters)
    # Where a value is 0.5 but for rounding, rounding decides whether it is inverted.
    same = torch.isclose(ours, theirs, rtol=0, atol=2e-4)
    assert same.float().mean() > 0.9999
    assert same[~parameters.solarize].all()


@pytest.mark.parametrize("operation", ["flip", "jitter", "gray", "sigma", "solarize"])
def test_each_operation_alone_equals_torchvisions(operation: str) -> None:
    view = busy_view(24)
    parameters = on_whole_pixels(drawn(view, 20))
    parameters = replace(parameters, sigma=parameters.sigma * 10)
    for name in {"flip", "jitter", "gray", "sigma", "solarize"} - {operation}:
        parameters = replace(parameters, **{name: torch.zeros_like(getattr(parameters, name))})
    ours = view_of(pixels(20), view, parameters)
    torch.testing.assert_close(ours, one_by_one(pixels(20), 24, parameters), rtol=0, atol=2e-4)
    without = replace(parameters, **{operation: torch.zeros_like(getattr(parameters, operation))})
    changed = (ours != view_of(pixels(20), view, without)).flatten(1).any(1)
    assert torch.equal(changed, getattr(parameters, operation) != 0)


def test_views_are_normalised_floats_in_the_size_asked_for() -> None:
    made = view_of(pixels(3, 16), busy_view(40), drawn(busy_view(40), 3))
    assert made.shape == (3, 3, 40, 40)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert not made.requires_grad
    low = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    high = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert (made.amin((0, 2, 3)) >= low - 1e-5).all()
    assert (made.amax((0, 2, 3)) <= high + 1e-5).all()


def test_stored_pixels_are_left_as_they_are() -> None:
    stored = pixels(6)
    view_of(stored, busy_view(32), drawn(busy_view(32), 6))
    assert torch.equal(stored, pixels(6))


def test_the_same_parameters_give_the_same_views() -> None:
    view = busy_view(32)
    first, again = (view_of(pixels(8), view, drawn(view, 8, seed=1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, view_of(pixels(8), view, drawn(view, 8, seed=2)))


def test_one_image_eight_times_gives_eight_views() -> None:
    view = Augmentation().view(32)
    made = view_of(pixels(1).expand(8, -1, -1, -1), view, drawn(view, 8))
    assert len(made.unique(dim=0)) == 8


def test_two_processes_see_the_halves_of_what_one_sees() -> None:
    view, stored = busy_view(32), pixels(10)
    parameters = drawn(view, 10)
    halves = [view_of(stored[rows], view, parameters.rows(rows)) for rows in (slice(0, 5), slice(5, 10))]
    torch.testing.assert_close(torch.cat(halves), view_of(stored, view, parameters), rtol=0, atol=1e-5)


def test_a_cpu_works_in_parts_that_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    view, stored, aspect = busy_view(32), pixels(11), torch.linspace(0.5, 2, 11)
    parameters = drawn(view, 11)
    whole = view_of(stored, view, parameters), centre(stored, aspect, 16, mean=MEAN, std=STD)
    monkeypatch.setattr(pipeline, "CHUNK", 3 * 32 * 32)
    parts = view_of(stored, view, parameters), centre(stored, aspect, 16, mean=MEAN, std=STD)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_no_image_gives_no_view() -> None:
    view = busy_view(24)
    assert view_of(pixels(0), view, drawn(view, 0)).shape == (0, 3, 24, 24)
    assert centre(pixels(0), torch.ones(0), 24, mean=MEAN, std=STD).shape == (0, 3, 24, 24)


def test_autocast_around_it_changes_nothing() -> None:
    view, stored = busy_view(32), pixels(6)
    plain = view_of(stored, view, drawn(view, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view_of(stored, view, drawn(view, 6)), plain)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (torch.zeros(2, 8, 8, 3), "float32 [2, 8, 8, 3]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "[2, 3, 8, 8]"),
        (torch.zeros(2, 8, 9, 3, dtype=torch.uint8), "[2, 8, 9, 3]"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), "3 images"),
    ],
)
def test_what_is_no_batch_of_squares_is_told_so(stored: Tensor, told: str) -> None:
    view = busy_view(8)
    with pytest.raises(ValueError, match=r"uint8 \[B, S, S, 3\]|3 images, but .* for 2") as error:
        view_of(stored, view, drawn(view, 2))
    assert told in str(error.value)
    with pytest.raises(ValueError, match=r"uint8 \[B, S, S, 3\]|3 images, but .* for 2"):
        centre(stored, torch.ones(2), 8, mean=MEAN, std=STD)


# ── no waiting for a device ──────────────────────────────────────────────────────────────────────


def test_nothing_of_a_device_is_ever_read_by_the_cpu() -> None:
    """Tensors on the meta device hold no values, so reading one (.item(), a mask as an index) raises."""
    view = busy_view(32)
    stored = torch.empty(40, 32, 32, 3, dtype=torch.uint8, device="meta")
    assert view_of(stored, view, drawn(view, 40)).shape == (40, 3, 32, 32)
    assert centre(stored, torch.ones(40), 24, mean=MEAN, std=STD).shape == (40, 3, 24, 24)


def test_what_travels_to_a_device_together_arrives_as_it_was() -> None:
    sent = [
        torch.arange(3),
        torch.tensor([True, False, True]),
        torch.rand(2, 3),
        torch.zeros(0),
        torch.arange(2),
    ]
    packed = pipeline._packed(sent, torch.device("cpu"))
    assert packed.dtype == torch.uint8
    for before, after in zip(sent, pipeline._unpacked(packed, sent), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_views_and_is_never_waited_for() -> None:
    view, stored, aspect = busy_view(32), pixels(40), torch.linspace(0.5, 2, 40)
    parameters = drawn(view, 40)
    there = stored.cuda()
    view_of(there, view, parameters)  # the first call loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made, middle = view_of(there, view, parameters), centre(there, aspect, 24, mean=MEAN, std=STD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close = torch.isclose(made.cpu(), view_of(stored, view, parameters), rtol=0, atol=2e-2)  # TF32 allowed
    assert close.float().mean() > 0.999  # solarise has a step
    torch.testing.assert_close(
        middle.cpu(), centre(stored, aspect, 24, mean=MEAN, std=STD), rtol=0, atol=2e-2
    )


# ── evaluation and pictures ──────────────────────────────────────────────────────────────────────


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours: what a resize to few pixels does not have to drop."""
    coarse = np.random.default_rng(0).integers(
        0, 256, (max(2, height // 40), max(2, width // 40), 3), np.uint8
    )
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(300, 300), (400, 300), (301, 500), (640, 250), (160, 500)])
@pytest.mark.parametrize(("size", "resize_to", "stored"), [(64, 64, 96), (224, 256, 256)])
def test_the_evaluation_view_is_what_serving_sees(
    width: int, height: int, size: int, resize_to: int, stored: int
) -> None:
    original = photograph(width, height)
    spec = Preprocessing(height=size, width=size, resize_to=resize_to, interpolation="bilinear")
    expected = torch.from_numpy(np.array(preprocess(original, spec)))
    square = original.resize((stored, stored), Image.Resampling.BICUBIC)
    seen = centre(
        torch.from_numpy(np.array(square))[None],
        torch.tensor([width / height]),
        size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        share=size / resize_to,
    )
    difference = (show(seen, IMAGENET_MEAN, IMAGENET_STD)[0].int() - expected.int()).abs().float()
    assert difference.mean() < 1
    assert difference.quantile(0.99) <= 5
    border = torch.cat((difference[0], difference[-1], difference[:, 0], difference[:, -1]))
    assert border.mean() < 1  # the filter reads beyond the cut, as where the whole image is resized first


@pytest.mark.parametrize(
    ("width", "height", "size", "resize_to", "resized", "start"),
    [
        (300, 300, 224, 256, (256, 256), (16, 16)),
        (400, 300, 224, 256, (341, 256), (58, 16)),  # 58.5 rounds to even, as in Python
        (200, 350, 64, 64, (64, 112), (0, 24)),  # 1 / float32(200 / 350) · 64 is just less than 112
        (500, 301, 64, 64, (106, 64), (21, 0)),
    ],
)
def test_the_square_of_the_evaluation_view_lies_on_servings_pixels(
    width: int, height: int, size: int, resize_to: int, resized: tuple[int, int], start: tuple[int, int]
) -> None:
    box = pipeline._central_boxes(torch.tensor([width / height]), size, resize_to)
    across, down = resized
    expected = torch.tensor([[start[0] / across, start[1] / down, size / across, size / down]])
    torch.testing.assert_close(box, expected, rtol=0, atol=1e-6)


def test_the_evaluation_view_of_a_square_in_its_own_size_is_the_square() -> None:
    seen = centre(pixels(2), torch.ones(2), SIDE, mean=MEAN, std=STD)
    assert torch.equal(show(seen, MEAN, STD), pixels(2))


@pytest.mark.parametrize("aspect", [1 / 30_000, 30_000.0])
def test_an_image_one_pixel_wide_has_an_evaluation_view_and_random_ones(aspect: float) -> None:
    aspects = torch.full((5,), aspect)
    view = Augmentation().view(24)
    parameters = draw(view, aspects, torch.Generator().manual_seed(0))
    assert centre(pixels(5), aspects, 24, mean=MEAN, std=STD).isfinite().all()
    assert view_of(pixels(5), view, parameters).isfinite().all()


def test_pictures_of_views_give_the_pixels_back() -> None:
    view = Augmentation(flip=0, jitter=0, grayscale=0, blur=0).view(SIDE)
    whole = replace(drawn(view, 4), box=torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
    picture = show(view_of(pixels(4), view, whole), MEAN, STD)
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, pixels(4))


def test_pictures_of_values_beyond_black_and_white_are_black_and_white() -> None:
    beyond = torch.tensor([-100.0, 100.0]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert show(beyond, MEAN, STD).flatten(1).tolist() == [[0, 0, 0], [255, 255, 255]]
