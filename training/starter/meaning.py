"""What the starter learned from captioned drawings: `python -m training.starter.meaning --npm … --svg …`.

    mkdir /tmp/drawings && cd /tmp/drawings
    npm install emojibase-data @iconify-json/{noto,noto-v1,twemoji,emojione,fluent-emoji-flat}
    npm install @iconify-json/{game-icons,flat-color-icons}
    apt-get install openclipart-png openclipart-svg
    python -m training.starter.meaning --npm /tmp/drawings/node_modules --svg /usr/share/openclipart/svg

The image network and the text network stay as they are. Each drawing is shown as it is and in three altered
views, its pooled features are computed once and kept (`--cache`), and two layers (`towers.Meaning`) learn to
turn them into MiniLM's vectors of the captions. Their output is added to ConSE's vector, so what is learned
is what ConSE lacks. The loss is the mean of the first two, plus the third:

    caption among those of the batch     cross-entropy; the drawing's other captions count neither way
    drawing among those of the batch     cross-entropy; every drawing drawn for that caption is right
    distillation, times `DISTILLATION`   1 − cosine to ConSE's vector, so that ImageNet is not forgotten

The result is kept in `meaning.npz`, so building the starter needs no pictures.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from training.export.graphs import export_graph
from training.starter import clipart, visual
from training.starter.captioned import Captioned, clip_art, emoji_names, held_out_concept, icons, slug
from training.starter.towers import SIZE, ImageNetwork, Meaning

__all__ = ["FITTED", "SHARE", "fit", "learnable", "load", "view"]

FITTED = Path(__file__).parent / "meaning.npz"
SHARE = (0.7, 0.3)
"""How much of the semantic part is learned where the greatest class probability is 0, and where it is 1."""
VIEWS = 4
STEPS, BATCH, RATE, DECAY, DROPOUT = 250, 768, 1e-3, 0.05, 0.3
DISTILLATION = 0.5
MAIN_CAPTION = 0.6
"""How often the main caption is asked for, instead of a keyword."""
UNVARIED = ("/cards/", "/jigsaw/", "/gradients/")
"""Folders of Open Clip Art with many drawings that differ in next to nothing."""


def learnable(npm: Path, png: Path, svg: Path) -> list[Captioned]:
    """All drawings but those kept for measuring, and those of other sources with the same main caption."""
    art = list(clip_art(png, svg))
    different = [name for name, _ in clipart.pictures(png, visual.PREPROCESSING)]
    kept = set(clipart.held_out(different))
    measured = {slug(one.captions[0]) for one in art if one.name in kept}
    measured |= {slug(names[0]) for names in emoji_names(npm).values() if held_out_concept(names[0])}
    drawn = set(different) - kept
    art = [one for one in art if one.name in drawn and not any(part in f"/{one.name}" for part in UNVARIED)]
    return [one for one in (*icons(npm), *art) if slug(one.captions[0]) not in measured]


def view(drawing: Image.Image, draw: random.Random | None) -> NDArray[np.uint8]:
    """The drawing in the middle of white, or with `draw` altered: smaller, coarser, turned, recoloured."""
    if draw is None:
        canvas = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        at = ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2)
        canvas.paste(drawing, at, drawing.getchannel("A"))
        return np.asarray(canvas)
    drawing = _scaled(drawing, draw.uniform(0.6, 1.0), Image.Resampling.BICUBIC)
    if draw.random() < 0.35:
        coarse = _scaled(drawing, draw.uniform(0.25, 0.6), Image.Resampling.BOX)
        drawing = coarse.resize(drawing.size, Image.Resampling.BICUBIC)
    if draw.random() < 0.3:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < 0.6:
        drawing = drawing.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC)
    white = draw.random() < 0.7
    ground = (255, 255, 255) if white else (draw.randrange(256), draw.randrange(256), draw.randrange(256))
    canvas = Image.new("RGB", (SIZE, SIZE), ground)
    at = (draw.randint(0, SIZE - drawing.width), draw.randint(0, SIZE - drawing.height))
    canvas.paste(drawing, at, drawing.getchannel("A"))
    if draw.random() < 0.8:
        canvas = ImageEnhance.Brightness(canvas).enhance(draw.uniform(0.8, 1.2))
        canvas = ImageEnhance.Contrast(canvas).enhance(draw.uniform(0.7, 1.3))
        canvas = ImageEnhance.Color(canvas).enhance(draw.uniform(0.2, 1.6))
    if draw.random() < 0.4:
        hue, *rest = canvas.convert("HSV").split()
        turned = (np.asarray(hue).astype(int) + draw.randint(-25, 25)) % 256
        canvas = Image.merge("HSV", [Image.fromarray(turned.astype(np.uint8)), *rest]).convert("RGB")
    return np.asarray(canvas)


def fit(
    network: ImageNetwork,
    pooled: NDArray[np.float16],
    captions: Sequence[Sequence[str]],
    embed: Callable[[Sequence[str]], Tensor],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Meaning:
    """Learns from pooled features.

    Args:
        network: Gives the class logits and ConSE's vectors; nothing of it changes.
        pooled: [drawings, views, features], all ≥ 0.
        captions: Of each drawing, the main one first.
        embed: Texts → unit vectors [n, 384].
    """
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    texts = list(dict.fromkeys(text for every in captions for text in every))
    row = {text: index for index, text in enumerate(texts)}
    known = [[row[text] for text in every] for every in captions]
    vectors = embed(texts)
    meaning = Meaning(pooled.shape[2], share=SHARE)
    roots = np.sqrt(pooled[:, 0].astype(np.float32))
    meaning.mean.copy_(torch.from_numpy(roots.mean(axis=0)))
    meaning.scale.copy_(1 / torch.from_numpy(roots.std(axis=0)).clamp_min(0.05))
    nn.init.normal_(meaning.narrow.weight, std=0.002)  # so that it starts from ConSE
    nn.init.zeros_(meaning.narrow.bias)
    log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
    optimiser = torch.optim.AdamW(
        [
            {"params": meaning.parameters(), "weight_decay": DECAY},
            {"params": [log_scale], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, step / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = draw.choice(len(pooled), min(batch, len(pooled)), replace=False)
        seen = pooled[chosen, draw.integers(pooled.shape[1], size=len(chosen))].astype(np.float32)
        asked = [_ask(known[index], draw) for index in chosen]
        columns, column = np.unique(asked, return_inverse=True)
        right = torch.zeros(len(chosen), len(columns))
        right[torch.arange(len(chosen)), torch.from_numpy(column)] = 1
        also = torch.from_numpy(np.stack([np.isin(columns, known[index]) for index in chosen])) & (right == 0)

        features = torch.from_numpy(seen)
        conse = network.conse(network.network.classifier(features)).detach()  # type: ignore[operator]
        found = F.normalize(conse + _dropped(meaning, features), dim=1)
        scores = log_scale.exp() * found @ vectors[torch.from_numpy(columns)].T
        scores = scores.masked_fill(also, -1e4)
        to_text = -(right * F.log_softmax(scores, dim=1)).sum(dim=1).mean()
        to_image = -(right / right.sum(dim=0) * F.log_softmax(scores, dim=0)).sum(dim=0).mean()
        distillation = 1 - (found * conse).sum(dim=1).mean()
        loss = (to_text + to_image) / 2 + DISTILLATION * distillation
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        report(step, float(loss.detach()))
    return meaning.eval()


def load() -> Meaning:
    """As fitted, float32."""
    with np.load(FITTED) as stored:
        weights = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
    meaning = Meaning(weights["mean"].shape[0], weights["widen.bias"].shape[0], share=SHARE)
    meaning.load_state_dict(weights)
    return meaning.eval()


def features(network: ImageNetwork, drawings: Sequence[Captioned]) -> NDArray[np.float16]:
    """Pooled features [drawings, views, features] of each drawing as it is and altered."""
    example = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    graph = export_graph(
        _Pooled(network), example, "pixels", {0: ("batch", 4096)}, {"pooled": ("batch", 1280)}
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    draw = random.Random(0)  # noqa: S311 -- a fixed draw is the point
    rows = []
    for one in drawings:
        drawing = one.draw()
        views = np.stack([view(drawing, draw if number else None) for number in range(VIEWS)])
        rows.append(session.run(None, {"pixels": views})[0].astype(np.float16))
    return np.stack(rows)


class _Pooled(nn.Module):
    def __init__(self, network: ImageNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.features(pixels)[0]


def _ask(captions: Sequence[int], draw: np.random.Generator) -> int:
    if len(captions) == 1 or draw.random() < MAIN_CAPTION:
        return captions[0]
    return captions[int(draw.integers(1, len(captions)))]


def _dropped(meaning: Meaning, pooled: Tensor) -> Tensor:
    """`meaning(pooled)` with dropout before both layers."""
    shown = F.dropout((torch.sqrt(pooled) - meaning.mean) * meaning.scale, DROPOUT)
    out: Tensor = meaning.narrow(F.dropout(F.gelu(meaning.widen(shown)), DROPOUT))
    return out


def _scaled(drawing: Image.Image, by: float, how: Image.Resampling) -> Image.Image:
    width, height = (max(1, round(side * by)) for side in drawing.size)
    return drawing.resize((width, height), how)


def _lower(captions: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text.lower() for text in captions))[:12]


def main() -> None:
    from training.starter import build

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--npm", type=Path, required=True, help="the folder node_modules with the icon sets")
    parser.add_argument("--svg", type=Path, required=True, help="folder of openclipart-svg")
    parser.add_argument("--png", type=Path, default=clipart.DEFAULT_FOLDER, help="folder of openclipart-png")
    parser.add_argument("--cache", type=Path, help="file (.npy) to keep the features in or take them from")
    parser.add_argument("--out", type=Path, default=FITTED)
    arguments = parser.parse_args()
    joined = build.networks(learned=False)
    drawings = learnable(arguments.npm, arguments.png, arguments.svg)
    if arguments.cache is not None and arguments.cache.exists():
        pooled = np.load(arguments.cache)
    else:
        pooled = features(joined.image, drawings)
        if arguments.cache is not None:
            np.save(arguments.cache, pooled)
    if len(pooled) != len(drawings):
        raise SystemExit(f"'{arguments.cache}' is of {len(pooled)} drawings, there are {len(drawings)}")
    meaning = fit(
        joined.image,
        pooled,
        [_lower(one.captions) for one in drawings],
        joined.embed_meanings,
        report=lambda step, loss: (
            print(f"step {step + 1} of {STEPS}: loss {loss:.3f}", flush=True) if step % 25 == 24 else None
        ),
    )
    np.savez_compressed(
        arguments.out,
        **{name: weight.numpy().astype(np.float16) for name, weight in meaning.state_dict().items()},
    )
    print(f"fitted on {len(drawings)} drawings: {arguments.out}")


if __name__ == "__main__":
    main()
