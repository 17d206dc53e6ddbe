"""Devices: what works is taken, what was asked for by name works or is an error, memory that is used up fails
an input and nothing else. What needs a GPU to be seen is measured by benchmarks/gpu_serving.py."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from embedserve.binding import LANES, BoundSession, rounded
from embedserve.device import CPU, Device, choose, engine_folder, is_out_of_memory, providers
from embedserve.encoder import Encoder
from embedserve.errors import InvalidField, NotReady
from embedserve.graph import Graph, session_options
from embedserve.graphs import _sizes
from tests.embedserve.hungry import write_hungry_bundle, write_hungry_graph
from tests.tiny_bundle import DIM, OUTPUTS, write_tiny_bundle

TEXTS = {"batch": None, "length": None}
HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA; the refusal shows without it")
with_cuda = pytest.mark.skipif(
    not HAS_CUDA, reason="needs a GPU and onnxruntime-gpu: docs/serving-on-a-gpu.md"
)


# ---- the choice --------------------------------------------------------------------------------------


@without_cuda
def test_auto_takes_the_cpu_without_a_word_where_there_is_nothing_else() -> None:
    choice = choose("auto")
    assert (choice.device, choice.note) == (CPU, "")


@without_cuda
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", "tensorrt"])
def test_a_gpu_asked_for_by_name_is_there_or_an_error_with_the_fix(wanted: str, tiny_folder: Path) -> None:
    with pytest.raises(
        InvalidField, match=rf"--device {wanted} cannot be used: .* Install `embedserve\[gpu\]`"
    ):
        Encoder.load(tiny_folder, threads=1, device=wanted)


def test_auto_says_why_a_provider_that_is_there_does_not_start() -> None:
    """The package for GPUs on a machine without one: its provider is listed, and fails."""
    choice = choose("auto", available=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if HAS_CUDA:
        assert choice.device == Device("cuda")
        return
    assert choice.device == CPU
    assert "CUDAExecutionProvider does not start" in choice.note
    assert "nvidia-smi" in choice.note


def test_auto_keeps_int8_on_the_cpu_and_names_do_not() -> None:
    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    choice = choose("auto", precision="int8", available=there)
    assert choice.device == CPU
    assert "int8" in choice.note
    stored = "float32; weights stored in float16 (image) and int8 (text)"
    assert "runs best" not in choose("auto", precision=stored, available=there).note


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "", "CUDA", "tensorrt:1:2"])
def test_a_device_that_is_none_is_refused_with_the_list(wanted: str) -> None:
    with pytest.raises(InvalidField, match=r"use auto, cpu, cuda, cuda:1 .*, tensorrt"):
        choose(wanted)


def test_behind_a_gpu_come_those_that_take_what_it_cannot_run(tmp_path: Path) -> None:
    def names(device: Device) -> list[str]:
        return [one if isinstance(one, str) else one[0] for one in providers(device)]

    assert names(CPU) == ["CPUExecutionProvider"]
    assert names(Device("cuda", 1)) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names(Device("tensorrt")) == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    (_, tensorrt), (_, cuda), _ = providers(Device("tensorrt", 2), half=True, engines=tmp_path)
    assert tensorrt["device_id"] == cuda["device_id"] == "2"
    assert tensorrt["trt_fp16_enable"] == "True"
    assert tensorrt["trt_engine_cache_path"] == str(tmp_path)
    assert providers(Device("tensorrt"))[0][1]["trt_fp16_enable"] == "False"


def test_engines_lie_in_a_folder_for_each_bundle(tmp_path: Path) -> None:
    device = Device("tensorrt")
    one = engine_folder(tmp_path / "engines", "a" * 64, device)
    other = engine_folder(tmp_path / "engines", "b" * 64, device)
    assert one
    assert other
    assert one.is_dir()
    assert one != other
    assert engine_folder(tmp_path / "none", "a" * 64, CPU) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidField, match="--engine-cache"):
        engine_folder(tmp_path / "file", "a" * 64, device)


@with_cuda
def test_on_a_gpu_vectors_are_those_of_the_cpu(tiny_folder: Path) -> None:
    cpu, gpu = (Encoder.load(tiny_folder, threads=1, device=device) for device in ("cpu", "cuda"))
    gpu.warm_up()
    pixels = list(np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    np.testing.assert_allclose(gpu.embed_images(pixels), cpu.embed_images(pixels), atol=1e-5)
    assert gpu.provider == "CUDAExecutionProvider"


# ---- buffers -----------------------------------------------------------------------------------------


@pytest.fixture
def bound(tiny_folder: Path) -> Graph:
    return Graph(tiny_folder / "text.onnx", 1, "tensor(int64)", TEXTS, DIM, bind=True)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Graph:
    return Graph(tiny_folder / "text.onnx", 1, "tensor(int64)", TEXTS, DIM)


def tokens(rows: int, length: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, DIM + 2, (rows, length))


def test_runs_over_buffers_give_the_same_vectors_for_every_batch_size(bound: Graph, plain: Graph) -> None:
    for rows in (*range(1, 20), 64, 3, 1):
        batch = tokens(rows, seed=rows)
        np.testing.assert_array_equal(bound.run(batch), plain.run(batch))


def test_a_vector_stays_what_it_was_when_its_buffer_is_used_again(bound: Graph, plain: Graph) -> None:
    first = bound.run(tokens(4, seed=1))
    kept = first.copy()
    bound.run(tokens(4, seed=2))
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(kept, plain.run(tokens(4, seed=2)))


def test_buffers_are_used_again_and_their_number_is_bounded(tiny_folder: Path) -> None:
    session = ort.InferenceSession(
        str(tiny_folder / "text.onnx"), session_options(1), providers=["CPUExecutionProvider"]
    )
    bound = BoundSession(session, CPU, DIM)
    bound.run(tokens(8))
    (lane,) = bound._idle
    buffers = lane._buffers[8, 5]
    bound.run(tokens(7))
    assert bound._idle == [lane]
    assert list(lane._buffers) == [(8, 5)]
    assert lane._buffers[8, 5] is buffers
    for length in range(1, 200):
        bound.run(tokens(1, length))
    assert len(lane._buffers) == 64
    assert (1, 199) in lane._buffers


def test_many_threads_share_few_lanes(bound: Graph, plain: Graph) -> None:
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        barrier.wait(10)
        for turn in range(20):
            batch = tokens(1 + (seed + turn) % 9, seed=seed)
            np.testing.assert_array_equal(bound.run(batch), plain.run(batch))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert bound._bound
    assert 1 <= len(bound._bound._idle) <= LANES


def test_batches_are_rounded_up_to_few_sizes() -> None:
    assert [rounded(count) for count in (1, 2, 3, 4, 5, 8, 9, 63, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]
    assert _sizes(24) == [24, 16, 8, 4, 2, 1]
    assert _sizes(20) == [20, 16, 8, 4, 2, 1]
    assert _sizes(1) == [1]


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", [False, True])
def test_a_batch_that_does_not_fit_is_run_in_halves(tmp_path: Path, bind: bool) -> None:
    write_hungry_graph(tmp_path / "text.onnx", most_tokens=4)
    graph = Graph(tmp_path / "text.onnx", 1, "tensor(int64)", TEXTS, DIM, bind=bind)
    batch = np.arange(8)[:, None]
    np.testing.assert_array_equal(graph.run(batch), np.eye(8, dtype=np.float32))
    assert graph.halved == 1
    np.testing.assert_array_equal(graph.run(batch[:4]), np.eye(8, dtype=np.float32)[:4])


@pytest.mark.parametrize("bind", [False, True])
def test_one_input_that_does_not_fit_is_a_503_and_the_next_ones_go_on(tmp_path: Path, bind: bool) -> None:
    write_hungry_graph(tmp_path / "text.onnx", most_tokens=0)
    graph = Graph(tmp_path / "text.onnx", 1, "tensor(int64)", TEXTS, DIM, bind=bind)
    for _ in range(2):
        with pytest.raises(NotReady, match="more memory than cpu has left for one input") as caught:
            graph.run(np.array([[1], [2], [3]]))
        assert (caught.value.status, caught.value.code) == (503, "out_of_memory")


def test_other_failures_are_not_taken_for_want_of_memory(plain: Graph) -> None:
    with pytest.raises(Exception, match="indices") as caught:
        plain.run(np.array([[999], [999]]))
    assert not is_out_of_memory(caught.value)
    assert plain.halved == 0


@pytest.mark.parametrize(
    "message",
    [
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=a",
        "Available memory of 100 is smaller than requested bytes of 900. CUBLAS_STATUS_ALLOC_FAILED",
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 4294967296",
        "std::bad_alloc",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (OutOfMemory)",
    ],
)
def test_every_way_to_say_that_memory_is_used_up_is_known(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


# ---- the encoder -------------------------------------------------------------------------------------


def test_warming_up_runs_the_sizes_that_requests_make(tmp_path: Path) -> None:
    encoder = Encoder(write_tiny_bundle(tmp_path / "b", outputs=OUTPUTS), threads=1)
    before = encoder.images_per_run, encoder.tokens_per_run
    encoder.warm_up()
    assert (encoder.images_per_run, encoder.tokens_per_run) == before
    assert encoder.provider == "CPUExecutionProvider"


def test_warming_up_finds_the_largest_batch_that_fits(tmp_path: Path) -> None:
    encoder = Encoder(write_hungry_bundle(tmp_path / "b", most_tokens=300), threads=1)
    assert encoder.tokens_per_run == 1024
    encoder.warm_up()
    assert 128 <= encoder.tokens_per_run <= 300


def test_warming_up_fails_where_not_even_one_input_fits(tmp_path: Path) -> None:
    encoder = Encoder(write_hungry_bundle(tmp_path / "b", most_tokens=10), threads=1)
    with pytest.raises(NotReady, match="one input of the form"):
        encoder.warm_up()
