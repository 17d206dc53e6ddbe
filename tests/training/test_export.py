"""What can be exported, and what is said when something cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedserve.errors import InvalidField
from training.export import SOURCES, export


def test_an_unknown_source_is_answered_with_the_closest_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="'strater' cannot be exported; did you mean 'starter'"):
        export("strater", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_starter_is_a_known_source() -> None:
    assert "starter" in SOURCES
