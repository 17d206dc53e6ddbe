"""Batch norm over the joined batch of all ranks, on any device.

torch's own SyncBatchNorm runs on GPUs only; this one lets training on several CPUs, and the tests that hold
two ranks to the result of one, go the same way.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.distributed import all_sum, world_size

__all__ = ["SyncBatchNorm", "synchronize_batch_norms"]


class SyncBatchNorm(_BatchNorm):
    """Statistics of all ranks' rows in training, running statistics in evaluation (Ioffe & Szegedy 2015).

    Takes [B, C, …] of equal shape on every rank.

    Attributes:
        after: What timm's batch norms apply in the same module: dropout and activation.
    """

    after: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes [B, C, …], not {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return self._finish(super().forward(input))
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.float() if input.dtype in {torch.float16, torch.bfloat16} else input
        count = world_size() * input.numel() // input.shape[1]
        mean = all_sum(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = all_sum(centred.square().sum(axes)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / max(count - 1, 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return self._finish(out.to(input.dtype))

    def _finish(self, out: Tensor) -> Tensor:
        finished: Tensor = self.after(out)
        return finished

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronize_batch_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with each of its batch norms replaced by one over all ranks; parameters and buffers stay."""
    if device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm

        return convert_sync_batchnorm(module)  # type: ignore[no-any-return, no-untyped-call]
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return _as_sync(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norms(child, device))
    return module


def _as_sync(norm: _BatchNorm) -> SyncBatchNorm:
    sync = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    sync.weight, sync.bias = norm.weight, norm.bias
    sync.running_mean, sync.running_var = norm.running_mean, norm.running_var
    sync.num_batches_tracked = norm.num_batches_tracked
    if hasattr(norm, "act"):
        sync.after = nn.Sequential(cast(nn.Module, norm.drop), cast(nn.Module, norm.act))
    sync.train(norm.training)
    return sync
