"""A float32 graph written in another precision: the same inputs and outputs, and weights of fewer bits.

int8 weights have a scale for each channel and 7 bits: with 8, processors without VNNI add up pairs of
products that no longer fit 16 bits, and give other vectors without a word. What goes into an int8 layer is
brought to 8 bits by scales that are found

- anew in every run, for each row by itself (*rows*: independent of the batch; linear layers only);
- once, on the calibration set (*static*: independent of the batch; of convolutions too);
- anew in every run, one for the whole batch (*dynamic*: an input's vector depends on what else is in it).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from training.export import graphs
from training.export.precision.rows import write_rows

__all__ = ["DYNAMIC", "FLOAT16", "INT8", "ROWS", "STATIC", "Form", "layers"]

Batches = Sequence[NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Form:
    """A way to write a graph.

    Attributes:
        name: As it stands in the model card.
        operators: What it changes.
        write: (float32 graph, file to write, batches of the calibration set, names of the layers to change).
    """

    name: str
    operators: tuple[str, ...]
    write: Callable[[Path, Path, Batches, Sequence[str]], None]


def layers(path: Path, form: Form) -> list[str]:
    """Names of the nodes with weights that a form can change, in the order in which they run."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in form.operators and len(node.input) > 1 and node.input[1] in weights
    ]


def _rows(path: Path, out: Path, batches: Batches, names: Sequence[str]) -> None:
    model = onnx.load(path)
    write_rows(model, names)
    graphs.save(model, out)


def _dynamic(path: Path, out: Path, batches: Batches, names: Sequence[str]) -> None:
    with _quietly():
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=list(DYNAMIC.operators),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(names),
            use_external_data_format=_is_large(path),
            extra_options={"MatMulConstBOnly": True},
        )


def _static(path: Path, out: Path, batches: Batches, names: Sequence[str]) -> None:
    with _quietly():
        quantize_static(
            path,
            out,
            _Reader(path, batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(STATIC.operators),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(names),
            use_external_data_format=_is_large(path),
        )


def _float16(path: Path, out: Path, batches: Batches, names: Sequence[str]) -> None:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    # Loading open_clip's ViT-B-32 with its Gelu in float16 ends the process by SIGSEGV (ONNX Runtime 1.31.1
    # on a CPU, all optimizations on, as by default); with Gelu in float32 it loads, at a cosine of 1.0000.
    in_float = [*DEFAULT_OP_BLOCK_LIST, "Gelu"]
    with _quietly():
        # By its path, so that shapes are inferred in a file: in memory, protobuf ends at 2 GB.
        model: Any = convert_float_to_float16(str(path), keep_io_types=True, op_block_list=in_float)
        graphs.save(model, out)


FLOAT16 = Form("float16", (), _float16)
ROWS = Form("int8 rows", ("Gemm", "MatMul"), _rows)
# A convolution's dynamic kernel is slower than float32.
DYNAMIC = Form("int8 dynamic", ("Gemm", "MatMul"), _dynamic)
STATIC = Form("int8 static", ("Conv", "Gemm", "MatMul"), _static)
INT8 = (ROWS, STATIC, DYNAMIC)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    """The batches, each under the name of the graph's input."""

    def __init__(self, path: Path, batches: Batches) -> None:
        name = onnx.load(path, load_external_data=False).graph.input[0].name
        self._feeds = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        return next(self._feeds, None)


def _is_large(path: Path) -> bool:
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0) > graphs.LARGEST_FILE


@contextmanager
def _quietly() -> Iterator[None]:
    """Advice for other graphs than these is left out."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
