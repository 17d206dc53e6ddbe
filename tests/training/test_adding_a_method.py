"""The example of docs/adding-a-method.md is a method like any other."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.training.tiny import batch_for, tiny_method
from training.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture
def mean_siam(monkeypatch: pytest.MonkeyPatch) -> str:
    source = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class" in block
    )
    module = types.ModuleType("mean_siam")
    monkeypatch.setitem(sys.modules, "mean_siam", module)  # dataclasses look their module up
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(METHODS, "mean_siam", module.MeanSiam)
    return "mean_siam"


def test_the_example_learns_to_predict_the_mean(mean_siam: str) -> None:
    method = tiny_method(mean_siam)
    batch = batch_for(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
