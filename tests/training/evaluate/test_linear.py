"""Linear probing: many heads at once against one head in float64, and a choice that never sees the test."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import EyeEncoder, coloured, mean_colour, without_labels
from training.evaluate import probe
from training.evaluate.linear import LinearSettings, evaluate_linear
from training.evaluate.probe import Heads, Standard, assign_folds, sweep, train_heads


def _task(n=40, dim=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n) % classes
    return centres[labels] + 0.7 * torch.randn(n, dim, generator=generator), labels


def _literal(features, labels, classes, rate, decay, epochs, batch_size, seed, included=None):
    """One linear layer, trained by autograd and torch.optim.SGD in float64."""
    layer = torch.nn.Linear(features.shape[1], classes, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [
        {"params": [layer.weight], "weight_decay": decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    n = len(features)
    steps, step = epochs * math.ceil(n / batch_size), 0
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        for start in range(0, n, batch_size):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            rows = [
                row for row in order[start : start + batch_size].tolist() if included is None or included[row]
            ]
            loss = sum(-layer(features[row].double()).log_softmax(0)[labels[row]] for row in rows) / max(
                len(rows), 1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return layer


def test_heads_trained_together_are_those_trained_alone():
    features, labels = _task()
    rates, decays = (0.01, 0.1, 0.1), (0.0, 0.0, 0.05)
    included = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < 0.7
    heads = train_heads(
        features,
        labels,
        classes=3,
        rates=rates,
        decays=decays,
        epochs=4,
        batch_size=16,
        seed=5,
        included=included,
    )
    for one in range(3):
        alone = _literal(features, labels, 3, rates[one], decays[one], 4, 16, 5, included[:, one])
        torch.testing.assert_close(heads.weight[one].double(), alone.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[one].double(), alone.bias.detach(), atol=1e-5, rtol=1e-4)


def test_all_rows_count_where_none_is_left_out():
    features, labels = _task(n=21)
    heads = train_heads(
        features, labels, classes=3, rates=[0.1], decays=[0.01], epochs=3, batch_size=8, seed=2
    )
    alone = _literal(features, labels, 3, 0.1, 0.01, 3, 8, 2)
    torch.testing.assert_close(heads.weight[0].double(), alone.weight.detach(), atol=1e-5, rtol=1e-4)


def test_standardised_features_have_mean_0_and_variance_1():
    features = (
        torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 0.1, 0]) + 7
    )
    standard = Standard.of(features)(features).double()
    assert standard.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(
        standard.var(0, correction=0), torch.tensor([1.0, 1, 1, 0]).double(), atol=1e-3, rtol=0
    )


def test_a_head_that_diverged_is_never_right():
    heads = Heads(torch.tensor([[[math.nan], [0.0]], [[1.0], [-1.0]]]), torch.zeros(2, 2))
    assert heads.accuracy(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0])).tolist() == [0, 1]


def test_chunks_of_scores_change_nothing(monkeypatch):
    features, labels = _task()
    heads = train_heads(
        features, labels, classes=3, rates=[0.1], decays=[0.0], epochs=2, batch_size=8, seed=0
    )
    whole = heads.right(features, labels)
    monkeypatch.setattr(probe, "CHUNK", 7 * 3)
    assert torch.equal(heads.right(features, labels), whole)


def test_folds_share_out_every_class():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    fold = assign_folds(labels, 5, seed=0)
    assert fold[:10].bincount().tolist() == [2, 2, 2, 2, 2]
    assert fold[10:13].bincount(minlength=5).max() == 1
    assert fold[13] == -1
    assert torch.equal(fold, assign_folds(labels, 5, seed=0))
    assert not torch.equal(fold, assign_folds(labels, 5, seed=1))


@pytest.mark.parametrize("many", [10_000, 30])
def test_the_chosen_setting_is_the_best_on_held_out_rows(many, monkeypatch):
    monkeypatch.setattr(probe, "MANY", many)
    features, labels = _task(n=60)
    head, trials, best = sweep(features, labels, classes=3, epochs=3, batch_size=16, seed=0)
    assert len(trials) == len(probe.RATES) * len(probe.DECAYS)
    assert best.accuracy == max(trial.accuracy for trial in trials)
    one = train_heads(
        features, labels, classes=3, rates=[best.rate], decays=[best.decay], epochs=3, batch_size=16, seed=0
    )
    torch.testing.assert_close(head.weight, one.weight)


def test_cross_validation_judges_each_row_by_a_head_that_did_not_learn_from_it(monkeypatch):
    monkeypatch.setattr(probe, "RATES", (0.1,))
    monkeypatch.setattr(probe, "DECAYS", (0.01,))
    features, labels = _task(n=30)
    _, [trial], _ = sweep(features, labels, classes=3, epochs=3, batch_size=8, seed=4)
    fold = assign_folds(labels, 5, seed=4)
    right = 0
    for part in range(5):
        layer = _literal(features, labels, 3, 0.1, 0.01, 3, 8, 4, fold != part)
        held = fold == part
        right += int((layer(features[held].double()).argmax(1) == labels[held]).sum())
    assert trial.accuracy == pytest.approx(right / 30)


def test_with_one_row_of_each_class_the_usual_setting_is_taken():
    features, labels = _task(n=3)
    head, trials, best = sweep(features, labels, classes=3, epochs=30, batch_size=8, seed=0)
    assert (best.rate, best.decay, best.accuracy, len(trials)) == (*probe.USUAL, None, 1)
    assert head.accuracy(features, labels).item() == 1


def test_separable_classes_are_told_apart():
    result = evaluate_linear(mean_colour(), coloured(80), LinearSettings(epochs=20, holdout=0.25))
    assert result.top1 == 1
    assert result.per_class == {"red": 1, "green": 1, "blue": 1, "yellow": 1}
    assert (result.train, result.test, result.top5) == (60, 20, None)
    assert result.picture().size == (1200, 600)
    assert "100.0%" in result.summary()


def test_the_labels_of_test_images_have_no_say_in_the_choice():
    encoder = EyeEncoder(lambda pixels: pixels[:2, :2].ravel().tolist())
    images = coloured(60, noise=120)
    test = np.arange(60) >= 45
    results = []
    for turned in (False, True):
        labels = np.where(test & turned, (images.labels + 1) % 4, images.labels)
        source = replace(images, test=test, labels=labels)
        results.append(evaluate_linear(encoder, source, LinearSettings(epochs=3)))
    first, second = results
    assert (second.rate, second.decay, second.trials) == (first.rate, first.decay, first.trials)
    assert second.top1 != first.top1


def test_the_same_seed_gives_the_same_figures():
    once, again = (
        evaluate_linear(mean_colour(), coloured(60, noise=120), LinearSettings(epochs=2, holdout=0.25))
        for _ in "ab"
    )
    assert once == again


def test_without_labels_it_says_so():
    with pytest.raises(InvalidField, match="linear needs labels"):
        evaluate_linear(mean_colour(), without_labels(coloured()), LinearSettings())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidField, match=next(iter(wrong))):
        evaluate_linear(mean_colour(), coloured(), LinearSettings(**wrong))
