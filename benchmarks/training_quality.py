"""What each method learns on Fashion-MNIST in equally many epochs, beside lightly's own.

    python -m benchmarks.training_quality                        # a GPU: ResNet-18, all images, 20 epochs
    python -m benchmarks.training_quality --time-limit 580       # the same in parts: repeat it until it ends
    python -m benchmarks.training_quality --images 500 --test-images 200 --methods simclr --peers simclr

Each method is trained by `training.train` with its own defaults for such images, lightly's by
`benchmarks.peers` with the same network, optimiser, batch, epochs and precision; all features are then judged
alike on the test images, whose labels nothing is chosen by:

- *k-NN*: the weighted vote of the 20 nearest training images.
- *linear*: a linear layer on frozen features.
- *1%*, *10%*: the same with so many of the labels, mean of three draws.

Beside them stand raw pixels and networks with random weights. DINOv2 hides patches, so it trains a vision
transformer; the others train the same ResNet. On a CPU the defaults are a sample of images and few epochs,
which show that everything works and not what methods are worth. Minutes are those of training; GB are what
torch allocated on the GPU at most, decoded images included, and on a CPU the process.

Everything is kept in --out, each method on its own; a method that is done is not measured again. Debian's
package dataset-fashion-mnist has the images; any folder of MNIST's form does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.jobs import LEAST_LIMIT_S, Jobs, Stopped, Usage, stop_requested
from benchmarks.machine import machine
from benchmarks.peers import PEERS, require_lightly, train_peer
from training.backbones import build
from training.checkpoint import Checkpoints
from training.data import Source, open_source
from training.data.idx import read_idx
from training.evaluate.encoder import Embedded, EvaluationEncoder, NetworkEncoder, PixelEncoder, RunEncoder
from training.evaluate.knn import KnnSettings, evaluate_knn
from training.evaluate.linear import LinearSettings, evaluate_linear
from training.evaluate.report import Progress, silent
from training.evaluate.semi_supervised import SemiSettings, evaluate_semi_supervised
from training.methods import METHODS
from training.prepare import prepare
from training.run import CHECKPOINTS, write_json
from training.seeding import seed_everything
from training.train import train

DATA = Path("/usr/share/datasets/fashion-mnist")
COMPARED = ("simclr", "byol", "barlow_twins", "dino")
NEEDS_TRANSFORMER = {"dinov2"}
PEER, RANDOM, PIXELS = "lightly-", "random-", "raw-pixels"
MOST_BEHIND = 0.005
"""How far below lightly's a method of ours may come out."""
MEASURES = {"knn": "k-NN", "linear": "linear", "semi_1": "1% labels", "semi_10": "10% labels"}

DECIDING = ("knn", "linear")
"""What a method of ours must not be behind in; few labels are shown beside them, and vary more."""
KEPT = ("images", "test_images", "size", "epochs", "batch", "backbone", "transformer", "device", "seed")
"""Arguments that decide the figures."""

Result = Mapping[str, Any]


def main() -> None:
    """Prints the table as Markdown, and what of the aims holds."""
    arguments = _arguments()
    jobs = Jobs(Path(arguments.out), "benchmarks.training_quality")
    if arguments.only:
        jobs.execute(arguments.only, lambda: measure(arguments.only, jobs, arguments))
        return
    version = require_lightly() if arguments.peers else ""
    jobs.require({key: getattr(arguments, key) for key in KEPT})
    sample(arguments, jobs)
    names = job_names(arguments)
    ended = jobs.run(names, time_limit=arguments.time_limit)
    results = {name: found for name in names if (found := jobs.result(name)) is not None}
    report = [
        f"{machine()}, torch {torch.__version__}" + (f", lightly {version}" if version else ""),
        f"{_device_name(arguments.device)}; {arguments.images:,} images to learn from, "
        f"{arguments.test_images:,} to be judged on, {arguments.size} px, {arguments.epochs} epochs, "
        f"batch {arguments.batch}, seed {arguments.seed}",
        "",
        *table(results),
        "",
        *(f"- {line}" for line in verdicts(results, arguments.test_images)),
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
    add("--peers", default=",".join(COMPARED), help=f"methods of lightly's, of {','.join(PEERS)}; '': none")
    add("--data", default=str(DATA), help="folder with train-images-idx3-ubyte.gz and so on")
    add("--images", type=int, default=60_000 if on_gpu else 2_000, help="training images, drawn")
    add("--test-images", type=int, default=10_000 if on_gpu else 1_000, help="test images, drawn")
    add("--size", type=int, default=28, help="pixels of a side: 28, as they are, or 32")
    add("--epochs", type=int, default=20 if on_gpu else 2)
    add("--batch", type=int, default=512 if on_gpu else 64, help="images of a step")
    add("--backbone", default="resnet18")
    add("--transformer", default="vit_tiny/4", help=f"the network of {', '.join(NEEDS_TRANSFORMER)}")
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--seed", type=int, default=0, help="of weights, order and views; the images stay the same")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="lightly's processes")
    add("--out", default="runs/training-quality", help="folder of results, and of what is not finished")
    add(
        "--time-limit",
        type=float,
        default=0,
        help="seconds after which it stops, to be gone on with; 0: none",
    )
    add("--json", default="", help="write the table and the figures to this file")
    add("--only", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in _split(arguments.methods):
        if name not in METHODS:
            parser.error(f"--methods {name}: choose of {', '.join(METHODS)}")
    for name in _split(arguments.peers):
        if name not in PEERS:
            parser.error(f"--peers {name}: choose of {', '.join(PEERS)}")
    if 0 < arguments.time_limit < LEAST_LIMIT_S:
        parser.error(f"--time-limit {arguments.time_limit:g}: give {LEAST_LIMIT_S:g} seconds or more")
    if not Path(arguments.data).is_dir():
        parser.error(f"--data {arguments.data}: there is no such folder; install dataset-fashion-mnist")
    return arguments


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def job_names(arguments: argparse.Namespace) -> list[str]:
    """Quick ones first, then ours with lightly's right behind."""
    methods, peers = _split(arguments.methods), _split(arguments.peers)
    networks = dict.fromkeys(network_of(name, arguments) for name in methods)
    names = [PIXELS, *map(random_name, networks)]
    for name in methods:
        names += [name, *([PEER + name] if name in peers else [])]
    return names + [PEER + name for name in peers if name not in methods]


def network_of(method: str, arguments: argparse.Namespace) -> str:
    """The name of the network that a method trains."""
    name: str = arguments.transformer if method in NEEDS_TRANSFORMER else arguments.backbone
    return name


def random_name(network: str) -> str:
    """The job that judges a network with random weights."""
    return RANDOM + network.replace("/", "-")


def sample(arguments: argparse.Namespace, jobs: Jobs) -> None:
    """Draws the images and writes them as MNIST's files, once."""
    folder = jobs.out / "data"
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(arguments.data)
    for part, wanted in (("train", arguments.images), ("t10k", arguments.test_images)):
        parts = []
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            file = data / f"{part}-{kind}-ubyte"
            parts.append(read_idx(file if file.exists() else file.with_name(f"{file.name}.gz"), dimensions))
        if wanted > len(parts[0]):
            raise SystemExit(f"'{data}' has {len(parts[0]):,} images of {part}; {wanted:,} were asked for.")
        rows = np.sort(np.random.default_rng(0).permutation(len(parts[0]))[:wanted])
        for kind, values in zip(("images-idx3", "labels-idx1"), parts, strict=True):
            chosen = values[rows]
            header = bytes((0, 0, 8, chosen.ndim)) + b"".join(n.to_bytes(4, "big") for n in chosen.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + chosen.tobytes())
    (folder / "done").touch()


# --------------------------------------------------------------------------------------------- one job


def measure(name: str, jobs: Jobs, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains what the job names, where there is something to train, and judges its features.

    Raises:
        Stopped: It was asked to stop; the same call goes on.
    """
    source = open_source(jobs.out / "data")
    device = torch.device(arguments.device)
    if name == PIXELS or name.startswith(RANDOM):
        networks = {random_name(one): one for one in (arguments.backbone, arguments.transformer)}
        seed_everything(arguments.seed)
        untrained = encoder_of(build(networks.get(name, arguments.backbone), arguments.size), jobs, arguments)
        encoder: EvaluationEncoder = PixelEncoder(untrained) if name == PIXELS else untrained
        top1 = evaluate_knn(encoder, source, KnnSettings()).top1
        return {"network": networks.get(name, "–"), "knn": top1}
    work, method = jobs.work(name), name.removeprefix(PEER)
    usage = Usage(work, device)
    given = {
        "backbone": network_of(method, arguments),
        "size": str(arguments.size),
        "stored_size": str(arguments.size),
        "batch_size": str(arguments.batch),
        "epochs": str(arguments.epochs),
        "holdout": "0",
        "seed": str(arguments.seed),
        "device": arguments.device,
        "knn_every": str(arguments.epochs),
        "keep": "1",
        "cache_folder": str(jobs.out / "cache"),
    }
    with usage.counted():
        train_one = _peer if name.startswith(PEER) else _ours
        encoder = train_one(method, jobs, given, work, arguments)
    used = usage.read()
    return {
        "network": given["backbone"],
        **judge(Once(encoder, source)),
        "minutes": used["seconds"] / 60,
        "gb": used["gb"],
    }


def _ours(
    method: str, jobs: Jobs, given: dict[str, str], work: Path, arguments: argparse.Namespace
) -> EvaluationEncoder:
    if not train(method, str(jobs.out / "data"), work / "run", given).finished:
        raise Stopped
    # The last checkpoint, whatever the best one was by the labels of test images.
    last = Checkpoints(work / "run" / CHECKPOINTS, keep=1).latest()
    return RunEncoder(str(last), arguments.device)


def _peer(
    method: str, jobs: Jobs, given: dict[str, str], work: Path, arguments: argparse.Namespace
) -> EvaluationEncoder:
    device = torch.device(arguments.device)
    prepared = prepare(method, str(jobs.out / "data"), given, device, progress=silent)
    pixels = prepared.pixels.batch(prepared.train).cpu().numpy()
    with stop_requested() as stopped:
        peer, finished = train_peer(
            prepared.settings, pixels, device, work / "state.pt", workers=arguments.workers, stopped=stopped
        )
    if not finished:
        raise Stopped
    return encoder_of(peer.encoder, jobs, arguments)


def encoder_of(backbone: Any, jobs: Jobs, arguments: argparse.Namespace) -> NetworkEncoder:
    """A network as evaluations see it, with the images that training sees."""
    return NetworkEncoder(
        "network",
        backbone,
        size=arguments.size,
        stored_size=arguments.size,
        device=arguments.device,
        cache=jobs.out / "cache",
    )


@dataclass
class Once:
    """An encoder and a source that is embedded a single time for all evaluations."""

    encoder: EvaluationEncoder
    source: Source
    embedded: Embedded | None = None

    def __post_init__(self) -> None:
        self.name, self.dim, self.device = self.encoder.name, self.encoder.dim, self.encoder.device
        self.holdout, self.seed = self.encoder.holdout, self.encoder.seed

    def embed(self, source: Source, *, progress: Progress = silent, cached: bool = True) -> Embedded:
        """As `EvaluationEncoder.embed`, of the one source."""
        if self.embedded is None:
            self.embedded = self.encoder.embed(source, progress=progress, cached=cached)
        return self.embedded


def judge(encoder: Once) -> dict[str, float]:
    """Accuracies on the test images, 0..1."""
    few = evaluate_semi_supervised(encoder, encoder.source, SemiSettings()).shares
    return {
        "knn": evaluate_knn(encoder, encoder.source, KnnSettings()).top1,
        "linear": evaluate_linear(encoder, encoder.source, LinearSettings()).top1,
        **{f"semi_{round(100 * one.share)}": one.linear.mean for one in few},
    }


# ---------------------------------------------------------------------------------------------- report


def table(results: Mapping[str, Result]) -> list[str]:
    """A Markdown table with a row for each result."""
    header = ["features of", "network", *MEASURES.values(), "minutes", "GB"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for name, found in results.items():
        cells = [shown(name), found["network"]]
        cells += [f"{found[key]:.1%}" if key in found else "–" for key in MEASURES]
        cells += [f"{found[key]:.1f}" if key in found else "–" for key in ("minutes", "gb")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def shown(name: str) -> str:
    """A job's name for people."""
    if name.startswith(PEER):
        return f"lightly's {name.removeprefix(PEER)}"
    return {PIXELS: "raw pixels"}.get(name, "random weights" if name.startswith(RANDOM) else name)


def verdicts(results: Mapping[str, Result], test_images: int) -> list[str]:
    """Which of the aims hold, each in a sentence: above what learned nothing, and not below lightly.

    Args:
        test_images: How many there are, for how far chance may move a difference.
    """
    ours = {name: found for name, found in results.items() if name in METHODS}
    lines = [
        _above("raw pixels", ours, {name: results.get(PIXELS) for name in ours}),
        _above(
            "random weights",
            ours,
            {name: results.get(random_name(found["network"])) for name, found in ours.items()},
        ),
    ]
    for name, found in ours.items():
        peer = results.get(PEER + name)
        if peer is None:
            continue
        ahead = {words: found[key] - peer[key] for key, words in MEASURES.items()}
        holds = all(ahead[MEASURES[key]] >= -MOST_BEHIND for key in DECIDING)
        lines.append(
            f"{name} at most {100 * MOST_BEHIND:.1f} points below lightly's: "
            + ("holds" if holds else "DOES NOT HOLD")
            + " ("
            + ", ".join(f"{words} {100 * one:+.1f}" for words, one in ahead.items())
            + ")"
        )
    error = (2 * 0.8 * 0.2 / test_images) ** 0.5
    lines.append(
        f"one standard error of a difference between two figures near 80%: {100 * error:.1f} points, for "
        f"{test_images:,} test images; other seeds move it as well"
    )
    return lines


def _above(what: str, ours: Mapping[str, Result], others: Mapping[str, Result | None]) -> str:
    compared = {name: found["knn"] - other["knn"] for name, found in ours.items() if (other := others[name])}
    below: Sequence[str] = [f"{name} {100 * by:+.1f}" for name, by in compared.items() if by <= 0]
    said = f"k-NN above {what}: {len(compared) - len(below)} of {len(compared)} methods"
    return said + (f"; NOT {', '.join(below)}" if below else "")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


if __name__ == "__main__":
    main()
