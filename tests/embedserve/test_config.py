"""Settings that make no sense are refused where they are made, by the name of their flag."""

from __future__ import annotations

import pytest

from embedserve.config import Limits, ServeConfig
from embedserve.errors import InvalidField


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"threads": 0}, "--threads"), ({"workers": -1}, "--workers"), ({"max_batch": -1}, "--max-batch")],
)
def test_a_server_setting_below_its_least_value_is_refused(settings: dict[str, int], flag: str) -> None:
    with pytest.raises(InvalidField, match=f"^{flag} is .* at least"):
        ServeConfig(**settings)


@pytest.mark.parametrize("name", ["max_body_bytes", "max_pixels", "max_k", "queue_size", "fetch_timeout"])
def test_a_limit_of_zero_is_refused(name: str) -> None:
    with pytest.raises(InvalidField, match=f"--{name.replace('_', '-')} is 0; it must be at least"):
        Limits(**{name: 0})
