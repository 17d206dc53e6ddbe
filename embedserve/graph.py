"""One ONNX file in ONNX Runtime, checked, and with bounded memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedserve.binding import BoundSession
from embedserve.device import CPU, FATAL, Device, is_out_of_memory, providers
from embedserve.errors import BundleError, NotReady

__all__ = ["EMBEDDING", "Graph", "Vectors", "available_cores", "session_options"]

Vectors = NDArray[np.float32]

logger = logging.getLogger(__name__)

EMBEDDING = "embedding"
"""What `Graph.run_for` calls the first output, whatever its name in the file."""

FLOAT = "tensor(float)"


class Graph:
    """A session for an ONNX file with one input and, first, one output [batch, dim].

    A graph whose batch is fixed at 1, as some exporters write them, is run once for each row. A batch that
    does not fit into memory is run in halves.

    Args:
        path: The ONNX file; external weights lie beside it.
        threads: Threads of one run on the CPU.
        element: The input's type in ONNX Runtime's words, such as `tensor(uint8)`.
        form: The input's dimensions by name; None where any size must be allowed.
        dim: Length of the output's vectors.
        outputs: Further outputs that the file must have, with their dimensions.
        device: Where it runs.
        half: It computes in float16; TensorRT needs to know.
        engines: The folder of TensorRT's engines.
        bind: Run over buffers on the device; None does so on a GPU.

    Attributes:
        provider: The execution provider that ONNX Runtime gave it, in ONNX Runtime's words.
        halved: How often a batch did not fit into memory.

    Raises:
        BundleError: The file cannot be loaded, its input or outputs are of another type or form, or it does
            not run on `device`.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        element: str,
        form: Mapping[str, int | None],
        dim: int,
        *,
        outputs: Mapping[str, Mapping[str, int | None]] | None = None,
        device: Device = CPU,
        half: bool = False,
        engines: Path | None = None,
        bind: bool | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self.halved = 0
        try:
            session = ort.InferenceSession(
                str(path),
                session_options(threads),
                providers=providers(device, half=half, engines=engines),
                enable_fallback=0,  # it would print, and go on without the GPU
            )
        except Exception as error:  # noqa: BLE001 -- ONNX Runtime's errors share no base class
            if device.is_gpu and is_out_of_memory(error):
                raise BundleError(
                    f"'{path}' does not fit into the memory of {device} ({error}). Free some, export the "
                    "bundle in float16, or use --device cpu."
                ) from None
            raise BundleError(
                f"'{path}' cannot be loaded by ONNX Runtime ({error}). Export the bundle again."
            ) from None
        self.provider = str(session.get_providers()[0])
        if self.provider != device.provider:
            raise BundleError(f"'{path}' got {self.provider} where {device.provider} was asked for.")
        inputs, found = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1:
            names = ", ".join(f"'{one.name}'" for one in inputs)
            raise BundleError(
                f"'{path}' has {len(inputs)} inputs ({names}); a tower has exactly one. Export it again."
            )
        self._check("input", inputs[0], element, form)
        self._check("output", found[0], FLOAT, {"batch": None, "dim": dim})
        for name, dimensions in (outputs or {}).items():
            self._check("output", self._named(name, found[1:]), FLOAT, dimensions)
        self._session = session
        self._input = inputs[0].name
        self._first = found[0].name
        self._one_by_one = inputs[0].shape[0] == 1
        self._bound = (
            BoundSession(session, device, dim) if (device.is_gpu if bind is None else bind) else None
        )

    def run(self, batch: NDArray[np.generic]) -> Vectors:
        """The first output, float32 [batch, dim]. Safe to call from several threads.

        Raises:
            NotReady: Not even one row fits into memory, code `out_of_memory`.
        """
        return self.run_for((EMBEDDING,), batch)[EMBEDDING]

    def run_for(self, names: Sequence[str], batch: NDArray[np.generic]) -> dict[str, Vectors]:
        """The outputs of these names, float32 [batch, …]. What only the others need is not computed.

        Raises: as `run`.
        """
        if self._one_by_one and len(batch) > 1:
            return _joined([self._run(names, batch[row : row + 1]) for row in range(len(batch))])
        return self._run(names, batch)

    def _run(self, names: Sequence[str], batch: NDArray[np.generic]) -> dict[str, Vectors]:
        try:
            found = self._run_once(names, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise NotReady(
                    f"The encoder needs more memory than {self.device} has left for one input of the form "
                    f"{list(batch.shape)}. Try again when less is running, lower --max-batch or --workers, "
                    "or serve a smaller encoder.",
                    code="out_of_memory",
                ) from error
            half = len(batch) // 2
            self.halved += 1
            logger.warning("%d inputs do not fit into the memory of %s; halving", len(batch), self.device)
        else:
            return dict(zip(names, found, strict=True))
        # Here the failed run's exception, and with it what it held, is gone.
        return _joined([self._run(names, batch[:half]), self._run(names, batch[half:])])

    def _run_once(self, names: Sequence[str], batch: NDArray[np.generic]) -> list[Vectors]:
        if self._bound is not None and tuple(names) == (EMBEDDING,):
            return [self._bound.run(batch)]
        real = [self._first if name == EMBEDDING else name for name in names]
        found: list[Vectors] = self._session.run(real, {self._input: batch})
        return found

    def _named(self, name: str, found: Sequence[ort.NodeArg]) -> ort.NodeArg:
        for one in found:
            if one.name == name:
                return one
        there = ", ".join(f"'{one.name}'" for one in found) or "none"
        raise BundleError(
            f"'{self.path}' has no output '{name}' behind the embedding, though encoder.json promises it "
            f"(there: {there}). Export the bundle again."
        )

    def _check(self, what: str, found: ort.NodeArg, element: str, form: Mapping[str, int | None]) -> None:
        # In the graph a fixed dimension is a number, a free one a name or None.
        fits = len(found.shape) == len(form) and all(
            not isinstance(size, int) or size == wanted or (name == "batch" and size == 1)
            for size, (name, wanted) in zip(found.shape, form.items(), strict=True)
        )
        if found.type != element or not fits:
            needed = ", ".join(name if size is None else str(size) for name, size in form.items())
            raise BundleError(
                f"The {what} '{found.name}' of '{self.path}' is {found.type} {list(found.shape)}; needed is "
                f"{element} [{needed}], where named dimensions take any size (batch also 1). "
                "Export it again."
            )


def _joined(parts: Sequence[Mapping[str, Vectors]]) -> dict[str, Vectors]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def session_options(threads: int) -> ort.SessionOptions:
    """ONNX Runtime's settings for a server that lives long and shares its cores with image decoding.

    Memory. By default ONNX Runtime keeps a memory plan for every input shape it ever saw, so a server fed
    with random shapes grows. The plans are switched off here. The arena stays on: it keeps what the largest
    run needed, and callers bound that by running large batches in pieces (`Encoder.images_per_run`). Without
    the arena, or with shrinking it after each run, every run maps and zeroes fresh pages, which costs a third
    of the throughput. Rounding batch sizes and text lengths up to a few values saved no memory once the
    plans were off, and computes padding for nothing. `benchmarks/memory.py` measures all of these.

    Cores. ONNX Runtime's threads wait for their share of an operator by spinning, which is worth a quarter
    of the speed of a single input; `force_spinning_stop` ends that with the run, so that decoding gets the
    cores in between.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = FATAL
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def available_cores() -> int:
    """Cores this process may use: its CPU affinity and, in a container, its CPU quota (cgroup v2).

    ONNX Runtime by itself starts a thread for every core of the host, which in a container of two cores on
    a host of 64 makes each run many times slower.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return cores
