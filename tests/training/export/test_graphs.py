"""Graphs say what they take and give, keep no trace of who wrote them, and may lie beside their weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra 'train')")

import onnxruntime as ort  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from embedserve.errors import EmbedServeError  # noqa: E402
from training.export.graphs import export_graph, weight_bytes, write_graph  # noqa: E402
from training.export.towers import ImageGraph, unit  # noqa: E402

FREE = {0: ("batch", 99)}


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_an_exported_graph_keeps_no_trace_of_the_machine() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU())
    model = export_graph(network, torch.zeros(2, 6), "x", {0: ("batch", 99)}, {"embedding": ("batch", 5)})
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for weight in bare.graph.initializer:
        weight.ClearField("raw_data")  # numbers may hold any byte
    for trace in ("site-packages", ".py", "/", "\\"):
        assert trace not in str(bare)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == ["x", "embedding"]
    for batch in (1, 7):
        x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], network(x), atol=1e-6)


class Trunk(nn.Module):
    """Costly to run twice; its parts below share it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.GELU(), nn.Conv2d(16, 32, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Pooled(nn.Module):
    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).mean((2, 3))


class Cells(Pooled):
    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).flatten(2).transpose(1, 2)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def two_outputs() -> ImageGraph:
    trunk = Trunk()
    return ImageGraph(Pooled(trunk), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), [Cells(trunk)])


OUTPUTS = {"embedding": ("batch", 32), "patches": ("batch", 4, 32)}


def test_a_second_output_comes_behind_the_embedding_and_costs_no_second_pass(tmp_path: Path) -> None:
    network = two_outputs()
    model = export_graph(network, images(2), "pixels", FREE, OUTPUTS)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["embedding", "patches"]
    for count in (1, 3):
        found = session.run(None, {"pixels": images(count).numpy()})
        for ours, theirs in zip(found, network(images(count)), strict=True):
            np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)


def test_pixels_are_scaled_and_normalised_as_torchvision_does_it() -> None:
    from training import torchvision_ops

    torchvision_ops.register()
    from torchvision.transforms import Compose, Normalize, ToTensor

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = images(3)
    theirs = torch.stack([Compose([ToTensor(), Normalize(mean, std)])(one.numpy()) for one in pixels])
    assert torch.equal(ImageGraph(nn.Identity(), mean, std).normalized(pixels), theirs)


def test_a_vector_of_nearly_nothing_stays_nearly_nothing() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0]])
    torch.testing.assert_close(unit(vectors), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1e-6, 0.0]]))


def test_heavy_weights_lie_in_a_file_beside_the_graph(tmp_path: Path) -> None:
    network = two_outputs()
    light, heavy = tmp_path / "light.onnx", tmp_path / "heavy.onnx"
    write_graph(light, network, images(2), name="pixels", axes=FREE, outputs=OUTPUTS)
    least = weight_bytes(network) - 1
    write_graph(heavy, network, images(2), name="pixels", axes=FREE, outputs=OUTPUTS, largest=least)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heavy.onnx", "heavy.onnx.data", "light.onnx"]
    bare = onnx.load(heavy, load_external_data=False)
    places = {
        entry.value
        for one in bare.graph.initializer
        for entry in one.external_data
        if entry.key == "location"
    }
    assert places == {"heavy.onnx.data"}
    assert str(tmp_path).encode() not in heavy.read_bytes()
    answers = [
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, {"pixels": images(3).numpy()}
        )
        for path in (light, heavy)
    ]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_shared_weights_count_once() -> None:
    trunk = Trunk()
    assert (
        weight_bytes(nn.ModuleList([Pooled(trunk), Cells(trunk)]))
        == weight_bytes(trunk)
        == 4 * (16 * 3 * 16 + 16 + 32 * 16 + 32)
    )


def test_a_network_that_branches_on_its_input_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        EmbedServeError, match=r"cannot write this network as an ONNX graph .* must not branch"
    ):
        export_graph(Branching(), torch.ones(2, 3), "x", FREE, {"embedding": ("batch", 3)})
