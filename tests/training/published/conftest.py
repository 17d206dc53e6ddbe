from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import nn  # noqa: E402

from tests.training.published import authors  # noqa: E402


@pytest.fixture(scope="session")
def network() -> nn.Module:
    """The smallest ResNet of bottlenecks; what every form of file holds. Not to be changed."""
    torch.manual_seed(3)
    return authors.resnet(1, 1, 1, 1)


@pytest.fixture(scope="session")
def stem() -> nn.Module:
    """As much of a ResNet as tells a file's layout, for what is refused before the rest is missed."""
    torch.manual_seed(3)
    return nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 7, bias=False)})
