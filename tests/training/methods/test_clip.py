"""CLIP, SigLIP and LiT: they learn pairs by heart in the loop, and what is locked stays as it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from tests.training.agreement import gradients
from tests.training.ranks import on_ranks
from tests.training.tiny import FACTS, batch_for, tiny_method
from training.backbones import build
from training.batch_norm import synchronize_batch_norms
from training.checkpoint import load
from training.data import open_pixels, open_source
from training.distributed import rank, world_size
from training.evaluate.ranking import recall, same
from training.method import Batch, Method, Texts
from training.methods import find
from training.methods.lit import LiTOptions
from training.online import evaluation_views
from training.open_clip_models import create, library
from training.run import open_run
from training.train import train

PAIRS = 64
SHAPES = ("circle", "square", "triangle", "cross", "star", "moon", "ring", "arrow")
PLACES = ("left", "right", "top", "bottom", "far", "near", "inside", "outside")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures of noise, each with a caption of its own."""
    folder = tmp_path_factory.mktemp("pairs")
    chance = np.random.default_rng(0)
    lines = ["path,caption"]
    for number in range(PAIRS):
        coarse = Image.fromarray(chance.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{number:02}.png")
        lines.append(f"{number:02}.png,a {SHAPES[number % 8]} on the {PLACES[number // 8]}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


LEARNED_BY_HEART = {
    "backbone": "test_resnet",
    "size": "32",
    "stored_size": "32",
    "text": "transformer/1x64",
    "shared_length": "64",
    "epochs": "40",
    "batch_size": "32",
    "holdout": "0",
    "crop_min": "1",
    "lr": "0.02",
    "log_every": "1",
    "checkpoint_every": "1000",
    "knn_every": "1000",
}


def retrieval(run: Path, folder: Path) -> tuple[float, float]:
    """R@1 of captions for images and of images for captions, over all pairs, as serving sees them."""
    method = open_run(run).method
    source = open_source(folder / "pairs.csv")
    pixels = open_pixels(source, 32, device="cpu")
    assert method.texts is not None
    texts = [line.partition(",")[2] for line in (folder / "pairs.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        images = method.embed(evaluation_views(pixels, np.arange(PAIRS), 32))
        captions = torch.cat(
            [method.text_vectors(torch.tensor([ids])) for ids in method.texts.rules.encode(texts)]
        )
    own = same(torch.arange(PAIRS))
    return recall(images, captions, own, (1,))[0], recall(captions, images, own, (1,))[0]


def values(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def learned(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CLIP."""
    out = tmp_path_factory.mktemp("clip") / "run"
    given = LEARNED_BY_HEART | {"cache_folder": str(out.parent)}
    train("clip", str(pairs / "pairs.csv"), out, given)
    return out


def test_clip_learns_sixty_four_pairs_by_heart(pairs: Path, learned: Path) -> None:
    assert retrieval(learned, pairs) == (1.0, 1.0)
    assert min(values(learned, "scale")) >= 1
    assert max(values(learned, "scale")) <= 100 * (1 + 1e-6)


def test_siglip_learns_them_too(pairs: Path, tmp_path: Path) -> None:
    train("siglip", str(pairs / "pairs.csv"), tmp_path / "run", LEARNED_BY_HEART | {"epochs": "50"})
    assert retrieval(tmp_path / "run", pairs) == (1.0, 1.0)


def test_lit_teaches_another_text_tower_what_locked_images_are(
    pairs: Path, learned: Path, tmp_path: Path
) -> None:
    given = LEARNED_BY_HEART | {"start": str(learned), "text": "transformer/1x48"}
    train("lit", str(pairs / "pairs.csv"), tmp_path / "run", given)
    assert retrieval(tmp_path / "run", pairs) == (1.0, 1.0)
    first, then = (load(run / "checkpoints" / "last.pt")["model"] for run in (learned, tmp_path / "run"))
    for key in [key for key in first if key.startswith("backbone.")]:
        assert torch.equal(then[key], first[key]), key


# -------------------------------------------------------------------------------------------- the loss


def paired(method: Method[Any], text_ids: list[int] | None = None) -> Batch:
    """Eight pairs of noise in float64; pairs with one id have one caption."""
    batch = batch_for(method)
    assert batch.texts is not None
    ids = torch.tensor(text_ids or list(range(8)))
    texts = Texts(batch.texts.tokens[ids], ids)
    return replace(batch, views=[view.double() for view in batch.views], texts=texts)


def literal(method: Method[Any], batch: Batch, smoothing: float) -> Tensor:
    """CLIP's loss over all queries, answer by answer, where captions with one id are all right."""
    assert batch.texts is not None
    images = F.normalize(method.embed(batch.views[0]), dim=1)
    texts = method.text_vectors(batch.texts.tokens)
    scale, ids = method.get_parameter("log_scale").exp(), batch.texts.ids.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for queries, answers in ((images, texts), (texts, images)):
        for i in range(8):
            logs = torch.log_softmax(scale * answers @ queries[i], dim=0)
            right = [j for j in range(8) if ids[i] == ids[j]]
            total = (
                total - (1 - smoothing) * sum(logs[j] for j in right) / len(right) - smoothing * logs.mean()
            )
    return total / 16


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("ids", [None, [0, 1, 2, 1, 4, 0, 0, 7]], ids=["different", "repeated"])
def test_repeated_captions_are_all_right_and_smoothing_spreads_over_all(
    ids: list[int] | None, smoothing: float
) -> None:
    method = tiny_method("clip", label_smoothing=smoothing).double().eval()
    batch = paired(method, ids)
    found, expected = method(batch)["loss"], literal(method, batch, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    ours, theirs = gradients(method, found), gradients(method, expected)
    assert ours.keys() == theirs.keys()
    for key, slope in theirs.items():
        torch.testing.assert_close(ours[key], slope, rtol=1e-7, atol=1e-12)


def test_siglip_begins_as_its_paper_does() -> None:
    method = tiny_method("siglip")
    logits = method(batch_for(method))
    assert (float(logits["scale"]), float(logits["bias"])) == pytest.approx((10, -10))
    assert method.scoring() == {  # type: ignore[attr-defined]
        "activation": "sigmoid",
        "logit_scale": pytest.approx(10),
        "logit_bias": -10.0,
    }


@pytest.mark.parametrize("name", ["clip", "lit"])
@pytest.mark.parametrize(("before", "after"), [(9.0, math.log(100)), (-2.0, 0.0), (3.0, 3.0)])
def test_the_scale_is_kept_within_one_and_a_hundred(name: str, before: float, after: float) -> None:
    method = tiny_method(name)
    scale = method.get_parameter("log_scale")
    with torch.no_grad():
        scale.fill_(before)
    batch = batch_for(method)
    method.after_step(batch.now, batch.values)
    assert float(scale.detach()) == pytest.approx(after)


# --------------------------------------------------------------------------------------- what is locked


def stepped(method: Method[Any], steps: int = 3) -> None:
    """Some steps of gradient descent as the loop makes them."""
    for step in range(steps):
        batch = batch_for(method, seed=step, step=step)
        method(batch)["loss"].backward()
        with torch.no_grad():
            for one in method.parameters():
                if one.grad is not None:
                    one -= 0.1 * one.grad
                    one.grad = None
        method.after_step(batch.now, batch.values)


@pytest.mark.parametrize("lock", ["image", "text"])
def test_a_locked_tower_keeps_weights_and_statistics_and_the_other_learns(lock: Any) -> None:
    method = tiny_method("lit", lock=lock)
    towers: dict[str, Any] = {"image": method.backbone, "text": method.texts}
    before = {
        name: {key: one.clone() for key, one in tower.state_dict().items()} for name, tower in towers.items()
    }
    method.eval()
    method.train()  # as a measurement leaves it
    assert [tower.training for tower in towers.values()] == [lock != "image", lock != "text"]
    stepped(method)
    moved = {
        name: [key for key, one in tower.state_dict().items() if not torch.equal(one, before[name][key])]
        for name, tower in towers.items()
    }
    assert moved[lock] == []
    assert moved["text" if lock == "image" else "image"]
    assert any("running_mean" in key for key in moved["image"]) == (lock == "text")


def test_a_locked_tower_decides_the_space_and_has_no_projection() -> None:
    images, texts = tiny_method("lit", lock="image"), tiny_method("lit", lock="text", text="transformer/1x48")
    assert isinstance(images.image_projection, torch.nn.Identity)
    assert images.text_projection.weight.shape == (16, 32)  # type: ignore[union-attr]
    assert isinstance(texts.text_projection, torch.nn.Identity)
    assert texts.image_projection.weight.shape == (48, 16)  # type: ignore[union-attr]


def test_two_locked_towers_are_refused_however_they_were_locked() -> None:
    for name, options in (
        ("clip", {"image_learns": "nothing", "text_learns": "nothing"}),
        ("lit", {"lock": "both"}),
        ("lit", {"lock": "image", "text_learns": "nothing"}),
    ):
        with pytest.raises(InvalidField, match=r"Both towers are locked.*blocks or lora"):
            tiny_method(name, **options)
    assert LiTOptions(lock="both", text_learns="lora").learns() == ("nothing", "lora")


def test_a_self_supervised_run_is_the_locked_image_tower(pairs: Path, tmp_path: Path) -> None:
    short = {"epochs": "1", "lr": "0.01"}
    given = {key: one for key, one in LEARNED_BY_HEART.items() if key not in {"text", "shared_length"}}
    train("simclr", str(pairs), tmp_path / "images", given | short | {"projection_dim": "16"})
    del given["backbone"]
    more = {"start": str(tmp_path / "images"), "text": "transformer/1x32"}
    train("lit", str(pairs / "pairs.csv"), tmp_path / "lit", given | short | more)
    first, then = (load(tmp_path / run / "checkpoints" / "last.pt")["model"] for run in ("images", "lit"))
    for key in [key for key in first if key.startswith("backbone.")]:
        assert torch.equal(then[key], first[key]), key


def test_a_trained_text_tower_learns_slowly_and_what_is_new_does_not() -> None:
    method = tiny_method("clip")
    assert method.parameter_rules() == []
    method.texts.trained = True  # type: ignore[union-attr]
    assert [(rule.module, rule.lr) for rule in method.parameter_rules()] == [(method.texts, 0.1)]
    added = tiny_method("clip", text_learns="lora")
    added.texts.trained = True  # type: ignore[union-attr]
    assert added.parameter_rules() == []


# ------------------------------------------------------------------------------------------- two ranks


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {"label_smoothing": 0.2, "text_learns": "lora"}),
    ("lit", {"lock": "image", "chunk": 3}),
]


def _weights(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """After three steps with repeated captions; each rank takes its share of the batch."""
    torch.set_num_threads(1)
    method = tiny_method(name, **options).double()
    if world_size() > 1:
        synchronize_batch_norms(method, torch.device("cpu"))
        network: Any = torch.nn.parallel.DistributedDataParallel(method)
    else:
        network = method
    for step in range(3):
        whole = paired(method, [0, 1, 2, 1, 4, 0, 0, step])
        assert whole.texts is not None
        mine = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
        texts = Texts(whole.texts.tokens[mine], whole.texts.ids[mine])
        network(replace(whole, views=[whole.views[0][mine]], ids=whole.ids[mine], texts=texts))[
            "loss"
        ].backward()
        with torch.no_grad():
            for one in method.parameters():
                if one.grad is not None:
                    one -= 0.1 * one.grad
                    one.grad = None
        method.after_step(whole.now, whole.values)
    return {key: one.detach().clone() for key, one in method.state_dict().items()}


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_two_ranks_have_the_weights_of_one_with_the_joined_batch(name: str, options: dict[str, Any]) -> None:
    alone = _weights(name, options)
    for weights in on_ranks(_weights, name, options):
        for key, value in alone.items():
            torch.testing.assert_close(
                weights[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, of=key: f"{of}: {text}"
            )


# ------------------------------------------------------------------------------------- weights to start from


TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("options", [{}, {"text_learns": "lora", "image_learns": "lora"}])
def test_a_checkpoint_of_open_clip_gives_both_towers_and_the_scale(
    options: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "tiny-for-captions.json").write_text(json.dumps(TINY))
    library().add_model_config(tmp_path / "tiny-for-captions.json")
    model = create("tiny-for-captions").eval()
    with torch.no_grad():
        model.logit_scale.fill_(4.2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    name, start = "open_clip:tiny-for-captions", str(tmp_path / "weights.pt")
    kind = find("clip")
    method: Any = kind(build(name, 32, start=start), kind.Options(**options), FACTS)
    method.begin_from(start)
    method.eval()
    assert float(method.log_scale.detach()) == pytest.approx(4.2)
    assert method.texts.trained
    tokens = torch.tensor([[49406, 320, 1125, 49407], [49406, 49407, 0, 0]])
    whole = torch.zeros(2, 77, dtype=torch.int64)
    whole[:, :4] = tokens
    images = torch.rand(2, 3, 32, 32)
    backbone = method.backbone
    with torch.no_grad():
        torch.testing.assert_close(method.text_vectors(tokens), model.encode_text(whole, normalize=True))
        theirs = model.encode_image(torch.addcmul(backbone.shift, images, backbone.factor), normalize=True)
        torch.testing.assert_close(method.image_vectors(images), theirs)
