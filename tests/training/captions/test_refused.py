"""What people give to methods that learn from captions by mistake: told at once, or skipped and reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from embedserve.cli import main
from embedserve.errors import BadRequest, EmbedServeError, InvalidField, NotFound
from tests.training.data.samples import picture
from tests.training.pictures import QUICK
from tests.training.text.examples import hugging_face_folder
from training.train import train

SCRIPTS = ("赤い靴が二足", "красный ботинок", "حذاء أحمر", "빨간 신발", "รองเท้าสีแดง", "👟 red", "Schuh ßü")
COUNT = 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        picture(number, 32, 32).save(folder / f"{number:02}.png")
    return folder


def listed(images: Path, name: str, captions: list[str], column: str = "caption") -> str:
    """A list of the pictures with these captions, over and over."""
    lines = [f'{number:02}.png,"{captions[number % len(captions)]}"' for number in range(COUNT)]
    (images / f"{name}.csv").write_text(f"path,{column}\n" + "\n".join(lines) + "\n")
    return str(images / f"{name}.csv")


def numbered(images: Path) -> str:
    return listed(images, "numbered", [f"a picture of number {number}" for number in range(COUNT)])


def settings(**changes: object) -> dict[str, str]:
    given = QUICK | {"epochs": "1", "batch_size": "4", "text": "transformer/1x32", "shared_length": "32"}
    return given | {key: str(value) for key, value in changes.items()}


# ------------------------------------------------------------------------------------ what is reported


def trained(data: str, out: Path, method: str = "clip", **changes: object) -> dict[str, object]:
    """What config.json says of the data after a run through it."""
    assert train(method, data, out, settings(**changes)).finished
    return dict(json.loads((out / "config.json").read_text())["data"])


def test_images_without_a_caption_or_with_an_empty_one_are_skipped_and_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["", "   ", *[f"number {number}" for number in range(2, COUNT)]]
    data = trained(listed(images, "gaps", texts), tmp_path / "run")
    reasons = {"00.png": "no caption in the column 'caption'", "01.png": "its captions were all left out"}
    assert data["skipped"] == [{"key": key, "reason": reason} for key, reason in reasons.items()]
    assert data["images"] == COUNT - 2 - int(str(data["heldout"]))
    said, readme = capsys.readouterr().err, (tmp_path / "run" / "README.md").read_text()
    for key, reason in reasons.items():
        assert f"skipped {key}: {reason}" in said
        assert f"`{key}`: {reason}" in readme
    counts = "18 captions from the column 'caption', 18 different; left out: 1 empty"
    assert counts in said
    assert counts in readme


def test_captions_longer_than_the_context_are_cut_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{'long ' * 100}{number}" if number < 7 else f"short {number}" for number in range(COUNT)]
    data = trained(listed(images, "long", texts), tmp_path / "run", "siglip")
    said = "7 of 20 captions fill the text tower's 77 tokens; what is longer is cut."
    assert data["captions"] == {
        "from": "the column 'caption'",
        "left_out": {},
        "captions": 20,
        "different": 20,
        "remarks": [said],
    }
    assert said in capsys.readouterr().err


def test_other_scripts_train_and_are_remarked_on_where_the_tower_does_not_know_them(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = listed(images, "scripts", [f"{SCRIPTS[number % 7]} {number}" for number in range(COUNT)])
    trained(data, tmp_path / "bytes")
    assert "vocabulary" not in capsys.readouterr().err
    trained(data, tmp_path / "words", text=f"hf:{hugging_face_folder(tmp_path / 'bert')}")
    assert "are not in the text tower's vocabulary; it may not know their language" in capsys.readouterr().err


def test_noise_is_left_out_and_counted_where_that_was_asked_for(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["IMG_1234", "two words", *[f"a picture of number {number}" for number in range(COUNT - 2)]]
    data = trained(listed(images, "noise", texts), tmp_path / "run", filter="align")
    assert len(data["skipped"]) == 2  # type: ignore[arg-type]
    assert "left out: 1 an address or a file's name, 1 fewer than 3 words" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- what is refused


def refused(data: str, out: Path, method: str = "clip", **changes: object) -> EmbedServeError:
    """The error; a refused run leaves nothing behind."""
    with pytest.raises((InvalidField, BadRequest, NotFound)) as told:
        train(method, data, out, settings(**changes))
    assert not out.exists()
    return told.value


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("lit", {"lock": "both"}, "Both towers are locked, so there is nothing to train"),
        ("clip", {"image_learns": "nothing", "text_learns": "nothing"}, "Both towers are locked"),
        ("clip", {"captions": "titel"}, "captions='titel' is not known here; .*There are: caption, name"),
        ("clip", {"captions": "label"}, "captions=label, but '.*' has no labels"),
        ("clip", {"captions": "label", "templates": "a photo|{}"}, "template 'a photo' has 0 places"),
        ("clip", {"shared_length": 0}, "shared_length=0; it must be at least 1"),
        ("clip", {"shared_length": 10**8}, "shared_length=100000000; it must be at most 16384"),
        ("clip", {"image_learns": "blocks", "last_blocks": 0}, "last_blocks=0; it must be at least 1"),
        ("clip", {"image_learns": "blocks", "last_blocks": 9}, "last_blocks=9, but the tower has only 4"),
        ("siglip", {"text_learns": "blocks"}, "last_blocks=2, but the tower has only 1"),
        ("clip", {"text_learns": "lora", "lora_rank": 0}, "lora_rank=0; it must be at least 1"),
        ("clip", {"image_learns": "lora"}, "image_learns=lora adds to the matrices of transformers"),
        ("clip", {"chunk": -1}, "chunk=-1; it must be at least 0"),
        ("clip", {"label_smoothing": 1.5}, "label_smoothing=1.5; it must be within 0 to 1"),
        ("clip", {"filter": "alignn"}, "input should be 'none' or 'align'"),
        ("clip", {"text": "clip"}, "text='clip' is unknown"),
        ("clip", {"text_start": "laion2b"}, "text_start is for text towers of open_clip"),
        ("clip", {"text": "hf:nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_told_and_leaves_no_run(
    method: str, changes: dict[str, object], said: str, images: Path, tmp_path: Path
) -> None:
    error = refused(numbered(images), tmp_path / "run", method, **changes)
    assert re.search(said, str(error))


def test_one_caption_for_all_images_is_refused(images: Path, tmp_path: Path) -> None:
    error = refused(listed(images, "same", ["a product photo"]), tmp_path / "run")
    assert "it cannot tell them apart" in str(error)


def test_no_caption_at_all_is_refused(images: Path, tmp_path: Path) -> None:
    error = refused(listed(images, "none", [" "]), tmp_path / "run")
    assert "None of the 20 images" in str(error)
    assert "left out: 20 empty" in str(error)


def test_a_list_without_a_column_of_captions_names_its_columns(images: Path, tmp_path: Path) -> None:
    error = refused(listed(images, "titles", ["one", "two"], "title"), tmp_path / "run")
    assert "captions=name (their file names), or a column: title." in str(error)


def test_a_tokenizer_of_another_tower_is_refused(images: Path, tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "bert", vocabulary=6)
    data = listed(images, "words", ["a red shoe", "a blue hat"])
    error = refused(data, tmp_path / "run", text=f"hf:{folder}")
    assert "but the tower knows 6 tokens: they do not belong together" in str(error)


def test_a_folder_that_was_there_before_stays(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(InvalidField):
        train("clip", numbered(images), tmp_path / "run", settings(chunk=-1))
    assert (tmp_path / "run").is_dir()


def test_the_command_says_it_in_one_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part for key, one in settings(lock="both").items() for part in ("--set", f"{key}={one}")]
    code = main(["train", "lit", "--data", numbered(images), "--out", str(tmp_path / "run"), *given])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("embedserve: Both towers are locked")
