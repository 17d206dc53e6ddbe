"""Few labels: who is drawn, and that only those are learned from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import coloured, mean_colour, tiny_encoder, without_labels
from training.evaluate import knn, probe, semi_supervised
from training.evaluate.semi_supervised import (
    SemiSettings,
    Spread,
    draw_labels,
    evaluate_semi_supervised,
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(semi_supervised, "LEAST_STEPS", 10)


def test_each_class_gives_its_share_and_at_least_one():
    labels = np.repeat([0, 1, 2], [200, 30, 4])
    np.random.default_rng(0).shuffle(labels)
    drawn = draw_labels(labels, 0.1, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [20, 3, 1]
    assert np.bincount(labels[draw_labels(labels, 0.01, seed=0)]).tolist() == [2, 1, 1]
    assert (np.diff(drawn) > 0).all()


def test_a_draw_depends_on_its_seed_alone_and_few_labels_are_among_more():
    labels = np.arange(300) % 3
    assert np.array_equal(draw_labels(labels, 0.1, 5), draw_labels(labels, 0.1, 5))
    assert not np.array_equal(draw_labels(labels, 0.1, 5), draw_labels(labels, 0.1, 6))
    assert set(draw_labels(labels, 0.01, 5)) <= set(draw_labels(labels, 0.1, 5))


def test_a_spread_is_mean_and_sample_deviation():
    values = (0.5, 0.7, 0.9)
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(0.7)
    assert spread.deviation == pytest.approx((2 * 0.2**2 / 2) ** 0.5)
    assert spread.values == values
    assert Spread.of([0.5]).deviation == 0
    assert str(Spread.of(values)) == "70.0% ± 20.0%"


def test_separable_classes_need_one_label_each():
    result = evaluate_semi_supervised(
        mean_colour(), coloured(80, noise=20), SemiSettings(draws=2, epochs=5, holdout=0.25)
    )
    one, ten = result.shares
    assert (one.images, ten.images, result.train, result.test) == (4, 8, 60, 20)
    assert one.knn.mean == one.linear.mean == 1
    assert len(ten.linear.values) == 2
    assert one.finetune is None
    assert "1% of labels (4 images): linear 100.0% ± 0.0%" in result.summary()
    assert result.picture().size == (600, 400)


def test_only_the_drawn_labels_are_learned_from(monkeypatch):
    source = replace(coloured(80), test=np.arange(80) >= 60)
    learned, voted = [], []

    def sweep(features, labels, **rest):
        learned.append(labels.tolist())
        return probe.sweep(features, labels, **rest)

    def knn_accuracy(bank, bank_labels, *rest, **more):
        voted.append(bank_labels.tolist())
        return knn.knn_accuracy(bank, bank_labels, *rest, **more)

    monkeypatch.setattr(semi_supervised, "sweep", sweep)
    monkeypatch.setattr(semi_supervised, "knn_accuracy", knn_accuracy)
    evaluate_semi_supervised(mean_colour(), source, SemiSettings(draws=2, epochs=1, seed=7))
    train = source.labels[:60]
    expected = [train[draw_labels(train, share, seed)].tolist() for share in (0.01, 0.1) for seed in (7, 8)]
    assert learned == voted == expected


def test_fine_tuning_uses_the_same_draws(tmp_path):
    settings = SemiSettings(draws=2, epochs=2, finetune=True, finetune_epochs=2, holdout=0.25)
    result = evaluate_semi_supervised(tiny_encoder(tmp_path), coloured(64), settings)
    assert len(result.shares[0].finetune.values) == 2
    assert "fine-tuned" in result.summary()
    result.picture()


def test_a_bundle_can_do_all_but_fine_tuning():
    with pytest.raises(InvalidField, match="finetune=true needs the network"):
        evaluate_semi_supervised(mean_colour(), coloured(), SemiSettings(finetune=True))


def test_without_labels_it_says_so():
    with pytest.raises(InvalidField, match="semi_supervised needs labels"):
        evaluate_semi_supervised(mean_colour(), without_labels(coloured()), SemiSettings())


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"epochs": 0}, {"finetune_epochs": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidField, match=next(iter(wrong))):
        SemiSettings(**wrong)
