"""A file of weights → its tensors by name, whoever wrote it, without running code from it."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedserve.errors import BadRequest
from training.backbones.pickles import is_plain_pickle, read_arrays

__all__ = ["contents", "flat"]

SCALAR: Any = np._core.multiarray.scalar  # type: ignore[attr-defined]  # what pickles call by this private name
PLAIN: list[Any] = [
    argparse.Namespace,
    SCALAR,
    (SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")),
]
"""Plain values of published checkpoints: DINO's command line; DINO's and SwAV's learning rates, whose names
differ between numpy 1 and 2."""


def contents(path: Path) -> Any:
    """What was saved: tensors, and plain values, in nested dictionaries. Tensors are on the CPU.

    Files of torch (`torch.save`, old and new), of safetensors, and pickles of numpy arrays (BYOL).

    Raises:
        BadRequest: A damaged file, or one with Python objects.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_plain_pickle(path):
            return read_arrays(path)
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadRequest:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds a Python object ({found[1]}), which could run code" if found else "holds no weights"
        raise BadRequest(
            f"'{path}' {what}; give a file with tensors alone, as torch.save(model.state_dict()) writes it.",
            param="start",
        ) from None
    except Exception as error:  # noqa: BLE001 -- torch and safetensors raise what they like at a damaged file
        raise BadRequest(
            f"'{path}' cannot be read as weights ({error}); is it complete?", param="start"
        ) from None


def flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dictionaries with its names, joined; arrays become tensors, the rest is left."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, np.ndarray):
        yield prefix.removesuffix("."), torch.from_numpy(content.copy())
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flat(value, f"{prefix}{key}.")
