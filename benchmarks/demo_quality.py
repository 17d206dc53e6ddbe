"""What captions do to the demo collection: `python -m benchmarks.demo_quality`.

The drawings of `embedserve demo`, embedded with their names at several weights; at 0 the picture stands
alone, 0.5 is what the demo does. Two kinds of queries, each with one right answer among all drawings:

    text    an emoji's first other name, which is not embedded. Two thirds share a word with the name that is
            ("camera flash" and "camera with flash"), the others, `apart`, do not ("gun" and "water pistol").
    image   each drawing, turned by 12 degrees and cropped, so that no pixel is where it was.

R@k is the share of queries whose drawing is among the first k; of equal scores the right one counts as last.
Needs the extra 'demo'.
"""

from __future__ import annotations

import argparse
import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.machine import machine
from embedserve.config import Limits
from embedserve.demo import SIZE, drawings, rasterise
from embedserve.encoder import Encoder
from embedserve.items import TEXT_WEIGHT
from embedserve.ranking import mix

WEIGHTS = (0.0, 0.25, TEXT_WEIGHT, 0.75, 1.0)
SEARCHES = ("red fruit", "a dog", "something to drink", "musical instrument")
BATCH = 32

Vectors = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="starter", help="'starter' or the folder of a bundle")
    encoder = Encoder.load(parser.parse_args().encoder)
    every = drawings()
    names = [one.name for one in every]
    pngs = [rasterise(one.svg) for one in every]
    images, captions = embed_images(encoder, pngs), embed_texts(encoder, names)

    aliased = np.array([i for i, one in enumerate(every) if one.aliases])
    aliases = [every[i].aliases[0] for i in aliased]
    apart = np.array([not words(alias) & words(names[i]) for i, alias in zip(aliased, aliases, strict=True)])
    by_alias = embed_texts(encoder, aliases)
    altered, order = embed_images(encoder, [alter(png) for png in pngs]), np.arange(len(every))
    searches = embed_texts(encoder, SEARCHES)

    print(machine())
    print(
        f"{encoder.name}: {len(every)} drawings; {len(aliases)} text queries, {apart.sum()} of them apart; "
        f"{len(altered)} image queries."
    )
    print("| weight | text R@1 | R@10 | apart R@10 | image R@1 | R@5 |")
    print("|---|---|---|---|---|---|")
    answers: list[str] = []
    for weight in WEIGHTS:
        gallery = captioned(images, captions, weight)
        text, image = ranks(by_alias, gallery, aliased), ranks(altered, gallery, order)
        cells = (share(text, 1), share(text, 10), share(text[apart], 10), share(image, 1), share(image, 5))
        print(f"| {weight:g} | " + " | ".join(cells) + " |")
        if weight in (0, TEXT_WEIGHT):
            for search, scores in zip(SEARCHES, searches @ gallery.T, strict=True):
                best = ", ".join(names[i] for i in np.argsort(-scores, kind="stable")[:5])
                answers.append(f"- {weight:g}, “{search}”: {best}")
    print("\n" + "\n".join(answers))


def captioned(images: Vectors, captions: Vectors, weight: float) -> Vectors:
    """What the collection stores of each image and its caption, float32 (n, dim)."""
    return np.stack([mix(np.stack(pair), (1, weight)) for pair in zip(images, captions, strict=True)])


def ranks(queries: Vectors, gallery: Vectors, truth: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each query how many others score at least as high as its answer."""
    scores = queries @ gallery.T
    right = scores[np.arange(len(truth)), truth]
    better: NDArray[np.intp] = (scores >= right[:, None]).sum(axis=1) - 1
    return better


def share(ranks: NDArray[np.intp], k: int) -> str:
    return f"{(ranks < k).mean():.3f}"


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def alter(png: bytes) -> bytes:
    """Turned by 12 degrees and cropped at every side, by different amounts."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").rotate(12, fillcolor=(255, 255, 255))
    left, top, right, bottom = (round(SIZE * part) for part in (0.06, 0.10, 0.94, 0.96))
    stream = io.BytesIO()
    picture.crop((left, top, right, bottom)).save(stream, "PNG")
    return stream.getvalue()


def embed_images(encoder: Encoder, pngs: list[bytes]) -> Vectors:
    parts = [pngs[i : i + BATCH] for i in range(0, len(pngs), BATCH)]
    limits = Limits()
    return np.concatenate(
        [encoder.embed_images([encoder.read_image(png, limits) for png in part]) for part in parts]
    )


def embed_texts(encoder: Encoder, texts: list[str] | tuple[str, ...]) -> Vectors:
    parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return np.concatenate([encoder.embed_texts(encoder.tokenize(part)) for part in parts])


if __name__ == "__main__":
    main()
