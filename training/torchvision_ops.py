"""Lets `import torchvision` work beside a torch that its compiled operators do not fit.

A package registry's torchvision is a CUDA build. Beside a CPU build of torch its library of operators cannot
be loaded, and `import torchvision` then fails with "operator torchvision::nms does not exist", because
torchvision decorates that operator while it is imported. Registering the two schemas that the decorators ask
for is enough: models, transforms and everything else that is Python works. Calling `nms` or `qnms` still
fails, and says so; nothing here, in timm or in open_clip calls them.

Call it before torchvision, timm, open_clip or transformers are imported:

    torchvision_ops.register()
    import timm

A matching pair of torch and torchvision is left alone: when the operators are there, nothing is registered.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

__all__ = ["SCHEMAS", "register"]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""As torchvision's C++ declares them (torchvision/csrc/ops/nms.cpp and ops/quantized/cpu/qnms_kernel.cpp)."""

# torch annotates none of what is called on it and below, hence the ignores.
_library: torch.library.Library | None = None  # schemas live as long as this object


def register() -> bool:
    """Registers the schemas that are missing once torchvision's own library has been tried.

    Returns:
        True when something was registered, now or by an earlier call.
    """
    global _library  # noqa: PLW0603 -- torch keeps one registry for the process; this mirrors it
    _load_compiled_operators()
    for schema in SCHEMAS:
        if _is_registered(schema):
            continue
        if _library is None:
            # A fragment adds to the namespace; it may be there already with other operators.
            _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        _library.define(schema)  # type: ignore[no-untyped-call]
    return _library is not None


def _is_registered(schema: str) -> bool:
    return hasattr(torch.ops.torchvision, schema.partition("(")[0])


def _load_compiled_operators() -> None:
    """What torchvision/extension.py does first; afterwards it finds the library loaded already."""
    found = importlib.util.find_spec("torchvision")  # finds the folder without running its __init__
    if found is None or found.origin is None:
        return
    for library in sorted(Path(found.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:
            return  # built for another torch: the case this module is for
