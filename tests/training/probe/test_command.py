"""`embedserve train probe` as it is typed: on a server, on the data folder, with an encoder without text."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedserve.bundle import new_bundle, open_bundle, seal
from embedserve.cli import main
from embedserve.client import Client
from embedserve.config import ServeConfig
from embedserve.label_sets import LabelSets, LinearLabelSet
from tests.embedserve.api.requests import listening
from tests.embedserve.colours import BLUE, GREEN, RED, png
from training.probe.labelled import label_of, labelled


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny bundle without its text tower."""
    out = tmp_path_factory.mktemp("bundles") / "wordless"
    with new_bundle(out) as folder:
        (folder / "image.onnx").write_bytes((tiny_folder / "image.onnx").read_bytes())
        described = open_bundle(tiny_folder).description
        seal(folder, described.model_copy(update={"text": None, "name": "wordless"}))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, wordless: Path) -> Path:
    """A data folder: `tints` has shades of three tones, one item without and one with several, a lone one."""
    data = tmp_path_factory.mktemp("data")
    shades = [(channel, value) for channel in range(3) for value in (255, 230, 205, 180, 155, 130)]
    items: list[dict[str, Any]] = [
        {
            "id": f"{channel}-{value}",
            "image": png(tuple(value if i == channel else 20 for i in range(3))),
            "metadata": {"shop": {"tone": ("reddish", "greenish", "bluish")[channel]}},
        }
        for channel, value in shades
    ]
    items += [
        {"id": "no tone", "image": png(RED), "metadata": {"tint": "red"}},
        {"id": "two", "image": png(RED), "metadata": {"shop": {"tone": ["reddish", "greenish"]}}},
        {"id": "night", "image": png((0, 0, 0)), "metadata": {"shop": {"tone": "night"}}},
    ]

    async def fill() -> None:
        async with Client.local(ServeConfig(data=data, encoder=str(wordless), threads=1)) as client:
            for name, some in (("tints", items), ("one", items[:6]), ("nothing", [])):
                await client.create_collection(name)
                if some:
                    assert (await client.upsert(name, some))["failed"] == 0

    asyncio.run(fill())
    return data


def probe(*more: str, name: str = "tints", label: str = "shop.tone", save: str = "tones") -> list[str]:
    return ["train", "probe", "--collection", name, "--label", label, "--save", save, *more]


def test_labels_are_learned_on_a_server_and_served_by_it(
    data: Path, wordless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for name, colour in (("red", RED), ("green", GREEN), ("blue", BLUE)):
        files[name] = tmp_path / f"{name}.png"
        files[name].write_bytes(png(colour))
    with listening(data, wordless) as url:
        assert main(probe("--url", url)) == 0
        shown = capsys.readouterr().out
        assert "tints: 19 items with one of 4 labels" in shown
        assert "passed over: 1 items without 'shop.tone', 1 with several labels" in shown
        assert "cannot be judged: 1 ('night')" in shown
        assert "100.0% of 18 held-out items right" in shown
        code = main(["classify", *map(str, files.values()), "--label-set", "tones", "--url", url, "--json"])
        assert code == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert [result["labels"][0]["label"] for result in results] == ["reddish", "greenish", "bluish"]


@pytest.mark.parametrize("kind", ["linear", "prototypes"])
def test_labels_are_learned_on_the_data_folder(
    data: Path, wordless: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--data", str(data), "--encoder", str(wordless), "--json"]
    assert main(probe("--kind", kind, *here, save=f"by-{kind}")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["items"], told["judged"]) == (kind, 19, 18)
    assert told["single"] == ["night"]
    assert told["skipped"] == {"without_label": 1, "several_labels": 1}
    saved = LabelSets(data / "labelsets").get(f"by-{kind}")
    assert isinstance(saved, LinearLabelSet)
    assert saved.labels == ("bluish", "greenish", "night", "reddish")
    assert saved.fingerprint == open_bundle(wordless).fingerprint
    assert dict(saved.fitted.counts) == {"bluish": 6, "greenish": 6, "night": 1, "reddish": 6}
    assert (saved.fitted.collection, saved.fitted.field) == ("tints", "shop.tone")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": "tin"}, "did you mean 'tint'?"),
        ({"name": "one"}, "holds the one label 'reddish'"),
        ({"name": "nothing"}, "is empty"),
        ({"name": "tint"}, "did you mean 'tints'?"),
        ({"save": "No Name"}, "cannot name a label set"),
    ],
)
def test_what_cannot_be_learned_says_why(
    data: Path, wordless: Path, change: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(probe("--data", str(data), "--encoder", str(wordless), **change)) == 1
    assert says in capsys.readouterr().err
    assert "No Name" not in LabelSets(data / "labelsets").names()


def test_torch_is_not_needed() -> None:
    code = "import sys, training.probe.saving; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("cat ", "cat"),
        (["cat"], "cat"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "true"),
        ("", None),
        (None, None),
        (["cat", "dog"], None),
        ({"a": "cat"}, None),
    ],
)
def test_texts_numbers_and_truth_are_labels(value: object, label: str | None) -> None:
    assert label_of(value) == label


def test_vectors_are_scaled_to_unit_length() -> None:
    found = labelled([({"a": "x"}, [3.0, 4.0]), ({"a": "y"}, [0.0, 2.0])], "a", "some")
    assert found.vectors.tolist() == [[0.6, 0.8], [0.0, 1.0]]
    assert found.labels == ("x", "y")
