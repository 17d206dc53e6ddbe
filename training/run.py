"""The folder of a run, and how a trained method comes back from it.

config.json      every setting with its origin, and what the data was
metrics.jsonl    one line for each log step
checkpoints/     last and best, exact enough to resume
views.png        what the method saw   curves.png   how it went   neighbours.png   what it learned
README.md        all of it in words
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedserve.errors import Conflict, InvalidField, NotFound
from training import checkpoint
from training.backbones import build
from training.checkpoint import Checkpoints
from training.durable import replacing
from training.method import Method
from training.methods import find
from training.seeding import seed_everything
from training.settings import Settings
from training.tuning import merge_low_rank

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "WEIGHTS",
    "Trained",
    "begin",
    "build_method",
    "check_same_run",
    "encoder_prefix",
    "locked",
    "open_run",
    "read_json",
    "remove_empty",
    "write_json",
]

CONFIG, CHECKPOINTS, LOCK = "config.json", "checkpoints", ".lock"
WEIGHTS = 0
"""Sets the random numbers of the first weights apart from others of the same seed."""

MAY_CHANGE = {
    "data", "backbone", "cache", "cache_folder", "workers", "device", "log_every", "knn_every",
    "checkpoint_every", "keep", "tensorboard", "wandb",
}  # fmt: skip
"""Settings without a say in what is learned. The fingerprint tells data apart, the weights a backbone."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A method with trained weights, in evaluation mode; low-rank additions are in their matrices."""

    method: Method[Any]
    settings: Settings
    step: int
    """Steps that it was trained for."""
    path: Path
    """The checkpoint."""
    folder: Path | None
    """The run's folder, when the checkpoint lies in one."""


def open_run(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """The method of a run (its best checkpoint, else its last) or of a checkpoint file.

    Raises:
        NotFound: There is nothing at `path`.
        InvalidField: It is no run or checkpoint of ours.
    """
    path = Path(path)
    if not path.exists():
        raise NotFound(f"There is no run or checkpoint '{path}'.", param="run")
    file = path
    if path.is_dir():
        checkpoints = Checkpoints(path / CHECKPOINTS, keep=1)
        found = checkpoints.best() or checkpoints.latest()
        if found is None:
            raise InvalidField(
                f"'{path}' holds no checkpoint; train there first, or name a run.", param="run"
            )
        file = found
    state = checkpoint.load(file)
    if "settings" not in state or "model" not in state:
        raise InvalidField(f"'{file}' is not a checkpoint of `embedserve train`.", param="run")
    settings = Settings.from_json(state["settings"])
    method = build_method(settings, start=str(file), carried=state.get("carried"))
    method.load_state_dict(state["model"])
    merge_low_rank(method)
    folder = file.parent.parent if (file.parent.parent / CONFIG).exists() else None
    return Trained(method.to(device).eval(), settings, int(state["step"]), file, folder)


def build_method(settings: Settings, *, start: str, carried: Mapping[str, Any] | None = None) -> Method[Any]:
    """The method with the backbone that the settings name, in training mode on the CPU.

    Args:
        start: Weights that the backbone starts from, as `training.backbones.build` takes them.
        carried: What the checkpoint has of `Method.carried`; None for a new run.
    """
    kind = find(settings.config.method)
    backbone = build(
        settings.config.backbone, settings.config.size, start=start, **kind.backbone_options(settings.facts)
    )
    if carried:
        return kind(backbone, settings.options, settings.facts, carried=carried)  # type: ignore[call-arg]
    return kind(backbone, settings.options, settings.facts)


def begin(settings: Settings) -> Method[Any]:
    """The method as the run starts with it at step 0, from its settings; the same bits every time."""
    seed_everything(settings.config.seed, WEIGHTS)
    method = build_method(settings, start=settings.config.start)
    if settings.config.start:
        method.begin_from(settings.config.start)
    return method


def encoder_prefix(method: Method[Any]) -> str:
    """What the names of the encoder's weights begin with among all of the method's: 'backbone.'."""
    encoder: nn.Module = method.encoder
    return next(f"{name}." for name, module in method.named_modules() if module is encoder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into the same folder.

    Raises:
        Conflict: Another process does.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(
                f"Another process is training into '{folder}'; wait for it, or give another --out.",
                param="out",
            ) from None
        yield


def remove_empty(folder: Path) -> None:
    """Removes the folder of a run that was refused before it wrote anything."""
    inside = [*folder.iterdir(), *folder.glob(f"{CHECKPOINTS}/*")]
    if {one.name for one in inside} <= {LOCK, CHECKPOINTS}:
        (folder / LOCK).unlink(missing_ok=True)
        for one in (folder / CHECKPOINTS, folder):
            with contextlib.suppress(OSError):
                one.rmdir()


def check_same_run(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises Conflict when the run in `folder` cannot go on as asked, saying what differs.

    Args:
        earlier: Its config.json.
        now: What config.json would be now.
    """
    if earlier["config"]["method"] != now["config"]["method"]:
        raise _conflict(folder, f"of {earlier['config']['method']}, not {now['config']['method']}")
    if earlier["world_size"] != now["world_size"]:
        raise Conflict(
            f"The run in '{folder}' was made by {earlier['world_size']} processes; now there are "
            f"{now['world_size']}. Go on with `torchrun --nproc-per-node {earlier['world_size']}` "
            "(or --nnodes), or give another --out.",
            param="out",
        )
    if earlier["data"]["fingerprint"] != now["data"]["fingerprint"]:
        raise _conflict(
            folder,
            f"on other data: {earlier['data']['images']} images then, {now['data']['images']} now, "
            "or files that changed",
        )
    for section in ("config", "recipe", "augmentation", "options"):
        for key, value in now[section].items():
            then = earlier[section].get(key)
            if then != value and key not in MAY_CHANGE:
                raise _conflict(folder, f"with {key}={then}, not {value}")


def _conflict(folder: Path, difference: str) -> Conflict:
    return Conflict(
        f"'{folder}' holds a run {difference}. Repeat its command to go on, or give another --out; "
        f"to start from its weights, --set start={folder}.",
        param="out",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises InvalidField when it is no JSON object."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidField(f"'{path}' is damaged ({error}); give another --out.", param="out") from None
    return dict(content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all. Raises EmbedServeError when it cannot be written."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
