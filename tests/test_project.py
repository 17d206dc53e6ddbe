"""The project's own files: what is installed, what is shipped, and that no part reaches where it must not."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import embedserve

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    requirement.name.lower().replace("_", "-"): next(iter(requirement.specifier)).version
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    return answer.stdout.strip()


def test_the_version_is_told_in_one_voice() -> None:
    assert PROJECT["version"] == embedserve.__version__


def test_what_is_tested_is_pinned_and_allowed_by_the_requirements() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(one for key in ("demo", "train", "hub", "dev") for one in extras[key]),
    ]
    for requirement in map(Requirement, wanted):
        pin = PINS.get(requirement.name.lower().replace("_", "-"))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(Version(pin)), f"constraints.txt: {requirement} but {pin}"


def test_constraints_hold_no_build_of_one_machine() -> None:
    assert not [name for name, version in PINS.items() if "+" in version]
    assert not [name for name in PINS if name.startswith("nvidia")]
    assert PINS["torch"] == "2.13.0"


def test_serving_loads_neither_torch_nor_training() -> None:
    loaded = python(
        "import embedserve.app, embedserve.cli, sys\n"
        "print(sorted({'torch', 'torchvision', 'onnx', 'transformers', 'training'} & set(sys.modules)))"
    )
    assert loaded == "[]"


def test_no_serving_dependency_asks_for_torch() -> None:
    asked = python(
        "from importlib.metadata import requires\n"
        "from packaging.requirements import Requirement\n"
        "seen, todo = set(), ['embedserve']\n"
        "while todo:\n"
        "    name = todo.pop()\n"
        "    for one in map(Requirement, requires(name) or []):\n"
        "        if (one.marker is None or one.marker.evaluate({'extra': ''})) and one.name not in seen:\n"
        "            seen.add(one.name)\n"
        "            todo.append(one.name)\n"
        "print(sorted(seen))"
    )
    assert "onnxruntime" in asked
    assert "torch" not in re.findall(r"'([\w-]+)'", asked)


def test_no_package_reaches_where_it_must_not() -> None:
    """The import contracts of pyproject.toml; `lint-imports` says which chain of imports broke one."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout


def test_the_wheel_holds_the_page_the_starter_and_no_tests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=60,
        cwd=ROOT,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package in ("page", "starter"):
        there = {file.relative_to(ROOT).as_posix() for file in (ROOT / "embedserve" / package).rglob("*.*")}
        assert there
        assert {name for name in there if "__pycache__" not in name} <= names
    assert {"embedserve/py.typed", "indexes/base.py", "training/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert wheel.stat().st_size < 60e6


@pytest.mark.parametrize(
    "line", [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:4] == "COPY"]
)
def test_the_docker_build_finds_what_it_copies(line: str) -> None:
    """A file that .dockerignore hides, or that was renamed, fails only where a Docker engine is."""
    if "--from" in line:
        return
    kept = [rule[1:] for rule in (ROOT / ".dockerignore").read_text().split() if rule.startswith("!")]
    for source in line.split()[1:-1]:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, rule) for rule in kept)
