"""Small data sets, and a process to do something dangerous in."""

from __future__ import annotations

import io
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NOBODY = 65534
"""The user who owns nothing."""


def picture(seed: int, width: int = 24, height: int = 18) -> Image.Image:
    """Blurred noise: compresses like a photograph, and no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def folder_of(folder: Path, names: list[str], width: int = 24, height: int = 18) -> Path:
    """Writes a picture under each name; pictures differ."""
    for seed, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        form = "JPEG" if file.suffix == ".jpg" else "PNG"
        file.write_bytes(encoded(picture(seed, width, height), form))
    return folder


def array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def in_child(function: Callable[[], Any], *, user: int | None = None) -> Any:
    """What `function` returns in a forked process, as `user` where one is given.

    Raises what it raises, and ChildProcessError when the process was killed.
    """
    reading, writing = os.pipe()
    with (
        warnings.catch_warnings()
    ):  # Python 3.12 warns of forking beside threads; the child uses none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            answer = (True, function())
        except BaseException as error:  # noqa: BLE001 -- the parent raises it
            traceback.clear_frames(error.__traceback__)
            answer = (False, error.with_traceback(None))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildProcessError(signal.Signals(os.WTERMSIG(status)).name)
    fine, result = pickle.loads(content)
    if not fine:
        raise result
    return result
