"""Calls of a backbone as CUDA graphs: what takes a GPU's time no longer waits for the CPU to start it.

A small network on small images has hundreds of kernels of some microseconds. Each call that a step makes of a
backbone (two views are two calls) is recorded once, forward and backward, and from then on replayed: the same
kernels on the same values. The heads and losses, a tenth of the kernels, stay as they are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.backbones import Backbone

__all__ = ["Recordings", "record_backbones"]

Pair = tuple[Tensor, Tensor]
Features = Callable[[Tensor], Pair]

CAPTURE = "thread_local"
"""Threads that read images ahead may page-lock memory while this one records, which is also why this is not
`torch.cuda.make_graphed_callables`: it forbids that."""
WARM_UPS = 3
"""Calls before a recording, in which libraries choose their algorithms."""


def record_backbones(method: nn.Module) -> Recordings:
    """From the second step on, calls of the backbones of `method` in training mode are replayed.

    For one process with one GPU; the shapes of a step must not change. Call `begin` before every step.
    """
    return Recordings([one for one in method.modules() if isinstance(one, Backbone)])


class Recordings:
    """The recorded calls of some backbones. Make it with `record_backbones`."""

    def __init__(self, backbones: list[Backbone]) -> None:
        self._calls = [_RecordedCalls(one) for one in backbones]

    def begin(self) -> None:
        """A step begins, or a part of one whose gradients are computed before the next."""
        for one in self._calls:
            one.begin()


@dataclass(frozen=True, slots=True)
class _Recorded:
    form: tuple[Any, ...]
    replay: Features


class _RecordedCalls:
    """Stands in for `Backbone.features` of one backbone."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._features = backbone, backbone.features
        self._recorded: list[_Recorded] = []
        self._steps, self._next = -1, 0
        backbone.features = self  # type: ignore[method-assign]

    def begin(self) -> None:
        self._steps += 1
        self._next = 0

    def __call__(self, images: Tensor, masks: Tensor | None = None) -> Pair:
        # The first step is run as it is written: libraries allocate and choose, compilers compile.
        if masks is not None or not self._backbone.training or self._steps < 1:
            return self._features(images, masks)
        form = (images.shape, images.dtype, images.stride(), torch.is_grad_enabled())
        at, self._next = self._next, self._next + 1
        if at == len(self._recorded):
            self._recorded.append(_Recorded(form, self._record(images)))
        if self._recorded[at].form != form:
            return self._features(images, masks)
        return self._recorded[at].replay(images)

    def _record(self, images: Tensor) -> Features:
        device = images.device
        # Recording runs the network: its batch norms' statistics and the random numbers are put back.
        state = [(buffer, buffer.clone()) for buffer in self._backbone.buffers()]
        numbers = torch.cuda.get_rng_state(device)
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # A cast that the cache holds would be missing in the recording.
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            record = (
                self._with_gradient
                if torch.is_grad_enabled() and _trained(self._backbone)
                else self._forward_only
            )
            replay = record(images.detach().clone(memory_format=torch.preserve_format))
        torch.cuda.set_rng_state(numbers, device)
        with torch.no_grad():
            for buffer, value in state:
                buffer.copy_(value)
        return replay

    def _with_gradient(self, images: Tensor) -> Features:
        device = images.device
        with _side_stream(device):
            warm, aliases = _aliased(self._backbone, self._features)
            for _ in range(WARM_UPS):
                made = warm(images)
                torch.autograd.grad(made, aliases, [torch.ones_like(one) for one in made], allow_unused=True)
        call, aliases = _aliased(self._backbone, self._features)
        pool = torch.cuda.graph_pool_handle()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=pool, capture_error_mode=CAPTURE):
            made = call(images)
        arriving = [torch.zeros_like(one) for one in made]
        with torch.cuda.graph(backward, pool=pool, capture_error_mode=CAPTURE):
            gradients = torch.autograd.grad(made, aliases, arriving, allow_unused=True)
        recorded = _Call(images, [one.detach() for one in made], arriving, gradients, forward, backward)
        return lambda others: _Replay.apply(recorded, others, *_trained(self._backbone))  # type: ignore[no-untyped-call]

    def _forward_only(self, images: Tensor) -> Features:
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            with _side_stream(images.device):
                for _ in range(WARM_UPS):
                    self._features(images)
            with torch.cuda.graph(graph, capture_error_mode=CAPTURE):
                made = self._features(images)

        def replay(others: Tensor) -> Pair:
            images.copy_(others)
            graph.replay()
            return made[0].detach(), made[1].detach()

        return replay


def _trained(backbone: Backbone) -> list[nn.Parameter]:
    return [one for one in backbone.parameters() if one.requires_grad]


def _aliased(backbone: Backbone, features: Callable[..., Pair]) -> tuple[Features, list[Tensor]]:
    """A call that reads the trained parameters through new ones in the same memory, and those.

    Autograd ties a parameter to the stream in which it was first used, the default one as a rule, and a
    recording must not wait for that.
    """
    whole = _AsModule(backbone, features)
    aliases: dict[str, Tensor] = {
        name: nn.Parameter(one.detach()) for name, one in whole.named_parameters() if one.requires_grad
    }

    def call(images: Tensor) -> Pair:
        made: Pair = functional_call(whole, aliases, (images,))
        return made

    return call, list(aliases.values())


class _AsModule(nn.Module):
    def __init__(self, backbone: Backbone, features: Callable[..., Pair]) -> None:
        super().__init__()
        self.backbone = backbone
        self._call = features

    def forward(self, images: Tensor) -> Pair:
        return self._call(images)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What a recorded call reads and writes; the memory is the graphs' own."""

    images: Tensor
    made: list[Tensor]
    arriving: list[Tensor]
    """Gradients of `made`."""
    gradients: tuple[Tensor | None, ...]
    """Of the trained parameters."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        call.images.copy_(images)
        call.forward.replay()
        return tuple(one.detach() for one in call.made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        for held, gradient in zip(call.arriving, gradients, strict=True):
            if gradient is None:
                held.zero_()
            else:
                held.copy_(gradient)
        call.backward.replay()
        return None, None, *(one if one is None else one.detach() for one in call.gradients)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Warm-ups run beside the stream that will be recorded, as CUDA graphs require."""
    working = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(working)
    with torch.cuda.stream(stream):
        yield
    working.wait_stream(stream)
