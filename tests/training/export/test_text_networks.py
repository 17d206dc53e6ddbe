"""Texts cut to the longest of their batch have the vectors of texts filled up to the context."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training import torchvision_ops
from training.export.graphs import export_graph
from training.export.original import ready
from training.export.text_networks import First, open_clip_text

torchvision_ops.register()

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

CONTEXT, VOCABULARY, START, END, PAD = 16, 100, 98, 99, 0
IMAGES = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXTS = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}


def clip(**texts: Any) -> nn.Module:
    return CLIP(32, IMAGES, TEXTS | texts)


def custom(**texts: Any) -> nn.Module:
    return CustomTextCLIP(32, IMAGES, TEXTS | texts)


def coca(*, correct_mask: bool = False) -> nn.Module:
    decoder = {"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 1}
    model = CoCa(
        32, decoder, TEXTS | {"embed_cls": True, "output_tokens": True}, IMAGES | {"output_tokens": True}
    )
    model.text.correct_cls_mask = correct_mask
    return model


MODELS = {
    "CLIP": clip,
    "CLIP, own text tower": custom,
    "end token by its id": lambda: custom(pool_type="eos", eos_id=END),
    "first token": lambda: custom(pool_type="first", proj_bias=True),
    "no projection": lambda: custom(proj_type="none"),
    "attention of the custom kind": lambda: custom(qk_norm=True, scale_heads=True),
    "CoCa": coca,
    "CoCa with the mask put right": lambda: coca(correct_mask=True),
}
"""Causal, so that texts can be cut."""


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ready(MODELS[name]())


def texts(count: int, longest: int, seed: int = 0) -> Tensor:
    """Rows of start, 0 to `longest` − 2 random ids (0 is one of them), end, padding; the first is longest."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((count, CONTEXT), PAD)
    for index, row in enumerate(rows):
        words = longest - 2 if index == 0 else int(torch.randint(longest - 1, (1,), generator=generator))
        row[: words + 2] = torch.tensor(
            [START, *torch.randint(0, START, (words,), generator=generator).tolist(), END]
        )
    return rows


def padded_vectors(model: Any, rows: Tensor) -> Tensor:
    """By the model's own code."""
    with torch.no_grad():
        vectors: Tensor = model.encode_text(rows, normalize=False)
    return vectors


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """To 1e-6, as the unit vectors that they become."""
    np.testing.assert_allclose(normalize(found, dim=1), normalize(expected, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_length_gives_the_vectors_of_the_whole_context(name: str) -> None:
    model = built(name)
    network, padding = open_clip_text(model)
    assert padding == "longest"
    for longest in range(2, CONTEXT + 1):
        rows = texts(5, longest, seed=longest)
        expected = padded_vectors(model, rows)
        for length in {longest, min(longest + 1, CONTEXT), CONTEXT}:
            with torch.no_grad():
                assert_equal(network.eval()(rows[:, :length]), expected)


def test_an_end_token_that_a_user_typed_counts_as_the_library_counts_it() -> None:
    model = built("CLIP")
    network, _ = open_clip_text(model)
    rows = texts(2, 9)
    rows[0, 3] = END
    with torch.no_grad():
        assert_equal(network.eval()(rows[:, :9]), padded_vectors(model, rows))


@pytest.mark.parametrize(
    "texts_options",
    [
        {"no_causal_mask": True, "pool_type": "last"},  # SigLIP, CLIPA
        {"no_causal_mask": True},  # MobileCLIP-S
        {"pool_type": "last"},
        {"pad_id": 97},  # a pad id that may be the largest
    ],
)
def test_towers_that_see_their_padding_keep_it(texts_options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ready(custom(**texts_options))
    network, padding = open_clip_text(model)
    assert padding == "context"
    rows = texts(4, 10)
    with torch.no_grad():
        assert_equal(network(rows), padded_vectors(model, rows))


def test_a_clip_that_sees_its_padding_keeps_it() -> None:
    torch.manual_seed(0)
    model = ready(clip(no_causal_mask=True))
    network, padding = open_clip_text(model)
    assert padding == "context"
    rows = texts(4, 10)
    with torch.no_grad():
        assert_equal(network(rows), padded_vectors(model, rows))


@pytest.mark.parametrize("name", ["CLIP", "CoCa"])
def test_the_graph_takes_any_batch_and_length(name: str) -> None:
    network, _ = open_clip_text(built(name))
    axes = {0: ("batch", 1024), 1: ("length", CONTEXT)}
    graph = export_graph(network, texts(3, 5)[:, :5], "text", axes, {"embedding": ("batch", 32)})
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 17):
        for length in range(1, CONTEXT + 1):
            rows = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
            with torch.no_grad():
                expected = network(rows)
            (found,) = session.run(None, {"text": rows.numpy()})
            np.testing.assert_allclose(found, expected, atol=1e-5)


# --- Hugging Face text towers of open_clip: their padding is masked ------------------------------------


def hugging_face(kind: str, pooler: str) -> nn.Module:
    from open_clip.hf_model import HFTextEncoder
    from transformers import M2M100Config, MT5Config, RobertaConfig

    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "roberta": lambda: RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=CONTEXT + 2,
            pad_token_id=PAD,
        ),
        "mt5": lambda: MT5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=PAD
        ),
        "m2m_100": lambda: M2M100Config(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
            max_position_embeddings=CONTEXT,
            pad_token_id=PAD,
        ),
    }
    tower = HFTextEncoder(kind, 32, config=configs[kind](), pooler_type=pooler, proj_type="mlp")
    tower.transformer = (
        getattr(tower.transformer, "encoder", tower.transformer) if kind != "roberta" else tower.transformer
    )
    model = custom()
    model.text = tower
    return ready(model)


@pytest.mark.parametrize(
    ("kind", "pooler"),
    [
        ("roberta", "mean_pooler"),
        ("roberta", "cls_pooler"),
        ("mt5", "mean_pooler"),
        ("m2m_100", "cls_pooler"),
    ],
)
def test_masked_padding_changes_nothing(kind: str, pooler: str) -> None:
    model = hugging_face(kind, pooler)
    network, padding = open_clip_text(model)
    assert isinstance(network, First)
    assert padding == "longest"
    rows = texts(5, 9)  # the id 0 is padding here wherever it stands
    expected = padded_vectors(model, rows)
    for length in (9, 10, CONTEXT):
        with torch.no_grad():
            assert_equal(network(rows[:, :length]), expected)


def test_the_graph_of_a_masked_tower_takes_any_batch_and_length() -> None:
    network, _ = open_clip_text(hugging_face("roberta", "mean_pooler"))
    axes = {0: ("batch", 1024), 1: ("length", CONTEXT)}
    graph = export_graph(network, texts(3, 5)[:, :5], "text", axes, {"embedding": ("batch", 32)})
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for longest in range(2, CONTEXT + 1):
        rows = texts(4, longest, seed=longest)[:, :longest]
        with torch.no_grad():
            expected = network(rows)
        (found,) = session.run(None, {"text": rows.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-5)
