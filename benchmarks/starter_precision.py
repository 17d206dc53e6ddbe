"""What storing and computing in fewer bits costs the starter: `python -m benchmarks.starter_precision`.

For each tower and each way: its size, cosines with PyTorch in float32, inputs a second, and the seconds that
loading takes. "int8 arithmetic" is ONNX Runtime's dynamic quantisation: eight-bit products, and one scale for
a whole batch of activations. The last column, the least cosine of an input alone with the same input in a
batch of 16, is one reason why the starter only stores in eight bits. Needs the extra 'train'.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.machine import machine
from training.starter import build
from training.starter.compact import store_weights

Array = NDArray[np.generic]
BATCH = 16
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(machine())
    joined = build.networks()
    image, text = build.full_graphs(joined)
    pixels = build._drawings(200)
    images: list[Array] = [pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH)]
    texts: list[Array] = list(build._padded(joined.tokens(build._texts(300)), BATCH))
    wanted = joined.embed_images(pixels).numpy(), joined.embed_texts(build._texts(300)).numpy()
    ways: list[tuple[str, str, onnx.ModelProto, list[Array], NDArray[np.float32]]] = [
        ("image", "float32", image, images, wanted[0]),
        ("image", "stored in float16 (shipped)", store_weights(image, {}, "float16"), images, wanted[0]),
        ("text", "float32", text, texts, wanted[1]),
        ("text", "stored in float16", store_weights(text, {}, "float16"), texts, wanted[1]),
        ("text", "stored in int8 (shipped)", build.graphs(joined)[1], texts, wanted[1]),
        *(("text", name, model, texts, wanted[1]) for name, model in integer_arithmetic(text)),
    ]
    print("| tower | way | MB | least cosine | mean cosine | inputs/s | load s | alone or in a batch |")
    print("|---|---|---|---|---|---|---|---|")
    sessions = [load(model) for _, _, model, _, _ in ways]
    best = [float("inf")] * len(ways)
    for _ in range(ROUNDS):  # by turns, so that what else the machine does hits all of them alike
        for index, (_, _, _, batches, _) in enumerate(ways):
            started = time.perf_counter()
            for batch in batches:
                run(sessions[index][0], batch)
            best[index] = min(best[index], time.perf_counter() - started)
    for (tower, way, model, batches, expected), (session, seconds), took in zip(
        ways, sessions, best, strict=True
    ):
        vectors = np.concatenate([run(session, batch) for batch in batches])
        cosines = (vectors * expected).sum(axis=1)
        alone = np.concatenate(
            [run(session, batch[i : i + 1]) for batch in batches[:6] for i in range(len(batch))]
        )
        same = (alone * vectors[: len(alone)]).sum(axis=1)
        print(
            f"| {tower} | {way} | {model.ByteSize() / 1e6:.1f} | {cosines.min():.4f} | {cosines.mean():.5f} "
            f"| {len(vectors) / took:.0f} | {seconds:.2f} | {same.min():.5f} |"
        )


def integer_arithmetic(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    logging.getLogger().setLevel(logging.ERROR)  # it advises preprocessing, which changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(model, source)
        for name, kind, reduce in (
            ("int8 arithmetic, u8u8", QuantType.QUInt8, False),
            ("int8 arithmetic, u8s8, 7-bit weights", QuantType.QInt8, True),
        ):
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=reduce,
                weight_type=kind,
            )
            yield name, onnx.load(target)


def load(model: onnx.ModelProto) -> tuple[ort.InferenceSession, float]:
    raw = model.SerializeToString()
    started = time.perf_counter()
    return ort.InferenceSession(raw, providers=["CPUExecutionProvider"]), time.perf_counter() - started


def run(session: ort.InferenceSession, batch: Array) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return vectors


if __name__ == "__main__":
    main()
