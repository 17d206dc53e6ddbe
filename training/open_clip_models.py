"""Models of open_clip: built, and filled from its checkpoints. `training.backbones` and `training.text` take
their sides."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn

from embedserve.errors import EmbedServeError, InvalidField, NotFound, closest
from training import torchvision_ops

__all__ = ["PREFIX", "create", "file_of", "library", "load", "one_line"]

PREFIX = "open_clip:"
"""What the name of a backbone or text tower begins with that is one side of such a model."""


def create(architecture: str, *, param: str = "backbone", **options: Any) -> Any:
    """A model of open_clip with random weights, in training mode.

    Args:
        architecture: open_clip's name, such as 'ViT-B-32'.
        param: What errors say is wrong.
        options: Of `open_clip.create_model`, such as `force_image_size`.

    Raises:
        InvalidField: There is no such architecture, or it cannot be built so.
    """
    open_clip = library()
    if architecture not in open_clip.list_models():
        raise InvalidField(
            f"open_clip has no architecture '{architecture}'; "
            f"{closest(architecture, open_clip.list_models())}",
            param=param,
        )
    try:
        with _no_warning():
            return open_clip.create_model(architecture, load_weights=False, pretrained_text=False, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise InvalidField(
            f"open_clip cannot build '{architecture}' ({one_line(error)}).", param=param
        ) from None


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """open_clip warns of random weights, which are what was asked for."""
    root, silent = logging.getLogger(), lambda record: False
    root.addFilter(silent)
    try:
        yield
    finally:
        root.removeFilter(silent)


def file_of(start: str, architecture: str, *, param: str = "start") -> Path:
    """A checkpoint that exists, or one of the tags that open_clip lists for the architecture, fetched.

    Raises:
        NotFound: There is neither such a file nor such a tag.
        EmbedServeError: It cannot be fetched.
    """
    path = Path(start).expanduser()
    if path.exists():
        return path
    open_clip = library()
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if start not in known:
        raise NotFound(
            f"'{start}' is neither a file nor weights that open_clip has of '{architecture}'; "
            f"{closest(start, known)}",
            param=param,
        )
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, start)))
    except Exception as error:
        raise EmbedServeError(
            f"open_clip could not fetch '{architecture}/{start}' ({one_line(error)}). Connect to the "
            "network, or give the file of the weights as start.",
            code="not_fetched",
        ) from error


def load(model: nn.Module, start: str, architecture: str, *, param: str = "start") -> None:
    """Loads a checkpoint of open_clip, resampling positions where the image size differs.

    Args:
        model: From `create`.
        start: As `file_of` takes it.
        architecture: open_clip's name.
        param: What errors say is wrong.

    Raises:
        NotFound, EmbedServeError: As `file_of`.
        InvalidField: The weights do not fit.
    """
    path = file_of(start, architecture, param=param)
    try:
        library().load_checkpoint(model, str(path))
    except Exception as error:  # noqa: BLE001 -- what torch, safetensors and open_clip raise shares no base
        raise InvalidField(
            f"'{start}' does not fit open_clip's '{architecture}' ({one_line(error)}). Give a checkpoint of "
            "that architecture, saved by open_clip.",
            param=param,
        ) from None


def library() -> Any:
    """The package `open_clip`, imported when it is needed."""
    torchvision_ops.register()
    import open_clip

    return cast(Any, open_clip)


def one_line(error: BaseException) -> str:
    """An error of the library's as part of a sentence."""
    text = " ".join(str(error).split())
    return f"{text[:200]}…" if len(text) > 200 else text.rstrip(".")
