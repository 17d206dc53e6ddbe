"""Fine-tuning: it starts where the linear probe ended, and every weight learns."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import coloured, mean_colour, tiny_encoder, without_labels
from training.augment import augment, draw, plan
from training.data import EpochOrder
from training.evaluate.finetune import (
    FinetuneSettings,
    classify,
    evaluate_finetune,
    fine_tune,
    starting_classifier,
)
from training.evaluate.probe import Heads, Standard
from training.views import Augmentation

QUICK = FinetuneSettings(epochs=3, batch_size=16, lr=1e-3, holdout=0.25)


def _start(tmp_path, source):
    encoder = tiny_encoder(tmp_path)
    pixels = encoder.pixels(source)
    features = encoder.embed_pixels(pixels)
    standard = Standard.of(features)
    generator = torch.Generator().manual_seed(0)
    heads = Heads(torch.randn(1, 4, encoder.dim, generator=generator), torch.randn(1, 4, generator=generator))
    return encoder, pixels, features, standard, heads


def test_it_starts_with_the_scores_of_the_linear_head(tmp_path):
    encoder, pixels, features, standard, heads = _start(tmp_path, coloured(20))
    classifier = starting_classifier(encoder, heads, standard).eval()
    expected = heads.scores(standard(features))[:, 0].softmax(1)
    scores = classify(classifier, encoder, pixels, np.arange(20))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-3)


def test_the_evaluated_network_itself_is_not_touched(tmp_path):
    encoder, pixels, _, standard, heads = _start(tmp_path, coloured(20))
    before = copy.deepcopy(encoder.backbone.state_dict())
    classifier = starting_classifier(encoder, heads, standard)
    fine_tune(classifier, pixels, np.arange(20), size=16, settings=QUICK)
    for name, weight in encoder.backbone.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_every_weight_learns_even_those_of_a_momentum_encoder(tmp_path):
    encoder, pixels, _, standard, heads = _start(tmp_path, coloured(20))
    encoder.backbone.requires_grad_(False)
    classifier = starting_classifier(encoder, heads, standard)
    before = {name: weight.clone() for name, weight in classifier.named_parameters()}
    fine_tune(classifier, pixels, np.arange(20), size=16, settings=QUICK)
    assert not classifier.training
    for name, weight in classifier.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_a_step_is_that_of_sgd_on_the_crops_of_its_seed(tmp_path):
    encoder, pixels, _, standard, heads = _start(tmp_path, coloured(20))
    rows = np.arange(4, 20)
    settings = FinetuneSettings(epochs=1, batch_size=8, optimizer="sgd", lr=0.01, weight_decay=0.1, seed=3)
    classifier = starting_classifier(encoder, heads, standard)
    literal = copy.deepcopy(classifier).train()
    losses = fine_tune(classifier, pixels, rows, size=16, settings=settings)

    order, generator = EpochOrder(16, 8, 3), torch.Generator().manual_seed(3)
    view = Augmentation(
        crop_min=0.35, flip=0.5, brightness=0, contrast=0, saturation=0, hue=0, jitter=0, grayscale=0, blur=0
    ).view(16)
    speed = {name: torch.zeros_like(weight) for name, weight in literal.named_parameters()}
    expected = []
    for step in range(2):
        chosen = rows[order.rows(step)]
        parameters = draw(view, torch.from_numpy(pixels.aspect[chosen]), generator)
        batch = pixels.batch(chosen)
        images = augment(batch, plan(view, parameters, stored_size=pixels.size, device=batch.device))
        loss = F.cross_entropy(literal(images), torch.from_numpy(pixels.source.labels[chosen]))
        expected.append(loss.item())
        literal.zero_grad()
        loss.backward()
        norm = sum(float(weight.grad.square().sum()) for weight in literal.parameters()) ** 0.5
        # The warm-up is a tenth of two steps, which is none: half a cosine from the first step.
        rate = 0.01 * (1 + np.cos(np.pi * step / 2)) / 2
        with torch.no_grad():
            for name, weight in literal.named_parameters():
                gradient = weight.grad / max(1, norm + 1e-6)
                gradient = gradient + (0.1 * weight if weight.ndim > 1 else 0)
                speed[name] = 0.9 * speed[name] + gradient
                weight -= rate * speed[name]
    assert losses == [pytest.approx(sum(expected) / 2, rel=1e-4)]
    for (name, weight), other in zip(classifier.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-3, msg=name)


def test_it_says_what_came_of_it(tmp_path):
    result = evaluate_finetune(tiny_encoder(tmp_path), coloured(64), QUICK)
    assert result.top1 > 0.9
    assert result.losses[-1] < result.losses[0]
    assert (result.train, result.test, result.classes, len(result.losses)) == (48, 16, 4, 3)
    assert 0 <= result.before <= 1
    assert "frozen" in result.summary()
    assert result.picture().size == (1200, 500)


def test_the_same_seed_gives_the_same_figures(tmp_path):
    once, again = (evaluate_finetune(tiny_encoder(tmp_path), coloured(32), QUICK) for _ in "ab")
    assert once == again


def test_a_loss_that_is_no_number_is_said(tmp_path):
    encoder, pixels, _, standard, heads = _start(tmp_path, coloured(20))
    broken = Heads(heads.weight * float("nan"), heads.bias)
    with pytest.raises(InvalidField, match="lr="):
        fine_tune(
            starting_classifier(encoder, broken, standard), pixels, np.arange(20), size=16, settings=QUICK
        )


def test_bundles_and_data_without_labels_are_refused(tmp_path):
    with pytest.raises(InvalidField, match="bundle"):
        evaluate_finetune(mean_colour(), coloured(), QUICK)
    with pytest.raises(InvalidField, match="finetune needs labels"):
        evaluate_finetune(tiny_encoder(tmp_path), without_labels(coloured()), QUICK)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"crop_min": 0.0}, {"flip": 2.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidField, match=next(iter(wrong))):
        FinetuneSettings(**wrong)
