"""What networks compute in; and losses in float32, whatever that is."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Precision", "PrecisionName", "full_precision"]

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function` outside autocast, its half-precision tensors as float32; float64 stays.

    Autocast would turn the products of float32 embeddings into bfloat16 again, with 8 bits of mantissa: at a
    temperature of 0.1 that moves a logit by up to 0.04.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = [_widen(one) for one in args]
        named = {name: _widen(one) for name, one in kwargs.items()}
        kind = next(
            (one.device.type for one in (*arguments, *named.values()) if isinstance(one, Tensor)), "cpu"
        )
        with torch.autocast(kind, enabled=False):
            return cast(Callable[..., R], function)(*arguments, **named)

    return wrapped


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in {torch.float16, torch.bfloat16}:
        return value.float()
    return value


class Precision:
    """What networks compute in, and what that needs: autocast, and for fp16 a scaler of the loss.

    Args:
        name: 'auto' is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU.
        device: Where the networks are.
        deterministic: Only algorithms that give the same bits every time. A CPU's do already.
    """

    def __init__(self, name: PrecisionName, device: torch.device, *, deterministic: bool) -> None:
        on_gpu = device.type == "cuda"
        if name == "auto":
            name = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "fp32"
        self.name: PrecisionName = name
        self.device = device
        if on_gpu:
            torch.backends.cudnn.benchmark = not deterministic
            torch.backends.cudnn.deterministic = deterministic
            if deterministic:  # cuBLAS reads it when its first handle is made
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=True)

    def autocast(self) -> torch.autocast:
        """The context of forward passes."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.float32)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Scales fp16's losses so that small gradients are not lost; does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
