"""Whether training on one's own pictures makes their neighbours better: Open Clip Art, before and after.

    python -m benchmarks.training_clipart                        # a GPU: all pictures, 128 pixels, 50 epochs
    python -m benchmarks.training_clipart --time-limit 580       # the same in parts: repeat it until it ends
    python -m benchmarks.training_clipart --images 600 --size 64 --epochs 5         # two cores, some minutes

SimCLR and DINO train the starter's image network (EfficientNet-Lite0), from the starter's weights and from
random ones, without labels. A fifth of the pictures is held out; the share of them whose category (the top
folder) is named by the weighted vote of their 20 nearest neighbours among the others is compared with the
same before training. The starter saw photographs, and pictures of 224 pixels.

The pictures are those of `training.starter.clipart`: each different one once, without the stars; and without
the folder `unsorted`, which is no category. They are decoded once, whole and on white, into --out/pictures,
which another machine can take as --data.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.jobs import LEAST_LIMIT_S, Jobs, Stopped, Usage
from benchmarks.machine import machine
from embedserve.bundle import Preprocessing
from training.checkpoint import Checkpoints
from training.data import Source
from training.evaluate.encoder import EvaluationEncoder, NetworkEncoder, PixelEncoder, RunEncoder
from training.evaluate.knn import NEIGHBOURS, TEMPERATURE, knn_votes
from training.evaluate.labels import labelled_task
from training.evaluate.report import silent
from training.prepare import prepare
from training.run import CHECKPOINTS, build_method, write_json
from training.seeding import seed_everything
from training.settings import parse_assignments
from training.starter import clipart
from training.train import WEIGHTS, train

METHODS = ("simclr", "dino")
NETWORK = "tf_efficientnet_lite0"
STARTS = {"starter": "starter", "scratch": ""}
"""What is shown → `start` of training."""
HOLDOUT = 0.2
NO_CATEGORY = "unsorted/"
KEPT = ("images", "size", "epochs", "batch", "device", "seed", "set")
"""Arguments that decide the figures."""

Result = Mapping[str, Any]


def main() -> None:
    """Prints the table as Markdown."""
    arguments = _arguments()
    jobs = Jobs(Path(arguments.out), "benchmarks.training_clipart")
    if arguments.only:
        jobs.execute(arguments.only, lambda: measure(arguments.only, jobs, arguments))
        return
    jobs.require({key: getattr(arguments, key) for key in KEPT})
    count = draw_pictures(Path(arguments.data), jobs.out / "pictures", arguments)
    names = [f"{method}-{start}" for method in arguments.methods.split(",") for start in STARTS]
    ended = jobs.run(names, time_limit=arguments.time_limit)
    results = {name: found for name in names if (found := jobs.result(name)) is not None}
    report = [
        f"{machine()}, torch {torch.__version__}",
        f"{torch.cuda.get_device_name() if arguments.device.startswith('cuda') else 'CPU'}; {count:,} "
        f"pictures, {arguments.size} px, {arguments.epochs} epochs, batch {arguments.batch}, seed "
        f"{arguments.seed}{''.join(f', {one}' for one in arguments.set)}",
        "",
        *table(results),
    ]
    print("\n" + "\n".join(report))
    if arguments.json:
        write_json(Path(arguments.json), {"report": report, "results": results})
    if not ended:
        print(f"\n{len(results)} of {len(names)} are measured; give the same command again to go on.")


def _arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", default=",".join(METHODS), help="names with commas between them")
    add("--data", default=str(clipart.DEFAULT_FOLDER), help="the folder of openclipart-png")
    add("--images", type=int, default=0 if on_gpu else 600, help="pictures that are drawn; 0: all")
    add("--size", type=int, default=128 if on_gpu else 64, help="pixels of a side")
    add("--epochs", type=int, default=50 if on_gpu else 5)
    add("--batch", type=int, default=256 if on_gpu else 64, help="images of a step")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--seed", type=int, default=0)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of training, as its own")
    add("--out", default="runs/training-clipart", help="folder of results, and of what is not finished")
    add(
        "--time-limit",
        type=float,
        default=0,
        help="seconds after which it stops, to be gone on with; 0: none",
    )
    add("--json", default="", help="write the table and the figures to this file")
    add("--only", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if 0 < arguments.time_limit < LEAST_LIMIT_S:
        parser.error(f"--time-limit {arguments.time_limit:g}: give {LEAST_LIMIT_S:g} seconds or more")
    return arguments


def draw_pictures(data: Path, folder: Path, arguments: argparse.Namespace) -> int:
    """Writes the pictures as squares of `size`, in folders by category, once. Returns how many there are."""
    if not (folder / "done").exists():
        names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.*"))
        names = [one for one in names if Path(one).suffix in {".png", ".webp"}]
        names = [one for one in names if not one.startswith((clipart.LEFT_OUT, NO_CATEGORY))]
        if arguments.images:
            names = random.Random(arguments.seed).sample(names, min(arguments.images, len(names)))
        size = arguments.size
        spec = Preprocessing(height=size, width=size, resize="longest", resize_to=size)
        with tempfile.TemporaryDirectory() as chosen:
            for name in names:
                link = Path(chosen, name).with_suffix(".png")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((data / name).absolute())
            for name, pixels in clipart.pictures(Path(chosen), spec):
                file = (folder / name).with_suffix(".webp")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file, lossless=True)
        (folder / "done").touch()
    return sum(1 for _ in folder.rglob("*.webp"))


def measure(name: str, jobs: Jobs, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method from one start: what k-NN says before and after.

    Raises:
        Stopped: It was asked to stop; the same call goes on.
    """
    method, _, start = name.partition("-")
    work, device, data = jobs.work(name), torch.device(arguments.device), str(jobs.out / "pictures")
    given = {
        "backbone": NETWORK,
        "start": STARTS[start],
        "size": str(arguments.size),
        "stored_size": str(arguments.size),
        "batch_size": str(arguments.batch),
        "epochs": str(arguments.epochs),
        "holdout": str(HOLDOUT),
        "seed": str(arguments.seed),
        "device": arguments.device,
        "keep": "1",
        "cache_folder": str(jobs.out / "cache"),
        **parse_assignments(arguments.set),
    }
    prepared = prepare(method, data, given, device, progress=silent)
    source, config = prepared.pixels.source, prepared.settings.config
    seed_everything(config.seed, WEIGHTS)  # the weights that training starts from
    before = NetworkEncoder(
        "before",
        build_method(prepared.settings, start=config.start).encoder,
        size=config.size,
        stored_size=config.stored_size,
        device=device,
        holdout=config.holdout,
        seed=config.seed,
        cache=jobs.out / "cache",
    )
    right = {"pixels": judge(PixelEncoder(before), source), "before": judge(before, source)}
    usage = Usage(work, device)
    with usage.counted():
        if not train(method, data, work / "run", given).finished:
            raise Stopped
    # The last checkpoint, not the one that was best on the pictures that are judged on.
    last = Checkpoints(work / "run" / CHECKPOINTS, keep=1).latest()
    right["after"] = judge(RunEncoder(str(last), device), source)
    change = right["after"].double() - right["before"].double()
    return {
        **{key: float(value.double().mean()) for key, value in right.items()},
        "change": float(change.mean()),
        "error": float(change.std() / len(change) ** 0.5),
        "train": len(prepared.train),
        "test": len(change),
        "classes": len(source.class_names),
        "minutes": usage.read()["seconds"] / 60,
    }


def judge(encoder: EvaluationEncoder, source: Source) -> Tensor:
    """Which of the held-out pictures have their category named by their neighbours: bool [n] on the CPU."""
    task = labelled_task(encoder, source, evaluation="knn")
    votes, _ = knn_votes(
        task.train,
        task.train_labels,
        task.test,
        classes=task.classes,
        k=min(NEIGHBOURS, len(task.train) // 2),
        temperature=TEMPERATURE,
    )
    return (votes.argmax(1) == task.test_labels).cpu()


def table(results: Mapping[str, Result]) -> list[str]:
    """A Markdown table with a row for each result, and what it was measured on."""
    if not results:
        return ["nothing is measured yet"]
    one = next(iter(results.values()))
    lines = [
        f"{one['test']:,} held-out pictures of {one['classes']} categories, {one['train']:,} to train on and "
        f"to find neighbours in. Raw pixels: k-NN {one['pixels']:.1%}. ± is one standard error.",
        "",
        "| method | starts from | k-NN before | after | change, points | minutes | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, found in results.items():
        method, _, start = name.partition("-")
        change = f"{100 * found['change']:+.1f} ± {100 * found['error']:.1f}"
        rose = "rose" if found["change"] > 0 else "DID NOT RISE"
        lines.append(
            f"| {method} | {start} | {found['before']:.1%} | {found['after']:.1%} | {change} | "
            f"{found['minutes']:.1f} | {rose} |"
        )
    return lines


if __name__ == "__main__":
    main()
