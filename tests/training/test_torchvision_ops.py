"""torchvision beside a torch that its operators do not fit: each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_torchvision_and_timm_import_after_it() -> None:
    out = run(
        "from training import torchvision_ops\n"
        "torchvision_ops.register()\n"
        "torchvision_ops.register()\n"  # a second call changes nothing
        "import torchvision, timm\n"
        "print(torchvision.transforms.Resize(8).size, timm.is_model('tf_efficientnet_lite0'))"
    )
    assert out == "8 True"


def test_it_does_nothing_where_the_operators_exist() -> None:
    out = run(
        "import torch\n"
        "from training import torchvision_ops\n"
        "own = torch.library.Library('torchvision', 'DEF')\n"
        "for schema in torchvision_ops.SCHEMAS: own.define(schema)\n"
        "print(torchvision_ops.register(), torchvision_ops._library)"
    )
    assert out == "False None"


def test_a_missing_operator_alone_is_added() -> None:
    out = run(
        "import torch\n"
        "from training import torchvision_ops\n"
        "own = torch.library.Library('torchvision', 'DEF')\n"
        "own.define(torchvision_ops.SCHEMAS[0])\n"
        "print(torchvision_ops.register(), hasattr(torch.ops.torchvision, 'qnms'))"
    )
    assert out == "True True"
