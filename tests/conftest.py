"""Fixtures shared by all packages' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny bundle (see tests/tiny_bundle.py)."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny").folder
