"""`embedserve pull` as people run it: a process with HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedserve.bundle import open_bundle
from embedserve.cli import main
from tests.embedserve.hub.networks import Network
from tests.embedserve.hub.published import CLIP, DINOV2, SIGLIP
from tests.embedserve.hub.small_hub import SmallHub

WITH_MODULES = (
    "import sys; from embedserve.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "unwanted = {'torch', 'torchvision', 'transformers', 'open_clip', 'timm', 'training'}\n"
    "print(sorted(unwanted & set(sys.modules)))\n"
    "sys.exit(code)"
)


def run(
    code: str, *arguments: str | Path, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, without a terminal, that knows no hub but the one it is told."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=home,
        env={**known, "HF_HOME": str(home / "hf"), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def test_a_pull_needs_no_torch_and_the_next_one_no_network(small_hub: SmallHub, tmp_path: Path) -> None:
    online = run(WITH_MODULES, "pull", DINOV2, "--json", home=tmp_path, HF_ENDPOINT=small_hub.url)
    assert online.returncode == 0, online.stderr
    answer, modules = online.stdout.splitlines()
    assert modules == "[]"
    assert online.stderr == ""  # no bars, no advice
    told = json.loads(answer)
    assert (told["name"], told["dim"], told["towers"]) == ("tiny-dinov2", 32, ["image"])
    assert open_bundle(tmp_path / "tiny-dinov2").fingerprint == told["fingerprint"]

    small_hub.asked.clear()
    offline = run(
        WITH_MODULES,
        "pull",
        DINOV2,
        "--out",
        "again",
        home=tmp_path,
        HF_ENDPOINT=small_hub.url,
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr
    assert not small_hub.asked
    assert open_bundle(tmp_path / "again").fingerprint == told["fingerprint"]

    missing = run(WITH_MODULES, "pull", CLIP, home=tmp_path, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert missing.stderr.startswith(
        "embedserve: HF_HUB_OFFLINE is set, and the cache lacks 'Xenova/tiny-clip'"
    )


FULL_DISK = (
    "import resource, sys\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"  # larger files fail as on a full disk
    "from embedserve.cli import main\n"
    "sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the operating system")
def test_a_full_disk_is_said_and_leaves_nothing(root: Path, published: Any, tmp_path: Path) -> None:
    answer = run(FULL_DISK, "pull", root / DINOV2, "--out", "bundle", home=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith("embedserve: 'bundle' cannot be written (File too large)")
    assert list(tmp_path.iterdir()) == []


def test_what_was_pulled_is_shown_with_what_was_assumed(
    root: Path, published: dict[str, Network], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", str(root / SIGLIP), "--out", str(tmp_path / "out"), "--name", "mine"]) == 0
    out, err = capsys.readouterr()
    first, image, text = out.splitlines()
    assert first.startswith("mine: image and text, 32 numbers, written to")
    assert image.startswith(("image least cosine 1.0000", "image least cosine 0.9999"))
    assert text.endswith("to their own graph on 17 inputs")
    assert "--logit-scale 117.33 and --logit-bias -12.93 are assumed" in err
    assert (
        main(
            [
                "pull",
                str(root / SIGLIP),
                "--out",
                str(tmp_path / "out"),
                "--logit-scale",
                "110",
                "--logit-bias",
                "-12",
            ]
        )
        == 0
    )
    assert capsys.readouterr().err == ""
    assert open_bundle(tmp_path / "out").description.scoring.logit_scale == 110


@pytest.mark.parametrize(
    "arguments", [[], ["a/b", "c/d", "e/f"], ["a/b", "--logit-scale", "0"], ["a/b", "--activation", "relu"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["pull", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("package", ["onnx", "huggingface_hub"])
def test_without_the_extra_the_message_says_which(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from embedserve.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    answer = run(code, "pull", "a/b", home=tmp_path)
    assert answer.returncode == 1
    assert f"Pulling needs '{package}'; install it with `pip install 'embedserve[hub]'`" in answer.stderr
