"""The file of a published checkpoint: a local copy, torch.hub's cache, or a download into it."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from embedserve.errors import BadRequest, InvalidField, NotFound
from training.published.table import Checkpoint

__all__ = ["locate"]


def locate(checkpoint: Checkpoint, weights: Path | None) -> Path:
    """The file to read.

    Args:
        checkpoint: Which.
        weights: A local copy; None: torch.hub's cache, and if it is not there a download.

    Raises:
        NotFound: `weights` is no file.
        InvalidField: It cannot be downloaded, or its authors' format has to be converted first.
        BadRequest: The download is not the file that its authors describe.
    """
    if weights is not None:
        path = weights.expanduser()
        if not path.is_file():
            raise NotFound(
                f"Weights '{weights}' not found; give the file of '{checkpoint.full_name}', which is "
                f"published at {checkpoint.release.page}.",
                param="weights",
            )
        return path
    if not checkpoint.url:
        raise InvalidField(
            f"'{checkpoint.full_name}' is published as a TensorFlow checkpoint at {checkpoint.release.page}. "
            f"Convert it with {checkpoint.release.converter} and give the result {_how(checkpoint)}.",
            param="weights",
        )
    cached = Path(torch.hub.get_dir()) / "checkpoints" / checkpoint.cached_as
    if not cached.is_file():
        _download(checkpoint, cached)
    return cached


def _download(checkpoint: Checkpoint, cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Processes that train together may all come here; each downloads to a name of its own.
    unproven = cached.with_name(f"{cached.name}.{os.getpid()}.unproven")
    try:
        torch.hub.download_url_to_file(checkpoint.url, str(unproven), progress=sys.stderr.isatty())
    except OSError as error:
        unproven.unlink(missing_ok=True)
        raise InvalidField(
            f"'{checkpoint.url}' could not be downloaded ({error}). Get the file '{checkpoint.file}' from "
            f"{checkpoint.release.page} on a machine with a network and give it {_how(checkpoint)}.",
            param="weights",
        ) from None
    digest = _md5(unproven) if checkpoint.md5 else ""
    if not digest.startswith(checkpoint.md5):
        unproven.unlink()
        raise BadRequest(
            f"What was downloaded from '{checkpoint.url}' has the md5 {digest}, not {checkpoint.md5}… as its "
            f"authors state at {checkpoint.release.page}; download it again.",
            param="weights",
        )
    unproven.replace(cached)


def _how(checkpoint: Checkpoint) -> str:
    return f"with --weights FILE, or for training as start=published:{checkpoint.full_name}@FILE"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
