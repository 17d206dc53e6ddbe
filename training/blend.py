"""Between the weights that a run began with and those that it learned.

Fine-tuning forgets: what the start knew of images unlike the run's gets worse. Weights on the straight line
between the two, (1 − alpha) · start + alpha · tuned, often keep most of it at little cost (WiSE-FT: Wortsman
et al. 2022, "Robust fine-tuning of zero-shot models").

The start is not stored: the run's settings build it again, and the digest in config.json proves that it is
the same bit by bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedserve.errors import Conflict, InvalidField
from training import checkpoint
from training.method import Method
from training.run import CONFIG, begin, open_run, read_json
from training.settings import Settings

__all__ = ["BEGUN", "between", "blend", "digest"]

BEGUN = "begun"
"""In config.json: the digest of the weights at step 0."""
STATISTICS = ("running_mean", "running_var")
"""Buffers that are blended like weights; others, such as queues, are those of the run."""


def digest(method: Method[Any]) -> str:
    """sha256 (hex) of all weights and buffers, names included."""
    found = hashlib.sha256()
    for name, one in sorted(method.state_dict().items()):
        found.update(name.encode())
        found.update(one.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def blend(source: Path, alpha: float, out: Path) -> Path:
    """Writes the checkpoint between the start of a run and what it learned, and returns its path.

    Args:
        source: The run's folder (its best checkpoint, else its last), or a checkpoint in it.
        alpha: 0 for the weights of the start to 1 for those of the run.
        out: A file in a folder that exists.

    Raises:
        NotFound: No run, or the weights that it began with are gone.
        InvalidField: alpha is outside 0..1, the run began at random, or is of a version that kept no digest.
        Conflict: The weights that it began with have changed; or `out` exists.
    """
    if not 0 <= alpha <= 1:
        raise InvalidField(f"alpha={alpha:g}; it is 0 (the start) to 1 (the run).", param="alpha")
    if out.exists():
        raise Conflict(f"'{out}' exists; give another --out, or remove it.", param="out")
    trained = open_run(source)
    begun = read_json(trained.folder / CONFIG).get(BEGUN) if trained.folder else None
    if not trained.settings.config.start:
        raise InvalidField(
            f"'{source}' began with random weights, so there is nothing to go back to. Blend runs with a "
            "'start'.",
            param="run",
        )
    if begun is None:
        raise InvalidField(
            f"Beside '{source}' no config.json says what the run began with ('{BEGUN}'); give a run's "
            "folder, or train it anew.",
            param="run",
        )
    start = begin(trained.settings)
    if digest(start) != begun:
        raise Conflict(
            f"'{trained.settings.config.start}' no longer holds the weights that the run began with; put the "
            "file back.",
            param="start",
        )
    state = checkpoint.load(trained.path)
    kept = {"method", "settings", "step", "encoder_prefix", "backbone", "carried"}
    content = {key: value for key, value in state.items() if key in kept}
    content["model"] = between(start, state["model"], alpha, random=_random(start, trained.settings))
    content["blend"] = {"alpha": alpha, "start": trained.settings.config.start}
    checkpoint.save(out, content)
    return out


def between(
    start: Method[Any], tuned: Mapping[str, Tensor], alpha: float, *, random: frozenset[str]
) -> dict[str, Tensor]:
    """The weights between those of `start` and the `tuned` ones.

    Those named in `random` began at random and are the tuned ones whatever alpha is: there is no knowledge to
    go back to. So LoRA's first factor stays, and as the second begins with 0, the merged weights lie on the
    line. Momentum encoders lie on theirs; the scale of CLIP is blended as its logarithm, in which it learns.
    """
    begun, weights = start.state_dict(), {name for name, _ in start.named_parameters()}
    return {
        name: one
        if name in random or not (name in weights or name.endswith(STATISTICS))
        else torch.lerp(begun[name].double(), one.double(), alpha).to(one.dtype)
        for name, one in tuned.items()
    }


def _random(start: Method[Any], settings: Settings) -> frozenset[str]:
    """Names of what another seed would have begun with other numbers."""
    config = replace(settings.config, seed=settings.config.seed + 1)
    other = begin(replace(settings, config=config)).state_dict()
    return frozenset(name for name, one in start.state_dict().items() if not torch.equal(one, other[name]))
