"""README.md of a run says what it was, what came out, and how to go on."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from embedserve.errors import EmbedServeError
from tests.training.watch.examples import config_record, metrics
from training.watch import Alarm, write_readme


def readme(folder: Path, **changed: object) -> str:
    given = {"record": config_record(), "records": metrics(), "alarms": [], "finished": True, **changed}
    write_readme(folder, given["record"], given["records"], given["alarms"], finished=given["finished"])  # type: ignore[arg-type]
    return (folder / "README.md").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_it_begins_with_what_was_trained_on_what(tmp_path: Path) -> None:
    assert readme(tmp_path).startswith(
        "# simclr on my flowers\n\nA resnet18 (11.2 million parameters, 512 features), trained by simclr for "
        "5 epochs on 5,400 images of 2 classes, 32 pixels a side; 40 s, 160 images/s (median).\n"
    )


def test_the_time_adds_up_over_resumed_sessions_of_different_speed(tmp_path: Path) -> None:
    records = metrics()
    for one in records:
        if one["step"] > 50 and "images_per_second" in one:
            one["images_per_second"] = 16.0
    text = readme(tmp_path, records=records)
    assert "; 4 min, 88 images/s (median)" in text, "50 · 64 ÷ 160 + 50 · 64 ÷ 16 seconds"


def test_the_result_is_the_best_and_the_last_measurement(tmp_path: Path) -> None:
    result = section(readme(tmp_path), "Result")
    assert "| | best | last |" in result
    assert "| k-NN accuracy on held-out images | 90.0% | 80.0% |" in result
    assert "| effective rank of features | 38.0 | 40.0 |" in result
    assert "| after step | 80 | 100 |" in result


def test_without_labels_the_last_measurement_counts(tmp_path: Path) -> None:
    result = section(readme(tmp_path, records=metrics(labels=False)), "Result")
    assert "k-NN" not in result
    assert "| after step | 100 |" in result
    assert "the last one counts" in result


def test_alarms_come_before_the_result(tmp_path: Path) -> None:
    alarms = [Alarm("collapsed", "Spread | gone.", 2.5, 4), Alarm("stuck_at_ln_k", "Guessing.", 3)]
    text = readme(tmp_path, alarms=alarms)
    assert text.index("## Alarms") < text.index("## Result")
    assert section(text, "Alarms").strip().splitlines() == [
        "- **collapsed**, from epoch 2.5, until epoch 4: Spread \\| gone.",
        "- **stuck_at_ln_k**, from epoch 3: Guessing.",
    ]
    assert "## Alarms" not in readme(tmp_path)


def test_pictures_and_files_are_shown_that_are_there(tmp_path: Path) -> None:
    assert "![" not in readme(tmp_path)
    (tmp_path / "curves.png").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    text = readme(tmp_path)
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["curves.png"]
    files = section(text, "Files")
    assert "`curves.png`" in files
    assert "`checkpoints/last.pt`" in files
    assert "`checkpoints/best.pt`" not in files


def commands(text: str) -> list[list[str]]:
    """The commands of the readme, as a shell would split them."""
    block = section(text, "Commands").split("```sh\n")[1].split("```")[0]
    return [shlex.split(line) for line in block.splitlines() if not line.startswith("#")]


def test_an_interrupted_run_tells_the_command_that_goes_on(tmp_path: Path) -> None:
    text = readme(tmp_path, finished=False, records=metrics(50))
    assert "for 2.5 of 5 epochs" in text
    assert "It was interrupted." in text
    assert commands(text)[0] == [
        *("embedserve", "train", "simclr", "--data", "/data/my flowers", "--out", str(tmp_path)),
        *("--set", "seed=7", "--set", "compile=true", "--set", "lr=0.12"),
    ]


def test_a_finished_run_tells_how_to_measure_and_repeat_it(tmp_path: Path) -> None:
    again, *others = commands(readme(tmp_path))
    assert again[again.index("--out") + 1] == f"{tmp_path}-again"
    assert others == [
        ["embedserve", "eval", "knn", str(tmp_path)],
        ["embedserve", "eval", "linear", str(tmp_path)],
    ]


def test_names_with_spaces_and_quotes_are_safe_in_commands(tmp_path: Path) -> None:
    folder = tmp_path / "it's a run"
    folder.mkdir()
    assert commands(readme(folder))[1][-1] == str(folder)
    again = commands(readme(folder))[0]
    assert again[again.index("--out") + 1] == f"{folder}-again"


def test_several_processes_are_started_by_torchrun(tmp_path: Path) -> None:
    first = commands(readme(tmp_path, record=config_record(world_size=4), finished=False))[0]
    assert first[:6] == ["torchrun", "--nproc-per-node", "4", "-m", "embedserve", "train"]


def test_every_setting_is_listed_with_where_it_comes_from(tmp_path: Path) -> None:
    special, settings = section(readme(tmp_path), "Settings").split("<details>")
    assert re.findall(r"\n\| (\w+) \|", special) == [
        *("setting", "method", "data", "size", "batch_size", "seed", "compile", "lr", "temperature")
    ]
    assert "| lr | `0.12` | **set** |" in settings
    assert "| temperature | `0.5` | follows the data and the machine |" in settings
    assert "| flip | `0.5` | default |" in settings
    assert "| weight_decay_end |  |" in settings
    record = config_record()
    for part in ("config", "recipe", "augmentation", "options"):
        for key in record[part]:
            assert f"\n| {key} |" in settings


def test_the_data_is_described_and_what_was_skipped(tmp_path: Path) -> None:
    data = section(readme(tmp_path), "Data and machine")
    assert "- 5,400 images to train on, 600 held out." in data
    assert "tulip \\| &lt;b>" in data, "a class name cannot break the page"
    assert "Left out:" in data
    assert data.count("broken") == 10
    assert "and 2 more" in data
    assert "torch 2.13.0, 1 process." in data


def test_a_run_that_has_measured_nothing_yet_can_be_described(tmp_path: Path) -> None:
    text = readme(tmp_path, records=[], finished=False)
    assert "## Result" not in text
    assert "for 0 of 5 epochs" in text


def test_it_replaces_the_one_before_whole(tmp_path: Path) -> None:
    readme(tmp_path)
    readme(tmp_path, finished=False)
    assert {one.name for one in tmp_path.iterdir()} == {"README.md"}
    with pytest.raises(EmbedServeError, match="cannot be written"):
        readme(tmp_path / "gone")
