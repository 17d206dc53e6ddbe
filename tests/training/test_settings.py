"""Settings: what the user sets, what suits the data, and what is the default."""

from __future__ import annotations

import dataclasses
import json

import pytest

from embedserve.errors import InvalidField, NotFound
from training.methods import METHODS
from training.settings import (
    DataFacts,
    Settings,
    image_sizes,
    keys,
    parse_assignments,
    resolve,
)
from training.settings_help import KeyHelp, help_for

SOME = DataFacts(images=1000, heldout=100, native_size=300, on_gpu=False)


def test_a_value_is_the_users_else_what_suits_the_data_else_the_default() -> None:
    settings = resolve("simclr", "photos", {"epochs": "7", "temperature": "0.25"}, SOME)
    assert (settings.config.epochs, settings.options.temperature) == (7, 0.25)  # type: ignore[attr-defined]
    assert settings.origin["epochs"] == "set"
    assert settings.origin["batch_size"] == "suited"
    assert settings.origin["flip"] == "default"


def test_small_images_get_no_blur_and_large_ones_do() -> None:
    assert resolve("simclr", "x", {"size": "32"}, SOME).augmentation.blur == 0
    assert resolve("simclr", "x", {"size": "128"}, SOME).augmentation.blur == 0.5


def test_the_size_follows_the_images_and_is_bounded_without_a_gpu() -> None:
    assert image_sizes({}, 28, on_gpu=True) == (28, 28)
    assert image_sizes({}, 600, on_gpu=True) == (224, 256)
    assert image_sizes({}, 600, on_gpu=False) == (64, 72)
    assert image_sizes({"size": "96"}, 600, on_gpu=False) == (96, 112)
    assert image_sizes({"size": "96", "stored_size": "100"}, 600, on_gpu=False) == (96, 100)


def test_trained_weights_are_moved_with_a_tenth_of_the_learning_rate() -> None:
    anew, further = resolve("simclr", "x", {}, SOME), resolve("simclr", "x", {"start": "starter"}, SOME)
    assert further.recipe.lr == pytest.approx(anew.recipe.lr / 10)
    assert resolve("simclr", "x", {"start": "starter", "lr": "0.3"}, SOME).recipe.lr == 0.3


def test_epochs_and_batch_follow_the_number_of_images() -> None:
    few = resolve("simclr", "x", {}, dataclasses.replace(SOME, images=40))
    many = resolve("simclr", "x", {}, dataclasses.replace(SOME, images=60_000, on_gpu=True, native_size=28))
    assert few.config.batch_size == 8
    assert (many.config.batch_size, many.config.epochs) == (512, 200)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epoch": "3"}, "did you mean 'epochs'"),
        ({"epochs": "many"}, "epochs=many"),
        ({"epochs": "0"}, "at least 1"),
        ({"flip": "1.5"}, "within 0 to 1"),
        ({"batch_size": "2000"}, "more than the 1000 images"),
        ({"batch_size": "10", "accumulate": "3"}, "equal parts"),
        ({"precision": "fp8"}, "precision=fp8"),
        ({"method": "byol"}, "no such key"),
        ({"temperature": "0"}, "temperature=0"),
        ({"projection_dim": "0"}, "at least 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_the_fix(given: dict[str, str], said: str) -> None:
    with pytest.raises(InvalidField, match=said):
        resolve("simclr", "photos", given, SOME)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(InvalidField, match="has 1 images"):
        resolve("simclr", "photos", {}, dataclasses.replace(SOME, images=1))


def test_an_unknown_method_names_the_closest() -> None:
    with pytest.raises(NotFound, match="did you mean 'simclr'"):
        resolve("simcrl", "photos", {}, SOME)


def test_an_assignment_needs_an_equals_sign() -> None:
    assert parse_assignments(["lr=.1", "start=a=b"]) == {"lr": ".1", "start": "a=b"}
    with pytest.raises(InvalidField, match="key=value"):
        parse_assignments(["epochs"])


@pytest.mark.parametrize("name", METHODS)
def test_no_two_settings_of_a_method_share_a_name(name: str) -> None:
    assert "epochs" in keys(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_settings_come_back_from_json_as_they_were(name: str) -> None:
    settings = resolve(name, "photos", {}, dataclasses.replace(SOME, on_gpu=True))
    assert Settings.from_json(json.loads(json.dumps(settings.as_json()))) == settings


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_line_of_help(name: str) -> None:
    lines = [one for section in help_for(name).values() for one in section]
    assert not [one.key for one in lines if not one.text]


def test_help_shows_the_methods_own_recipe_and_what_follows_the_data() -> None:
    shown = {one.key: one.default for section in help_for("lit").values() for one in section}
    assert (shown["optimizer"], shown["weight_decay"], shown["flip"]) == ("adamw", "0.1", "0")
    assert shown["size"] == "32 to 224"
    assert shown["backbone"] == "resnet18 or resnet50"


def test_help_puts_a_long_default_on_a_line_of_its_own() -> None:
    short, long = (
        KeyHelp("lr", "0.1", "Rate."),
        KeyHelp("templates", "a photo of a {}|a picture of a {}", "Say."),
    )
    assert list(short.lines(20)) == ["  lr = 0.1          Rate."]
    assert list(long.lines(20)) == ["  templates = a photo of a {}|a picture of a {}", " " * 20 + "Say."]
