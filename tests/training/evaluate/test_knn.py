"""k-NN: the vote against loops in float64, and what is said about data that cannot be voted on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import coloured, mean_colour, source_of, tiny_encoder, without_labels
from training.evaluate import knn
from training.evaluate.knn import KnnSettings, evaluate_knn, knn_accuracy, knn_votes, top_accuracy


def _literal(bank, bank_labels, queries, classes, k, temperature):
    """Wu et al. 2018, section 3.4, with loops."""
    votes = np.zeros((len(queries), classes))
    counts = np.zeros((len(queries), classes))
    for i, query in enumerate(queries):
        cosines = [
            sum(a * b for a, b in zip(query, row, strict=True)) / math.hypot(*query) / math.hypot(*row)
            for row in bank
        ]
        for j in sorted(range(len(bank)), key=lambda j: -cosines[j])[:k]:
            votes[i, bank_labels[j]] += math.exp(cosines[j] / temperature)
            counts[i, bank_labels[j]] += 1
    return votes, counts


def _random(n=40, m=15, dim=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(n, dim, generator=generator) * torch.rand(n, 1, generator=generator) * 10
    queries = torch.randn(m, dim, generator=generator) * 3
    return (
        bank,
        torch.randint(classes, (n,), generator=generator),
        queries,
        torch.randint(classes, (m,), generator=generator),
    )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5), (40, 1.0)])
def test_votes_are_those_of_the_paper(k, temperature):
    bank, bank_labels, queries, _ = _random()
    votes, counts = knn_votes(bank, bank_labels, queries, classes=4, k=k, temperature=temperature)
    expected, expected_counts = _literal(
        bank.double().tolist(), bank_labels.tolist(), queries.double().tolist(), 4, k, temperature
    )
    shares = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(votes.numpy(), shares, atol=1e-5)
    np.testing.assert_allclose(counts.numpy(), expected_counts + shares / 2, atol=1e-5)


def test_chunks_give_what_one_product_gives(monkeypatch):
    bank, bank_labels, queries, _ = _random()
    whole = knn_votes(bank, bank_labels, queries, classes=4, k=5, temperature=0.07)
    monkeypatch.setattr(knn, "CHUNK", 2 * len(bank))
    parts = knn_votes(bank, bank_labels, queries, classes=4, k=5, temperature=0.07)
    torch.testing.assert_close(parts, whole)


def test_the_length_of_a_vector_does_not_matter():
    bank, bank_labels, queries, labels = _random()
    one = knn_accuracy(bank, bank_labels, queries, labels, 4)
    assert knn_accuracy(bank * 100, bank_labels, queries / 50, labels, 4) == one


def test_more_neighbours_than_images_means_all_images():
    bank, bank_labels, queries, labels = _random()
    all_of_them = knn_accuracy(bank, bank_labels, queries, labels, 4, k=len(bank))
    assert knn_accuracy(bank, bank_labels, queries, labels, 4, k=10_000) == all_of_them


def test_a_low_temperature_cannot_overflow():
    bank, bank_labels, queries, _ = _random()
    votes, _ = knn_votes(bank, bank_labels, queries, classes=4, k=5, temperature=1e-3)
    assert votes.isfinite().all()
    nearest = (torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(bank).T).argmax(1)
    assert torch.equal(votes.argmax(1), bank_labels[nearest])


def test_half_precision_features_are_compared_in_float32():
    bank, bank_labels, queries, _ = _random()
    with torch.autocast("cpu", torch.bfloat16):
        votes, _ = knn_votes(
            bank.bfloat16(), bank_labels, queries.bfloat16(), classes=4, k=5, temperature=0.07
        )
    expected, _ = knn_votes(
        bank.bfloat16().float(), bank_labels, queries.bfloat16().float(), classes=4, k=5, temperature=0.07
    )
    torch.testing.assert_close(votes, expected)


def test_a_plain_tie_goes_to_the_nearer_class():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    _, counts = knn_votes(
        bank, torch.tensor([1, 0]), torch.tensor([[1.0, 0.2]]), classes=2, k=2, temperature=1.0
    )
    assert counts.argmax() == 1


def test_a_class_without_a_vote_is_not_among_the_best_five():
    scores = torch.tensor([[0.7, 0.3, 0, 0, 0, 0]])
    assert top_accuracy(scores, torch.tensor([1]), 5) == 1
    assert top_accuracy(scores, torch.tensor([2]), 5) == 0


def test_a_perfect_encoder_is_right_about_everything():
    result = evaluate_knn(mean_colour(), coloured(80), KnnSettings(k=5, holdout=0.25))
    assert (result.top1, result.plain_top1, result.top5) == (1, 1, None)
    assert (result.train, result.test, result.classes, result.k) == (60, 20, 4, 5)
    assert result.confusion.tolist() == (np.eye(4, dtype=int) * 5).tolist()
    assert "100.0%" in result.summary()
    assert result.picture().size == (1200, 600)


def test_k_is_at_most_half_of_what_there_is_to_learn_from():
    assert evaluate_knn(mean_colour(), coloured(12), KnnSettings(holdout=0.33)).k == 4


def test_images_of_the_datas_own_test_part_are_the_queries():
    source = coloured(24)
    kept = source_of(
        [source.fetch(row) for row in range(24)],
        labels=source.labels.tolist(),
        class_names=source.class_names,
        test=[row >= 16 for row in range(24)],
    )
    result = evaluate_knn(mean_colour(), kept, KnnSettings(k=1, holdout=0.5))
    assert (result.train, result.test) == (16, 8)


def test_an_encoder_is_judged_on_what_its_training_held_out():
    encoder = mean_colour()
    encoder.holdout = 0.5
    assert evaluate_knn(encoder, coloured(40), KnnSettings()).test == 20


def test_baselines_stand_beside_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(knn, "baselines", lambda encoder: [mean_colour(), tiny_encoder(tmp_path)])
    result = evaluate_knn(mean_colour(), coloured(24), KnnSettings(k=1, baseline=True))
    assert set(result.baselines) == {"eye", "tiny"}
    assert "\ntiny: top-1" in result.summary()


def test_without_labels_it_says_what_needs_none():
    with pytest.raises(InvalidField, match=r"knn needs labels.*near_duplicates"):
        evaluate_knn(mean_colour(), without_labels(coloured()), KnnSettings())


def test_one_class_cannot_be_told_apart():
    with pytest.raises(InvalidField, match="only 'red'"):
        evaluate_knn(mean_colour(), coloured(20, classes=1), KnnSettings())


def test_one_image_for_each_class_leaves_nothing_to_judge_on():
    with pytest.raises(InvalidField, match="held out"):
        evaluate_knn(mean_colour(), coloured(4), KnnSettings())


def test_images_without_a_label_neither_vote_nor_count():
    source = coloured(80)
    source.labels[::8] = -1
    result = evaluate_knn(mean_colour(), source, KnnSettings(k=3, holdout=0.25))
    assert result.train + result.test == 70


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}, {"holdout": 1.0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidField, match=next(iter(wrong))):
        evaluate_knn(mean_colour(), coloured(), KnnSettings(**wrong))


def test_no_bank_and_no_query_are_refused():
    bank, bank_labels, queries, labels = _random()
    with pytest.raises(InvalidField, match="empty"):
        knn_accuracy(bank[:0], bank_labels[:0], queries, labels, 4)
    with pytest.raises(InvalidField, match="hold some out"):
        knn_accuracy(bank, bank_labels, queries[:0], labels[:0], 4)
