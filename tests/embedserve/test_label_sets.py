"""Label sets as they are checked and saved, without HTTP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedserve.bundle import open_bundle, pack_vector
from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound, TooLarge
from embedserve.label_sets import (
    DEFAULT_TEMPLATES,
    Fitted,
    LabelSet,
    LabelSets,
    LinearLabelSet,
    check_encoder,
    check_labels,
    check_templates,
    linear_label_set,
)


def test_labels_are_their_own_prompts() -> None:
    assert check_labels(["a cat", "a dog"], 10) == {"a cat": ["a cat"], "a dog": ["a dog"]}
    assert check_labels({"cat": "a cat", "dog": ["a dog", "a pup"]}, 10) == {
        "cat": ["a cat"],
        "dog": ["a dog", "a pup"],
    }
    with pytest.raises(TooLarge, match="at most 2"):
        check_labels(["a", "b", "c"], 2)
    with pytest.raises(TooLarge, match="longer than"):
        check_labels(["x" * 1001], 2)


def test_default_templates_are_valid_and_replace_nothing_else() -> None:
    assert check_templates(None) == DEFAULT_TEMPLATES == check_templates(DEFAULT_TEMPLATES)
    with pytest.raises(InvalidField, match=r"exactly once"):
        check_templates(["{0}"])


def test_a_label_set_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    sets = LabelSets(tmp_path / "labelsets")
    assert sets.names() == []
    pets = LabelSet({"Katze": ["eine Katze", "猫"], "dog": ["a dog"]}, ("{}!",), "sigmoid")
    assert sets.put("pets", pets)
    assert not sets.put("pets", pets)
    assert LabelSets(tmp_path / "labelsets").get("pets") == pets
    assert sets.names() == ["pets"]
    sets.delete("pets")
    with pytest.raises(NotFound, match="there are none yet"):
        sets.get("pets")
    with pytest.raises(NotFound):
        sets.delete("pets")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", ".hidden", "a.json", "x" * 65])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    sets = LabelSets(tmp_path)
    for call in (sets.get, sets.delete, lambda name: sets.put(name, LabelSet({"a": ["a"]}))):
        with pytest.raises(InvalidField, match="cannot name a label set"):
            call(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"labels": 3}', '{"labels": {}, "templates": 3}', "\xff"])
def test_a_damaged_file_is_told_and_can_be_saved_again(tmp_path: Path, text: str) -> None:
    sets = LabelSets(tmp_path)
    (tmp_path / "pets.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EmbedServeError, match="damaged; save the set again"):
        sets.get("pets")
    sets.put("pets", LabelSet({"a": ["a"]}))
    assert sets.get("pets").labels == {"a": ["a"]}


def test_a_failed_save_leaves_the_old_set_and_no_litter(tmp_path: Path) -> None:
    sets = LabelSets(tmp_path)
    sets.put("pets", LabelSet({"a": ["a"]}))
    with pytest.raises(UnicodeEncodeError):
        sets.put("pets", LabelSet({"\ud800": ["a"]}))
    assert sets.get("pets").labels == {"a": ["a"]}
    assert [path.name for path in tmp_path.iterdir()] == ["pets.json"]
    assert json.loads((tmp_path / "pets.json").read_text())["activation"] is None


# --- linear sets ----------------------------------------------------------------------------------------

WEIGHTS = np.array([[4, 0, 0], [0, 0.1, -7]], np.float32)


def given(**changes: Any) -> dict[str, Any]:
    """The fields of a good linear set of two labels and three numbers, with changes."""
    fitted = Fitted("linear", {"warm": 5, "cool": 1}, 5, 0.8, 0.1, "photos", "colour")
    return {
        "labels": ["warm", "cool"],
        "weights": pack_vector(WEIGHTS),
        "bias": [0.5, -0.25],
        "dim": 3,
        "encoder": "tiny",
        "fingerprint": "f" * 64,
        "fitted": fitted,
        **changes,
    }


def fitted(**changes: Any) -> dict[str, Any]:
    return {"fitted": replace(given()["fitted"], **changes)}


def test_a_linear_set_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    sets = LabelSets(tmp_path)
    saved = linear_label_set(**given())
    assert sets.put("tones", saved)
    found = sets.get("tones")
    assert isinstance(found, LinearLabelSet)
    assert (found.labels, found.dim, found.encoder) == (("warm", "cool"), 3, "tiny")
    np.testing.assert_array_equal(found.weights, WEIGHTS)
    assert found.weights.dtype == np.float32
    np.testing.assert_array_equal(found.bias, [0.5, -0.25])
    assert found.fitted == saved.fitted


def test_a_damaged_linear_set_is_told(tmp_path: Path) -> None:
    sets = LabelSets(tmp_path)
    sets.put("tones", linear_label_set(**given()))
    file = tmp_path / "tones.json"
    file.write_text(file.read_text().replace('"dim": 3', '"dim": 4'))
    with pytest.raises(EmbedServeError, match="damaged; save the set again"):
        sets.get("tones")


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"labels": ["warm"]}, "labels", "two or more"),
        ({"labels": ["warm", "warm"]}, "labels", "given twice"),
        ({"labels": ["warm", " "]}, "labels", "empty"),
        ({"labels": ["warm", "cool", "green"]}, "weights", "need 9"),
        ({"dim": 4}, "weights", "need 8"),
        ({"dim": 0}, "weights", "need 0"),
        ({"weights": "not base64!"}, "weights", "base64"),
        ({"weights": pack_vector(WEIGHTS)[:-4]}, "weights", "base64"),
        ({"weights": pack_vector(np.where(WEIGHTS > 3, np.inf, WEIGHTS))}, "weights", "not finite"),
        ({"bias": [0.5]}, "bias", "each of the 2"),
        ({"bias": [0.5, float("nan")]}, "bias", "not finite"),
        (fitted(counts={"warm": 5}), "fitted.counts", "1 or more"),
        (fitted(counts={"warm": 5, "cool": 0}), "fitted.counts", "1 or more"),
        (fitted(counts={"cool": 1, "warm": 5}), "fitted.counts", "order"),
        (fitted(judged=7), "fitted.judged", "0 to 6"),
        (fitted(accuracy=1.5), "fitted.accuracy", "0 to 1"),
        (fitted(ece=None), "fitted.ece", "null where none"),
        (fitted(judged=0), "fitted.accuracy", "null where none"),
    ],
)
def test_a_linear_set_that_cannot_be_says_why(change: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidField, match=says) as caught:
        linear_label_set(**given(**change))
    assert caught.value.param == param


def test_a_linear_set_belongs_to_one_encoder(tiny_folder: Path) -> None:
    bundle = open_bundle(tiny_folder)
    check_encoder(linear_label_set(**given(fingerprint=bundle.fingerprint)), bundle)  # 3 of its 8 numbers
    with pytest.raises(Conflict, match=r"'tiny' \(ffffffff, 3 numbers\); this server runs 'tiny'"):
        check_encoder(linear_label_set(**given()), bundle)
