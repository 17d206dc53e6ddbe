"""What is asked of an export: choices that mean something, and the command that the model card repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from embedserve.errors import InvalidField  # noqa: E402
from tests.training.export.precision.test_choosing import Patches  # noqa: E402
from tests.training.export.precision.test_writing import original  # noqa: E402
from training.export import _command, export  # noqa: E402
from training.export.calibration import Calibration, built_in  # noqa: E402
from training.export.original import Choices  # noqa: E402
from training.export.sources import runs  # noqa: E402


@pytest.mark.parametrize(
    ("source", "given", "named", "allowed"),
    [
        ("starter", {"choices": Choices(size=64)}, "size", "no choices"),
        ("starter", {"precision": "int8"}, "precision", "no choices"),
        ("starter", {"calibration": Calibration((), (), "none")}, "calibrate", "no choices"),
        ("open_clip:ViT-B-32/x", {"choices": Choices(size=64)}, "size", "--pooling, --random, --weights"),
        ("timm:resnet18", {"choices": Choices(projection=True)}, "projection", "--size"),
        ("hf:a/b", {"choices": Choices(size=64)}, "size", "--weights"),
        ("published:dino/vits16", {"choices": Choices(size=64)}, "size", "--weights"),
    ],
)
def test_a_choice_that_a_source_does_not_look_at_is_refused_before_anything_is_read(
    source: str, given: dict[str, Any], named: str, allowed: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidField, match=f"--{named} means nothing") as caught:
        export(source, tmp_path / "bundle", **given)
    assert caught.value.param == named
    assert allowed in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "rest", "given", "shown"),
    [
        ("hf", "{folder}/first", [], "hf:first"),
        ("open_clip", "ViT-B-32/{folder}/w.pt", [], "open_clip:ViT-B-32/w.pt"),
        ("open_clip", "ViT-B-32/laion2b", [("random", True)], "open_clip:ViT-B-32/laion2b --random"),
        ("timm", "resnet18", [("weights", Path("/home/me/w.pt"))], "timm:resnet18 --weights w.pt"),
    ],
)
def test_a_command_is_repeated_without_the_folders_of_this_machine(
    scheme: str, rest: str, given: list[tuple[str, Any]], shown: str, tmp_path: Path
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "w.pt").touch()
    command = _command(scheme, rest.format(folder=tmp_path), given, "int8")
    assert command == f"embedserve export {shown} --precision int8"


def test_the_card_repeats_the_command_and_each_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = original(Patches())
    monkeypatch.setattr(runs, "original", lambda rest, choices: network)
    (tmp_path / "first").mkdir()
    out, said = tmp_path / "bundle", list[str]()
    few, chosen = built_in(images=2, texts=2), Choices(projection=True)
    export(str(tmp_path / "first"), out, choices=chosen, calibration=few, say=said.append)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "`embedserve export first --projection`" in card
    assert str(tmp_path) not in card
    assert [one.split()[0] for one in said] == ["Reading", "Writing", "Comparing"]
