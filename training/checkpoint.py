"""Checkpoints that survive a kill, a full disk and a copy to another machine."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from embedserve.errors import EmbedServeError, InvalidField, NotFound
from indexes.durable import fsync_folder
from training.durable import TEMPORARY, replacing

__all__ = ["Best", "Checkpoints", "load", "save"]

logger = logging.getLogger(__name__)

STEP_FILE = re.compile(r"step-(\d{8,})\.pt")
PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` is always a whole checkpoint: the new one, or the one before.

    Args:
        path: In a folder that exists.
        state: Tensors, numbers, strings and None, in dicts, lists and tuples: what `load` can read back
            without running code.

    Raises:
        EmbedServeError: The disk is full (code 'disk_full', with free and needed bytes) or cannot be written.
        TypeError: `state` holds something else; the message says where.
    """
    needed = _measure(state, "state", set())
    with replacing(path, needed=needed) as file:
        watched = _Watched(file)
        try:
            torch.save(state, cast("IO[bytes]", watched))
        except RuntimeError:
            # torch reports any failed write as an internal error of its zip writer.
            if watched.failure is not None:
                raise watched.failure from None
            raise


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, with all tensors on the CPU. The file is checked whole, and no code in it is run.

    Raises:
        NotFound: There is no such file.
        EmbedServeError: It is damaged or cut short (code 'checkpoint_damaged'; the message names the newest
            good one beside it), or is no checkpoint of ours.
    """
    if not path.is_file():
        raise NotFound(f"There is no checkpoint '{path}'. {_advice(path)}")
    damage = _damage(path)
    if damage:
        raise EmbedServeError(f"The checkpoint '{path}' {damage}. {_advice(path)}", code="checkpoint_damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise EmbedServeError(
            f"'{path}' is a whole file, but not a checkpoint of `embedserve train`: only tensors and plain "
            f"values are read, as anything else could run code. torch says: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict):
        raise EmbedServeError(f"'{path}' holds a {type(state).__name__}, not the state of a run.")
    return state


@dataclass(frozen=True, slots=True)
class Best:
    """Which checkpoint scored highest."""

    step: int
    score: float


class Checkpoints:
    """The checkpoints of one run: `step-00001234.pt`, and the names `last.pt` and `best.pt`.

    The two names are hard links. They cost nothing here, and any copy, archive or upload of the folder, or of
    one file, has the whole checkpoint under them; symbolic links arrive dangling, or not at all. Where the
    file system has no hard links they are copies. Nothing here relies on them: the truth is the step in a
    file's name and `best.json`.

    One process writes a run's checkpoints; any number may read them meanwhile.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Makes the folder where it is missing.

        Args:
            folder: Holds checkpoints and nothing else.
            keep: How many of the newest stay, at least 1; the best stays besides.

        Raises:
            InvalidField: `keep` is less than 1.
            EmbedServeError: The folder cannot be made.
        """
        if keep < 1:
            raise InvalidField(f"keep={keep} would keep no checkpoint; use 1 or more.", param="keep")
        self.folder = folder
        self.keep = keep
        self._whole: dict[Path, tuple[int, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbedServeError(f"The folder '{folder}' cannot be made: {error.strerror}.") from error

    def write(self, step: int, state: dict[str, Any]) -> Path:
        """Saves the state after `step` steps as the last one, then prunes.

        A checkpoint of a later step is from a continuation that was given up, as this run went on from an
        earlier one; it goes, unless it is the best. Raises what `save` raises; then nothing is pruned.
        """
        for left in self.folder.glob(f".*{TEMPORARY}"):  # by a process that was killed
            left.unlink(missing_ok=True)
        path = self._path(step)
        save(path, state)
        self._whole[path] = _stamp(path)
        self._name("last.pt", path)
        best = self.best_mark()
        if best is not None and best.step == step:
            self._name("best.pt", path)
        self._prune(step)
        return path

    def mark_best(self, step: int, score: float) -> None:
        """Makes the checkpoint of `step` the best, whatever the best was before, and prunes that.

        Args:
            step: Of a checkpoint that is there.
            score: Finite; higher is better.

        Raises:
            NotFound: There is no checkpoint of that step.
            InvalidField: The score is not finite.
        """
        path = self._path(step)
        if not path.is_file():
            raise NotFound(f"There is no checkpoint of step {step} in '{self.folder}'; write it first.")
        if not math.isfinite(score):
            raise InvalidField(f"score={score} is not finite, so it cannot be the best.", param="score")
        with replacing(self.folder / "best.json") as file:
            file.write(json.dumps({"step": step, "score": score}).encode() + b"\n")
        self._name("best.pt", path)
        self._prune(self.steps()[-1])

    def best_mark(self) -> Best | None:
        """What `mark_best` was told last; None before the first time."""
        try:
            mark = json.loads((self.folder / "best.json").read_bytes())
            return Best(int(mark["step"]), float(mark["score"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning("'%s' is damaged and ignored.", self.folder / "best.json")
            return None

    def best(self) -> Path | None:
        """The best checkpoint. It is not checked; `load` does that."""
        mark = self.best_mark()
        candidates = [self._path(mark.step)] if mark else []
        return next((path for path in [*candidates, self.folder / "best.pt"] if path.is_file()), None)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; None where there is none at all. Damaged ones are warned of.

        Raises:
            EmbedServeError: All checkpoints are damaged: nothing starts anew over them unasked.
        """
        steps = self.steps()
        for path in map(self._path, reversed(steps)):
            try:
                stamp = _stamp(path)
            except FileNotFoundError:  # pruned this moment by the process that trains
                continue
            if self._whole.get(path) == stamp:  # looked at before, and not touched since
                return path
            damage = _damage(path)
            if damage is None:
                self._whole[path] = stamp
                return path
            logger.warning("The checkpoint '%s' %s; the one before it is taken.", path, damage)
        if steps:
            raise EmbedServeError(
                f"All {len(steps)} checkpoints in '{self.folder}' are damaged. Restore them from a copy, or "
                "start anew in another folder.",
                code="checkpoint_damaged",
            )
        return None

    def steps(self) -> list[int]:
        """Steps that there are checkpoints of, in ascending order."""
        return sorted(_steps(self.folder))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def _prune(self, newest: int) -> None:
        best = self.best_mark()
        past = [step for step in self.steps() if step <= newest]
        stay = {*past[-self.keep :], *([best.step] if best else [])}
        for step in self.steps():
            if step not in stay:
                self._path(step).unlink(missing_ok=True)

    def _name(self, name: str, path: Path) -> None:
        link = self.folder / name
        temporary = self.folder / f".{name}{TEMPORARY}"
        try:
            temporary.unlink(missing_ok=True)
            os.link(path, temporary)
            temporary.replace(link)
            fsync_folder(self.folder)
        except OSError:
            with replacing(link, needed=path.stat().st_size) as copy, path.open("rb") as original:
                shutil.copyfileobj(original, copy, 1 << 20)
        finally:
            # Renaming one link of a file over another of the same file leaves both, says POSIX.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class _Watched:
    """A file for `torch.save` that remembers why writing failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failure: OSError | None = None

    def write(self, chunk: bytes) -> int:
        try:
            return self.file.write(chunk)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _steps(folder: Path) -> list[int]:
    names = (STEP_FILE.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    return [int(name[1]) for name in names if name]


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, as the end of a sentence; None where nothing is.

    torch itself does not look at the checksums in its files.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return "is cut short or damaged"
    return f"is damaged: the checksum of its part '{bad}' is wrong" if bad else None


def _advice(path: Path) -> str:
    """Which checkpoint to use instead: the newest whole one in the same folder."""
    folder = path.parent
    for step in sorted(_steps(folder), reverse=True):
        other = folder / f"step-{step:08d}.pt"
        if not (path.exists() and other.samefile(path)) and _damage(other) is None:
            return f"The newest whole one is '{other}'; use that."
    return "There is no other one in its folder; restore it from a copy, or start anew."


def _measure(value: object, where: str, storages: set[int]) -> int:
    """Bytes of the tensors' storages, each counted once. Raises TypeError for what `load` would refuse."""
    kind = type(value)
    if isinstance(value, Tensor) and kind in (Tensor, nn.Parameter):
        storage = value.untyped_storage()
        known = storage.data_ptr() in storages
        storages.add(storage.data_ptr())
        return 0 if known else storage.nbytes()
    if isinstance(value, dict) and kind in (dict, OrderedDict):
        keys = sum(_measure(key, f"the key {key!r} of {where}", storages) for key in value)
        return keys + sum(_measure(item, f"{where}[{key!r}]", storages) for key, item in value.items())
    if isinstance(value, list | tuple) and kind in (list, tuple):
        return sum(_measure(item, f"{where}[{at}]", storages) for at, item in enumerate(value))
    if kind not in PLAIN:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; convert it "
            "to a tensor, a number or a string."
        )
    return len(value) if isinstance(value, str | bytes) else 8
