"""One ONNX file in ONNX Runtime, checked, and with bounded memory."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from embedserve.binding import BoundSession
from embedserve.device import CPU, FATAL, Device, is_out_of_memory, providers
from embedserve.errors import BundleError, NotReady
from embedserve.onnx_file import Declared, declared_outputs, without_outputs

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
        self._options = session_options(threads)
        self._options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        self._providers = providers(device, half=half, engines=engines)
        self._all: ort.InferenceSession | None = None
        self._opening = threading.Lock()
        session = self._open(self._without(outputs) if outputs else str(path))
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
        """The outputs of these names, float32 [batch, …]; `EMBEDDING` is the first one.

        For EMBEDDING alone nothing else is computed.

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
        alone = tuple(names) == (EMBEDDING,)
        if self._bound is not None and alone:
            return [self._bound.run(batch)]
        session = self._session if alone else self._with_outputs()
        real = [self._first if name == EMBEDDING else name for name in names]
        found: list[Vectors] = session.run(real, {self._input: batch})
        return found

    def _open(self, model: str | bytes) -> ort.InferenceSession:
        try:
            return ort.InferenceSession(
                model,
                self._options,
                providers=self._providers,
                enable_fallback=0,  # it would print, and go on without the GPU
            )
        except Exception as error:  # noqa: BLE001 -- ONNX Runtime's errors share no base class
            if self.device.is_gpu and is_out_of_memory(error):
                raise BundleError(
                    f"'{self.path}' does not fit into the memory of {self.device} ({error}). Free some, "
                    "export the bundle in float16, or use --device cpu."
                ) from None
            raise BundleError(
                f"'{self.path}' cannot be loaded by ONNX Runtime ({error}). Export the bundle again."
            ) from None

    def _without(self, outputs: Mapping[str, Mapping[str, int | None]]) -> bytes:
        """The file without these outputs, which it must have."""
        data = self.path.read_bytes()
        try:
            declared = {one.name: one for one in declared_outputs(data)[1:]}
            for name, form in outputs.items():
                if name not in declared:
                    there = ", ".join(f"'{one}'" for one in declared) or "none"
                    raise BundleError(
                        f"'{self.path}' has no output '{name}' behind the embedding, though encoder.json "
                        f"promises it (there: {there}). Export the bundle again."
                    )
                self._check("output", declared[name], FLOAT, form)
            return without_outputs(data, outputs)
        except ValueError as error:
            raise BundleError(f"'{self.path}' is no ONNX file: {error}. Export the bundle again.") from None

    def _with_outputs(self) -> ort.InferenceSession:
        """A session with all outputs, opened when the first one asks for it; it holds the weights again."""
        with self._opening:
            if self._all is None:
                self._all = self._open(str(self.path))
            return self._all

    def _check(
        self, what: str, found: ort.NodeArg | Declared, element: str, form: Mapping[str, int | None]
    ) -> None:
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
