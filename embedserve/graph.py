"""One ONNX file in ONNX Runtime on the CPU, checked, and with bounded memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedserve.errors import BundleError

__all__ = ["Graph", "Vectors", "available_cores", "session_options"]

Vectors = NDArray[np.float32]

FATAL = 4  # ONNX Runtime's log severity: what goes wrong arrives as an exception, once
ort.set_default_logger_severity(FATAL)


class Graph:
    """A session for an ONNX file with one input and, first, one output [batch, dim].

    A graph whose batch is fixed at 1, as some exporters write them, is run once for each row.

    Args:
        path: The ONNX file; external weights lie beside it.
        threads: Threads of one run.
        element: The input's type in ONNX Runtime's words, such as `tensor(uint8)`.
        form: The input's dimensions by name; None where any size must be allowed.
        dim: Length of the output's vectors.

    Raises:
        BundleError: The file cannot be loaded, or its input or output is of another type or form.
    """

    def __init__(
        self, path: Path, threads: int, element: str, form: Mapping[str, int | None], dim: int
    ) -> None:
        self.path = path
        try:
            session = ort.InferenceSession(
                str(path), session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001 -- ONNX Runtime's errors share no base class
            raise BundleError(
                f"'{path}' cannot be loaded by ONNX Runtime ({error}). Export the bundle again."
            ) from None
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1:
            names = ", ".join(f"'{one.name}'" for one in inputs)
            raise BundleError(
                f"'{path}' has {len(inputs)} inputs ({names}); a tower has exactly one. Export it again."
            )
        self._check("input", inputs[0], element, form)
        self._check("output", outputs[0], "tensor(float)", {"batch": None, "dim": dim})
        self._session = session
        self._input = inputs[0].name
        self._outputs = [outputs[0].name]
        self._one_by_one = inputs[0].shape[0] == 1

    def run(self, batch: NDArray[np.generic]) -> Vectors:
        """The first output, float32 [batch, dim]. Safe to call from several threads."""
        rows = [batch[row : row + 1] for row in range(len(batch))] if self._one_by_one else [batch]
        vectors = [self._session.run(self._outputs, {self._input: row})[0] for row in rows]
        return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)

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
