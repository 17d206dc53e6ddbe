"""Runs of a session over buffers that lie on its device, made once and used again.

Without them ONNX Runtime takes memory on the device for the input and the output of every run, and gives it
back. A lane is one set of buffers; runs that go side by side have a lane each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedserve.device import Device

__all__ = ["BoundSession", "rounded"]

LANES = 2
"""Runs side by side: one copies while another computes. More only take the GPU's memory."""

SHAPES = 64
"""Input shapes whose buffers a lane keeps, the last ones used."""


class BoundSession:
    """A session with one input, whose first output is fetched; may be used from several threads at once."""

    def __init__(self, session: ort.InferenceSession, device: Device, dim: int) -> None:
        self._session = session
        self._device = device
        self._dim = dim
        self._slots = threading.BoundedSemaphore(LANES)
        self._idle: list[_Lane] = []

    def run(self, batch: NDArray[np.generic]) -> NDArray[np.float32]:
        """The first output [batch, dim] for the input `batch`, in memory of its own."""
        missing = rounded(len(batch)) - len(batch)
        # Copies of a real row: what a graph takes over the batch, such as an int8 scale, stays as it was.
        filled = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
        with self._slots:
            lane = self._idle.pop() if self._idle else _Lane(self._session, self._device, self._dim)
            output = lane.run(filled)
            self._idle.append(lane)  # after a failure it goes, and its buffers with it
        return output[: len(batch)]


def rounded(count: int) -> int:
    """The next batch size that there are buffers for: 1, 2, 4, and the multiples of 8.

    A GPU hardly notices so few rows more; every new shape costs memory and, with TensorRT, may cost minutes.
    """
    return next((size for size in (1, 2, 4) if count <= size), -(-count // 8) * 8)


class _Lane:
    def __init__(self, session: ort.InferenceSession, device: Device, dim: int) -> None:
        self._session = session
        self._device = device
        self._dim = dim
        self._binding = session.io_binding()
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0].name
        self._buffers: OrderedDict[tuple[int, ...], tuple[ort.OrtValue, ort.OrtValue]] = OrderedDict()

    def run(self, batch: NDArray[np.generic]) -> NDArray[np.float32]:
        given, taken = self._buffers_for(batch)
        given.update_inplace(batch)
        self._binding.bind_ortvalue_input(self._input, given)
        self._binding.bind_ortvalue_output(self._output, taken)
        self._session.run_with_iobinding(self._binding)
        # On the CPU `numpy()` may be a view of the buffer, which the next run overwrites.
        output: NDArray[np.float32] = taken.numpy()
        return output if self._device.is_gpu else output.copy()

    def _buffers_for(self, batch: NDArray[np.generic]) -> tuple[ort.OrtValue, ort.OrtValue]:
        shape = batch.shape
        if shape in self._buffers:
            self._buffers.move_to_end(shape)
        else:
            while len(self._buffers) >= SHAPES:
                self._buffers.popitem(last=False)
            given = self._buffer(shape, batch.dtype.type)
            self._buffers[shape] = given, self._buffer((shape[0], self._dim), np.float32)
        return self._buffers[shape]

    def _buffer(self, shape: tuple[int, ...], element: type[np.generic]) -> ort.OrtValue:
        memory, index = self._device.memory, self._device.index
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, memory, index)
