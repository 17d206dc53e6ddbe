"""What clip-benchmark is given: the encoders' own vectors, and checkpoints that open_clip loads.

clip-benchmark itself is not needed: it calls `encode_image`, `encode_text`, the transform and the tokenizer.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import source_of
from tests.training.pictures import quick, write_pictures
from training import checkpoint, torchvision_ops
from training.backbones import describe
from training.evaluate.clip_benchmark import load, save_open_clip, templates
from training.evaluate.encoder import open_encoder, require_reader
from training.run import build_method, encoder_prefix
from training.settings import DataFacts, resolve
from training.train import train

torchvision_ops.register()
import open_clip  # noqa: E402 -- after that

TEXTS = ["a cat", "a photo of a dog, in more words"]
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def _pictures() -> list[bytes]:
    """Opaque ones, and one with transparency."""
    chance, files = np.random.default_rng(0), []
    for size, channels in (((40, 30), 3), ((20, 60), 3), ((33, 33), 4)):
        coarse = chance.integers(0, 256, (5, 5, channels), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture(scope="module")
def small_open_clip() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-test", SMALL)
        yield


def _saved(folder: Path, **given: str) -> Path:
    """A checkpoint of CLIP whose towers are one open_clip model."""
    given = {
        "backbone": "open_clip:ViT-test",
        "text": "open_clip:ViT-test",
        "size": "32",
        "stored_size": "36",
        "batch_size": "8",
        "cache_folder": str(folder / "cache"),
    } | given
    settings = resolve("clip", "x", given, DataFacts(images=32, heldout=8, native_size=32, on_gpu=False))
    torch.manual_seed(3)
    method = build_method(settings, start="")
    with torch.no_grad():
        method.log_scale.fill_(3.25)
    content = {
        "method": "clip",
        "settings": settings.as_json(),
        "step": 1,
        "model": method.state_dict(),
        "encoder_prefix": encoder_prefix(method),
        "backbone": describe(method.encoder),
        "carried": method.carried(),
    }
    checkpoint.save(folder / "step.pt", content)
    return folder / "step.pt"


@pytest.mark.usefixtures("small_open_clip")
@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_model_transform_and_tokenizer_give_the_vectors_of_the_encoder(
    kind: str, tmp_path: Path, tiny_folder: Path
) -> None:
    path = str(_saved(tmp_path) if kind == "run" else tiny_folder)
    encoder = open_encoder(path, device="cpu")
    model, transform, tokenizer = load(path)
    transform = pickle.loads(pickle.dumps(transform))
    files = _pictures()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(Image.open(io.BytesIO(one))) for one in files]))
        texts = model.encode_text(tokenizer(TEXTS))
    expected = encoder.embed(source_of(files)).vectors
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(normalize(images), normalize(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalize(texts), require_reader(encoder, "").embed(TEXTS), atol=1e-5, rtol=0)


def test_templates_have_their_place_where_clip_benchmark_looks_for_it() -> None:
    assert templates(["{}", "a photo of a {}."]) == ["{c}", "a photo of a {c}."]
    with pytest.raises(InvalidField):
        templates(["a photo"])


@pytest.mark.usefixtures("small_open_clip")
def test_open_clip_loads_what_was_saved_and_gives_the_same_vectors(tmp_path: Path) -> None:
    run = _saved(tmp_path)
    assert save_open_clip(str(run), tmp_path / "model.pt") == "ViT-test"
    model, _, _ = open_clip.create_model_and_transforms("ViT-test", pretrained=str(tmp_path / "model.pt"))
    ours, _, tokenizer = load(str(run))
    images = torch.randn(3, 3, 32, 32)
    backbone = ours.method.encoder
    with torch.no_grad():
        seen = torch.addcmul(backbone.shift, images, backbone.factor)  # each has its own mean and std
        torch.testing.assert_close(model.eval().encode_image(seen), ours.encode_image(images))
        theirs = model.encode_text(open_clip.get_tokenizer("ViT-test")(TEXTS), normalize=True)
        torch.testing.assert_close(theirs, ours.encode_text(tokenizer(TEXTS)))
    assert float(model.logit_scale.detach()) == 3.25


@pytest.mark.usefixtures("small_open_clip")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": "64", "stored_size": "72"}, "sees 64 pixels where open_clip's 'ViT-test' sees 32"),
        ({"text": "transformer/1x32"}, "not those of one open_clip model"),
    ],
)
def test_what_an_open_clip_checkpoint_cannot_say_is_refused(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidField, match=said):
        save_open_clip(str(_saved(tmp_path, **given)), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_an_encoder_without_text_is_refused(tmp_path: Path) -> None:
    data = str(write_pictures(tmp_path / "pictures"))
    train("simclr", data, tmp_path / "run", quick("simclr", epochs=1, cache_folder=tmp_path / "cache"))
    with pytest.raises(InvalidField, match="no text tower"):
        load(str(tmp_path / "run"))
