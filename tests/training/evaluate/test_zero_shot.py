"""Zero-shot classification: against loops in float64, and what is stored in a bundle."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.bundle import Scoring, open_bundle
from embedserve.classify import probabilities
from embedserve.cli import main
from embedserve.encoder import Encoder, resolve
from embedserve.errors import BundleError, InvalidField
from embedserve.label_sets import DEFAULT_TEMPLATES
from tests.embedserve.api.requests import ok, serving
from tests.training.evaluate.samples import EyeEncoder, mean_colour, source_of, unit
from training.data import Source
from training.evaluate import find
from training.evaluate.encoder import BundleEncoder
from training.evaluate.zero_shot import ZeroShotSettings, evaluate_zero_shot
from training.evaluate.zero_shot_picture import MOST_CLASSES, worst_classes

COLOURS = ("red", "green", "blue")


def muddled(count: int = 240, seed: int = 0) -> Source:
    """Plain pictures whose colour is mixed, sometimes so much that another colour is the stronger one."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, count)
    levels = chance.uniform(0, 200, (count, 3))
    levels[np.arange(count), labels] += 55
    pixels = np.broadcast_to(levels[:, None, None], (count, 8, 8, 3)).astype(np.uint8)
    return source_of(list(pixels), labels=labels.tolist(), class_names=COLOURS, name="muddled")


class _Words:
    """Texts whose vectors follow from a table; a text is the sum of the words that the table has."""

    scoring = Scoring(logit_scale=20.0)

    def __init__(self, table: dict[str, Sequence[float]]) -> None:
        self.table = table
        self.asked: list[str] = []

    def embed(self, texts: Sequence[str], *, progress=lambda done, total: None) -> torch.Tensor:
        self.asked += texts
        vectors = [
            sum(torch.tensor(self.table.get(word, (0.1, 0.1, 0.1))) for word in text.rstrip(".").split())
            for text in texts
        ]
        return unit(torch.stack(vectors).float())


def _eye(scoring: Scoring | None = None) -> EyeEncoder:
    encoder = EyeEncoder(lambda pixels: pixels.mean((0, 1)) / 255 + 0.01)
    encoder.reader = _Words(
        {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "dark": (0.2, 0.3, 0.1)}
    )
    if scoring:
        encoder.reader.scoring = scoring
    return encoder


def _literal(source: Source, encoder: EyeEncoder, templates: Sequence[str]):
    """The order of the classes for every image, with loops in float64."""
    classes = []
    for name in source.class_names:
        rows = [encoder.reader.embed([one.replace("{}", name)])[0].double().numpy() for one in templates]
        mean = sum(row / np.linalg.norm(row) for row in rows) / len(rows)
        classes.append(mean / np.linalg.norm(mean))
    orders = []
    for row in range(len(source)):
        vector = np.array(encoder.function(np.asarray(source.read(row), np.float64)))
        scores = [float(vector @ one) for one in classes]
        orders.append(sorted(range(len(scores)), key=lambda one: -scores[one]))
    return orders


def test_accuracies_and_classes_are_the_literal_ones() -> None:
    source, encoder, templates = muddled(), _eye(), ("{}", "a dark {}.")
    result = evaluate_zero_shot(encoder, source, ZeroShotSettings(templates="|".join(templates)))
    orders, labels = _literal(source, encoder, templates), source.labels.tolist()
    named = [order[0] for order in orders]
    assert result.top1 == pytest.approx(
        np.mean([one == label for one, label in zip(named, labels, strict=True)])
    )
    assert 0.5 < result.top1 < 0.95
    recalls = []
    for number, name in enumerate(COLOURS):
        own = [one for one, label in zip(named, labels, strict=True) if label == number]
        recalls.append(own.count(number) / len(own))
        figures = result.by_class[name]
        assert (figures.images, figures.recall) == (len(own), pytest.approx(recalls[-1]))
        assert figures.precision == pytest.approx(own.count(number) / named.count(number))
        others = {COLOURS[one]: own.count(one) for one in range(3) if one != number}
        assert figures.confused == max(others.values()) == others[figures.confused_with]
    assert result.per_class == pytest.approx(np.mean(recalls))
    assert result.top5 is None
    assert result.calibration.fitted_on == result.calibration.judged_on == 120
    assert result.calibration.error < result.calibration.error_before
    assert result.calibration.log_loss < result.calibration.log_loss_before
    assert "calibration error" in result.summary()
    assert result.picture().size == (1800, 600)


def test_class_names_are_said_in_words_in_every_template() -> None:
    encoder, source = _eye(), muddled(20)
    source = source_of(
        [source.fetch(row) for row in range(20)],
        labels=source.labels.tolist(),
        class_names=("red_boot", "x-y", "b"),
    )
    evaluate_zero_shot(encoder, source, ZeroShotSettings())
    assert encoder.reader.asked[: len(DEFAULT_TEMPLATES)] == [
        template.replace("{}", "red boot") for template in DEFAULT_TEMPLATES
    ]
    assert "a photo of x y." in encoder.reader.asked


def test_sigmoids_get_a_scale_and_a_bias() -> None:
    before = Scoring(activation="sigmoid", logit_scale=10.0, logit_bias=-10.0)
    result = evaluate_zero_shot(_eye(before), muddled(), ZeroShotSettings())
    assert result.calibration.bias != result.calibration.bias_before == -10
    assert result.calibration.error < result.calibration.error_before
    assert "and bias" in result.summary()


def test_top5_counts_with_more_than_five_classes() -> None:
    source = muddled(60)
    names = (*COLOURS, "dark", "round", "square")
    more = source_of(
        [source.fetch(row) for row in range(60)], labels=source.labels.tolist(), class_names=names
    )
    result = evaluate_zero_shot(_eye(), more, ZeroShotSettings(templates="{}"))
    orders = _literal(more, _eye(), ["{}"])
    right = [label in order[:5] for order, label in zip(orders, source.labels.tolist(), strict=True)]
    assert result.top5 == pytest.approx(np.mean(right))
    assert set(result.by_class) == set(COLOURS)


def test_the_datas_test_part_is_judged_then_what_was_held_out_then_all() -> None:
    source = muddled(100)
    assert evaluate_zero_shot(_eye(), source, ZeroShotSettings()).images == 100
    held = _eye()
    held.holdout = 0.3
    assert evaluate_zero_shot(held, source, ZeroShotSettings()).images == 30
    assert evaluate_zero_shot(held, source, ZeroShotSettings(images="all")).images == 100
    source.test[:40] = True
    assert evaluate_zero_shot(held, source, ZeroShotSettings()).images == 40


def test_few_images_are_judged_but_not_calibrated() -> None:
    result = evaluate_zero_shot(_eye(), muddled(60), ZeroShotSettings())
    assert result.calibration is None
    assert "100 labelled images at least; there are 60" in result.summary()
    assert result.picture().size == (1200, 600)


def test_an_encoder_without_text_says_what_to_do() -> None:
    with pytest.raises(InvalidField, match=r"no text tower.*knn, linear and retrieval"):
        evaluate_zero_shot(mean_colour(), muddled(), ZeroShotSettings())


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (source_of([np.zeros((8, 8, 3), np.uint8)] * 2), {}, "needs labels"),
        (muddled(), {"templates": "a photo"}, "exactly once"),
        (muddled(), {"store": True}, "is a run"),
    ],
)
def test_what_makes_no_sense_is_said(source: Source, settings: dict, said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        evaluate_zero_shot(_eye(), source, ZeroShotSettings(**settings))


def test_many_classes_are_drawn_by_the_worst_and_no_image_is_lost() -> None:
    chance = np.random.default_rng(0)
    confusion = np.diag(np.arange(20, 70)) + chance.integers(0, 2, (50, 50))
    shown, names = worst_classes(confusion, [f"c{one}" for one in range(50)])
    assert len(names) == MOST_CLASSES + 1
    assert names[-1] == "(others)"
    assert shown.sum() == confusion.sum()
    assert "c0" in names
    assert "c49" not in names


# ---------------------------------------------------------------------------------------- in a bundle


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def _files(source: Source, folder: Path) -> Path:
    for row in range(len(source)):
        place = folder / COLOURS[source.labels[row]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.png").write_bytes(_png(source.fetch(row)))
    return folder


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_stored_scale_is_what_the_server_answers_with(copied: Path, tmp_path: Path) -> None:
    data = _files(muddled(), tmp_path / "data")
    before = open_bundle(copied)
    arguments = ["eval", "zero_shot", str(copied), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--set", "store=true", "--set", "templates={}"]) == 0
    after = open_bundle(copied)
    measured = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    calibration = measured["result"]["calibration"]
    assert after.fingerprint == before.fingerprint
    assert after.description.scoring.logit_scale == pytest.approx(calibration["scale"], rel=1e-5)
    assert after.description.scoring.logit_scale != before.description.scoring.logit_scale == 10
    kept = after.description.evaluation["zero_shot"]
    assert kept["command"] == measured["command"]
    assert "store=true" in kept["command"]
    assert str(data) in kept["command"]
    assert kept["calibration_error"] < kept["calibration_error_before"]
    image = _png(np.full((8, 8, 3), (120, 100, 60), np.uint8))
    with serving(tmp_path / "served", copied) as client:
        answer = ok(
            client.post(
                "/v1/classify",
                json={
                    "images": [base64.b64encode(image).decode()],
                    "labels": list(COLOURS),
                    "templates": ["{}"],
                },
            )
        )
    served = {one["label"]: one for one in answer["results"][0]["labels"]}
    cosines = np.array([[served[name]["cosine"] for name in COLOURS]])
    expected = probabilities(cosines, Scoring(logit_scale=calibration["scale"]))[0]
    assert [served[name]["probability"] for name in COLOURS] == pytest.approx(expected, rel=1e-4)
    Encoder.load(copied).prove()


def test_earlier_figures_of_a_bundle_stay(copied: Path, tmp_path: Path) -> None:
    find("zero_shot").run(
        BundleEncoder(str(copied)), muddled(), ZeroShotSettings(store=True), tmp_path / "first"
    )
    vague = ZeroShotSettings(store=True, templates="{} dark round small")
    first = open_bundle(copied).description
    find("zero_shot").run(BundleEncoder(str(copied)), muddled(seed=1), vague, tmp_path / "second")
    second = open_bundle(copied).description
    assert second.evaluation["zero_shot"]["logit_scale_before"] == first.scoring.logit_scale
    assert second.model_dump(exclude={"scoring", "evaluation"}) == first.model_dump(
        exclude={"scoring", "evaluation"}
    )


def test_too_few_images_store_nothing(copied: Path) -> None:
    with pytest.raises(InvalidField, match="100 labelled images at least; there are 60"):
        evaluate_zero_shot(BundleEncoder(str(copied)), muddled(60), ZeroShotSettings(store=True))
    assert open_bundle(copied).description.scoring.logit_scale == 10


def test_a_scale_that_is_no_better_on_other_images_is_not_stored(copied: Path, tmp_path: Path) -> None:
    first = find("zero_shot").run(
        BundleEncoder(str(copied)), muddled(), ZeroShotSettings(store=True), tmp_path / "first"
    )
    with pytest.raises(InvalidField, match="nothing is stored"):
        evaluate_zero_shot(BundleEncoder(str(copied)), muddled(seed=1), ZeroShotSettings(store=True))
    assert open_bundle(copied).description.scoring.logit_scale == pytest.approx(first.calibration.scale)


def test_the_starter_of_the_package_is_never_written_to() -> None:
    for path in ("starter", str(resolve("starter"))):
        with pytest.raises(InvalidField, match="Copy that folder"):
            evaluate_zero_shot(BundleEncoder(path), muddled(), ZeroShotSettings(store=True))


def test_results_inside_the_bundle_would_change_it_and_are_refused(copied: Path) -> None:
    encoder, settings = BundleEncoder(str(copied)), ZeroShotSettings(store=True)
    with pytest.raises(BundleError, match=r"eval/zero_shot\.json.*Move it elsewhere"):
        find("zero_shot").run(encoder, muddled(), settings, copied / "eval")
    assert open_bundle(copied).description.scoring.logit_scale == 10
