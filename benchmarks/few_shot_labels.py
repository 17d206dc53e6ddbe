"""How often `embedserve train probe` is right with few labelled images, beside the k-NN vote and zero-shot.

    python -m benchmarks.few_shot_labels /usr/share/openclipart/png

Twelve folders of Open Clip Art are the labels (Debian package openclipart-png, public domain). Of each, 20
images drawn at random are judged, and 5 or 20 others are learned from. Zero-shot alone reads the names.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedserve.client import Client, Upload
from embedserve.config import ServeConfig
from training.probe.saving import train_probe

LABELS = (
    "animals", "buildings", "decorations", "education", "electronics", "food", "office", "people", "plants",
    "tools", "transportation", "recreation",
)  # fmt: skip
JUDGED, FEW = 20, (5, 20)
MAX_BYTES = 500_000


def draw(root: Path) -> tuple[list[Path], dict[int, list[Path]]]:
    """Images to judge, and those to learn from by how many there are of each label."""
    generator = random.Random(0)
    judged: list[Path] = []
    learned: dict[int, list[Path]] = {few: [] for few in FEW}
    for label in LABELS:
        files = [file for file in sorted((root / label).rglob("*.png")) if file.stat().st_size < MAX_BYTES]
        generator.shuffle(files)
        judged += files[:JUDGED]
        for few in FEW:
            learned[few] += files[JUDGED : JUDGED + few]
    return judged, learned


async def measure(root: Path) -> None:
    judged, learned = draw(root)
    truth = [label_of(root, file) for file in judged]

    def show(what: str, results: Sequence[dict[str, Any]]) -> None:
        right = sum(one["labels"][0]["label"] == label for one, label in zip(results, truth, strict=True))
        print(f"{what:28}{right / len(truth):.1%} of {len(truth)}")

    with tempfile.TemporaryDirectory() as data:
        async with Client.local(ServeConfig(data=Path(data))) as client:
            for few, files in learned.items():
                name = f"few-{few}"
                await client.create_collection(name)
                uploads = [
                    Upload(id=str(file), image=file.read_bytes(), metadata={"label": label_of(root, file)})
                    for file in files
                ]
                for start in range(0, len(uploads), 32):
                    await client.upload(name, uploads[start : start + 32])
                for kind in ("prototypes", "linear"):
                    await train_probe(client, name, label="label", save=kind, kind=kind)
                    answer = await client.classify(judged, label_set=kind, top=1)
                    show(f"{few} each, {kind}", answer["results"])
                for k in (1, 5, 10):
                    answer = await client.vote(name, "label", images=judged, k=k)
                    show(f"{few} each, vote of {k}", answer["results"])
            answer = await client.classify(judged, labels=LABELS, top=1)
            show("zero-shot", answer["results"])


def label_of(root: Path, file: Path) -> str:
    return file.relative_to(root).parts[0]


if __name__ == "__main__":
    asyncio.run(measure(Path(sys.argv[1])))
