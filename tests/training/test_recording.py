"""Recorded calls compute what written ones do. CUDA graphs need a GPU; what can be seen on a CPU is below."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from tests.training.tiny import TinyConv, batch_for, tiny_method  # noqa: E402
from training import recording  # noqa: E402
from training.augment import IMAGENET_MEAN, IMAGENET_STD, augment, draw, plan  # noqa: E402
from training.augment.drawing import uniforms  # noqa: E402
from training.augment.recorded import RecordedViews, augment_all  # noqa: E402
from training.methods import METHODS  # noqa: E402
from training.recording import record_backbones  # noqa: E402
from training.views import Augmentation, View  # noqa: E402

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def busy_view(size: int) -> View:
    """Every operation happens to about half of the images."""
    return Augmentation(flip=0.5, jitter=0.6, grayscale=0.4, blur=0.5).view(size, solarize=0.5)


@pytest.mark.parametrize("size", [24, 32])
def test_a_view_with_the_same_work_for_every_image_is_the_view_made_from_lists_of_rows(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (48, 32, 32, 3), dtype=torch.uint8, generator=generator)
    view = busy_view(size)
    parameters = draw(view, torch.linspace(0.5, 2, 48), generator)
    expected = augment(stored, plan(view, parameters, stored_size=32, device=stored.device))
    found = augment_all(stored, view, parameters, torch.tensor((IMAGENET_MEAN, IMAGENET_STD)))
    # Values at exactly one half may fall to either side of solarise's step.
    close = torch.isclose(found, expected, rtol=0, atol=1e-5)
    assert close.float().mean() > 0.9999


def test_the_first_step_is_run_as_it_is_written_and_evaluation_always_is() -> None:
    backbone = TinyConv()
    written = copy.deepcopy(backbone)
    recordings = record_backbones(backbone)
    images = torch.randn(4, 3, 16, 16)
    recordings.begin()
    torch.testing.assert_close(backbone(images), written(images))
    recordings.begin()
    backbone.eval()
    written.eval()
    torch.testing.assert_close(backbone(images), written(images))


@NEEDS_GPU
@pytest.mark.parametrize("name", METHODS)
def test_recorded_steps_give_the_weights_of_written_ones(name: str) -> None:
    def trained(recorded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        method = tiny_method(name).cuda().train()
        recordings = record_backbones(method) if recorded else None
        optimizer = torch.optim.SGD([one for one in method.parameters() if one.requires_grad], lr=0.05)
        losses = []
        for step in range(5):
            torch.manual_seed(step)
            batch = batch_for(method, seed=step, step=step)
            batch.views[:] = [view.cuda() for view in batch.views]
            object.__setattr__(batch, "ids", batch.ids.cuda())
            if recordings is not None:
                recordings.begin()
            loss = method(batch)["loss"]
            loss.backward()
            method.before_step(batch.now)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(batch.now, batch.values)
            losses.append(loss.item())
        return losses, method.state_dict()

    (written, expected), (replayed, found) = trained(False), trained(True)
    assert replayed == pytest.approx(written, rel=1e-4)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


@NEEDS_GPU
def test_recorded_views_are_the_views_that_were_drawn() -> None:
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    views = (busy_view(32), busy_view(24))
    recorded = RecordedViews(views, count=16, stored_size=32, device=device)
    aspect = torch.linspace(0.5, 2, 16)
    for seed in (1, 2):
        source = torch.Generator().manual_seed(seed)
        drawn = [uniforms(16, source) for _ in views]
        made = recorded({"image": stored.cuda()}, recorded.pack(drawn, [aspect, aspect]))
        source = torch.Generator().manual_seed(seed)
        for view, found in zip(views, made, strict=True):
            work = plan(view, draw(view, aspect, source), stored_size=32, device=stored.device)
            close = torch.isclose(found.cpu(), augment(stored, work), rtol=0, atol=2e-2)  # TF32 allowed
            assert close.float().mean() > 0.999


def test_a_call_through_aliases_uses_the_parameters_memory_and_gives_their_gradients() -> None:
    backbone, images = TinyConv(), torch.randn(4, 3, 16, 16)
    call, aliases = recording._aliased(backbone, backbone.features)
    for step in range(2):
        expected = torch.autograd.grad(
            backbone.features(images)[0].square().sum(), list(backbone.parameters())
        )
        found = torch.autograd.grad(call(images)[0].square().sum(), aliases)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, msg=f"step {step}")
        with torch.no_grad():
            for one in backbone.parameters():
                one.add_(0.1)
