"""Where graphs run: on the CPU, or on an NVIDIA GPU through CUDA or TensorRT.

ONNX Runtime itself goes on without a provider that does not start, and says so in its log at most. Here a
device that was asked for by name works or is an error; `auto` takes the GPU where it can and says why not.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from embedserve.errors import InvalidField

__all__ = [
    "AUTO",
    "CPU",
    "FATAL",
    "Choice",
    "Device",
    "choose",
    "default_engines",
    "engine_folder",
    "is_out_of_memory",
    "providers",
]

logger = logging.getLogger(__name__)

FATAL = 4  # ONNX Runtime's log severity: what goes wrong arrives as an exception, once
ort.set_default_logger_severity(FATAL)

Kind = Literal["cpu", "cuda", "tensorrt"]

AUTO = "auto"
NAMES: Mapping[Kind, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

GUIDE = "docs/serving-on-a-gpu.md"
INSTALL = f"Install `embedserve[gpu]` as {GUIDE} says, or use --device cpu."

ONE_NODE = base64.b64decode(
    "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0="
)
"""An ONNX graph, float32 [1] → the same, that shows whether a provider starts."""

MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad.?alloc|ALLOC_FAILED|Failed to allocate|CUDA (failure|error):? 2\b",
    re.IGNORECASE,
)
"""How ONNX Runtime's arena, CUDA, cuBLAS, cuDNN, TensorRT and C++ say that memory is used up."""


@dataclass(frozen=True, slots=True)
class Device:
    """One place to run on. `index` is the number of the GPU."""

    kind: Kind = "cpu"
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def provider(self) -> str:
        """The execution provider's name in ONNX Runtime."""
        return NAMES[self.kind]

    @property
    def memory(self) -> str:
        """ONNX Runtime's name of the memory in which buffers lie."""
        return "cuda" if self.is_gpu else "cpu"


CPU = Device()


@dataclass(frozen=True, slots=True)
class Choice:
    """A device that works, and why it is not a better one; `note` is empty when there is nothing to say."""

    device: Device
    note: str = ""


def choose(wanted: str, *, precision: str = "float32", available: Collection[str] | None = None) -> Choice:
    """The device for `wanted`: auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1.

    Args:
        precision: The bundle's. int8 graphs stay on the CPU under `auto`: the operators that quantise at run
            time have no CUDA kernels, and their tensors would cross the bus in every layer.
        available: The execution providers of this ONNX Runtime; None asks it.

    Raises:
        InvalidField: No such device, or one asked for by name that does not work here.
    """
    there = ort.get_available_providers() if available is None else available
    device = _parse(wanted)
    if device is not None:
        if device.is_gpu:
            trouble = _trouble(device, there)
            if trouble:
                raise InvalidField(f"--device {wanted} cannot be used: {trouble}", param="device")
        return Choice(device)
    gpu = Device("cuda")
    if gpu.provider not in there:
        # The ordinary installation on an ordinary machine; only a package that was meant to work is news.
        return Choice(CPU, f"No GPU is used: {_trouble(gpu, there)}" if _has_gpu_package() else "")
    if _is_int8(precision):
        return Choice(CPU, f"A GPU may be there, but the bundle is {precision}, which runs best on the CPU.")
    trouble = _trouble(gpu, there)
    return Choice(CPU, f"No GPU is used: {trouble}") if trouble else Choice(gpu)


def providers(device: Device, *, half: bool = False, engines: Path | None = None) -> list[Any]:
    """What `InferenceSession(providers=…)` takes; behind a GPU come those that take what it cannot run.

    Args:
        half: The graph computes in float16, which TensorRT must be allowed to.
        engines: TensorRT's compiled engines are kept in this folder. Building one takes minutes.
    """
    cuda = {
        "device_id": str(device.index),
        # A region for each request instead of one twice as large as the last: others share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
        # The default tries every algorithm for every new shape, which a server would pay in its requests.
        "cudnn_conv_algo_search": "HEURISTIC",
        # float32 bundles promise float32; whoever wants speed exports float16.
        "use_tf32": "0",
    }
    tensorrt = {"device_id": str(device.index), "trt_fp16_enable": str(half)}
    if engines is not None:
        folder = str(engines)
        tensorrt |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": folder}
        tensorrt |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": folder}
    chain: dict[Kind, list[Any]] = {
        "cpu": [],
        "cuda": [(NAMES["cuda"], cuda)],
        "tensorrt": [(NAMES["tensorrt"], tensorrt), (NAMES["cuda"], cuda)],
    }
    return [*chain[device.kind], NAMES["cpu"]]


def engine_folder(parent: Path, fingerprint: str, device: Device) -> Path | None:
    """Where TensorRT keeps the engines of a bundle, made when missing; None on other devices.

    TensorRT tells GPUs and versions apart itself, and a bundle's graphs by the name of their parts alone:
    hence a folder for each bundle.

    Raises:
        InvalidField: The folder cannot be made.
    """
    if device.kind != "tensorrt":
        return None
    folder = parent / fingerprint[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidField(
            f"--engine-cache '{parent}' cannot be written ({error.strerror}); name another folder.",
            param="engine_cache",
        ) from None
    return folder


def default_engines() -> Path:
    """Where TensorRT's engines go unless the user says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "embedserve" / "tensorrt"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run failed for want of memory, on the GPU or on the CPU."""
    return isinstance(error, MemoryError) or MEMORY.search(str(error)) is not None


def _parse(wanted: str) -> Device | None:
    """None is `auto`."""
    if wanted == AUTO:
        return None
    kind, _, number = wanted.partition(":")
    match kind:
        case "cpu" if number == "" and ":" not in wanted:
            return CPU
        case "cuda" | "tensorrt" if number.isdecimal() or ":" not in wanted:
            return Device(kind, int(number or 0))
    raise InvalidField(
        f"--device is '{wanted[:40]}'; use auto, cpu, cuda, cuda:1 (the second GPU), tensorrt or tensorrt:1.",
        param="device",
    )


def _trouble(device: Device, available: Collection[str]) -> str:
    """Why the device does not work here and how to change that; empty when it works."""
    if device.provider not in available:
        if _has_gpu_package():
            return (
                "the packages onnxruntime and onnxruntime-gpu are both installed, and the former overwrote "
                "the latter. Run `pip uninstall -y onnxruntime onnxruntime-gpu`, then "
                "`pip install onnxruntime-gpu`."
            )
        return f"this ONNX Runtime was built without {device.provider}. {INSTALL}"
    failure = _start(device)
    if failure:
        return (
            f"{device.provider} does not start ({failure}). Check `nvidia-smi`, the number of the GPU, and "
            f"the versions of CUDA, cuDNN{' and TensorRT' if device.kind == 'tensorrt' else ''} in {GUIDE}."
        )
    return ""


def _start(device: Device) -> str:
    """Runs a graph of one node there, buffers included; what went wrong, or nothing."""
    load_libraries()
    try:
        session = ort.InferenceSession(ONE_NODE, providers=providers(device), enable_fallback=0)
        if device.provider not in session.get_providers():
            return "its libraries cannot be loaded"
        there = ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, device.memory, device.index)
        there.update_inplace(np.ones(1, np.float32))
        session.run(None, {"x": there.numpy()})
    except Exception as error:  # noqa: BLE001 -- ONNX Runtime's errors share no base class
        return str(error).strip().splitlines()[0][:300]
    return ""


def load_libraries() -> None:
    """Finds CUDA and cuDNN where pip put them; what is not there is found missing when a session starts."""
    said = io.StringIO()
    with contextlib.suppress(Exception), contextlib.redirect_stdout(said):
        ort.preload_dlls(msvc=False)
    if said.getvalue().strip():
        logger.debug("%s", said.getvalue().strip())


def _has_gpu_package() -> bool:
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def _is_int8(precision: str) -> bool:
    return "int8" in precision.partition(";")[0]
