"""Where the figures of a run go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from embedserve.errors import EmbedServeError, InvalidField
from training.durable import replacing

__all__ = ["FILE", "RunLog", "read_records"]

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Sink(Protocol):
    """Another place where figures go."""

    def write(self, step: int, epoch: float, values: Mapping[str, float | str]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """metrics.jsonl of a run: one JSON object for each call of `write`, with 'step', 'epoch' and the values.

    Args:
        folder: The run's.
        resume_at: Steps that the run goes on after; 0 for a new one. Records of later steps are cut off, as
            those steps are taken again, and so is a line that a kill left unfinished.
        tensorboard: Write event files into the folder 'tensorboard' as well.
        wandb: Log to Weights & Biases as well: into one of its runs, however often this one is resumed.
        config: What W&B shows as the run's configuration.

    Raises:
        InvalidField: A package that was asked for is not installed.
        EmbedServeError: The file cannot be read or written.
    """

    def __init__(
        self, folder: Path, *, resume_at: int, tensorboard: bool, wandb: bool, config: Mapping[str, Any]
    ) -> None:
        self._path = folder / FILE
        self._sinks: list[Sink] = []
        _cut(self._path, resume_at)
        self._append(b"")
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", resume_at))
        if wandb:
            self._sinks.append(_WeightsAndBiases(folder, config))

    def write(self, step: int, epoch: float, values: Mapping[str, float | str]) -> None:
        """Adds a record. A value that is not finite is written as null.

        Raises:
            EmbedServeError: The disk is full.
        """
        line = json.dumps({"step": step, "epoch": epoch, **{key: _plain(one) for key, one in values.items()}})
        self._append(f"{line}\n".encode())
        for sink in self._sinks:
            sink.write(step, epoch, values)

    def records(self) -> list[dict[str, Any]]:
        """All records, from before a resume too, in their order."""
        return read_records(self._path)

    def close(self) -> None:
        """Ends the run in all places."""
        for sink in self._sinks:
            sink.close()

    def _append(self, line: bytes) -> None:
        # Opened for each line, of which there are few: one system call writes it, so a kill neither loses nor
        # tears it, and a run that ends in an error leaves no file open.
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            raise EmbedServeError(
                f"'{self._path}' cannot be written: {error.strerror}. Check the folder and its disk."
            ) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that is not one is left out. [] where there is no file.

    Raises:
        EmbedServeError: The file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EmbedServeError(f"'{path}' cannot be read: {error.strerror}.") from error
    records = [_record(line) for line in lines if line.strip()]
    whole = [one for one in records if one is not None]
    if len(whole) < len(records) - 1:  # the last line alone may have been cut by a kill
        logger.warning("%d lines of '%s' are damaged and left out.", len(records) - len(whole), path)
    return whole


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and isinstance(record["step"], int) else None
    except (ValueError, KeyError):
        return None


def _cut(path: Path, resume_at: int) -> None:
    """Leaves the records of the steps up to `resume_at`: they were written before that step's checkpoint."""
    records = read_records(path)
    kept = [one for one in records if resume_at > 0 and one["step"] <= resume_at]
    content = "".join(json.dumps(one) + "\n" for one in kept).encode()
    if path.exists() and path.read_bytes() != content:
        with replacing(path, needed=len(content)) as file:
            file.write(content)


def _plain(value: float | str) -> float | str | None:
    return value if isinstance(value, str) or math.isfinite(value) else None


class _TensorBoard:
    def __init__(self, folder: Path, resume_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidField(
                f"tensorboard=true cannot be had: {error}. Install it with `pip install tensorboard`, or "
                "leave the setting out: metrics.jsonl has the same figures.",
                param="tensorboard",
            ) from None
        # Steps after a resume replace what an earlier session wrote of them.
        self._writer = SummaryWriter(str(folder), purge_step=resume_at + 1 if resume_at else None)

    def write(self, step: int, epoch: float, values: Mapping[str, float | str]) -> None:
        for key, value in {"epoch": epoch, **values}.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            else:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InvalidField(
                f"wandb=true cannot be had: {error}. Install it with `pip install wandb`, or leave the "
                "setting out: metrics.jsonl has the same figures.",
                param="wandb",
            ) from None
        self._run = wandb.init(
            project="embedserve",
            name=folder.resolve().name,
            id=_identity(folder / "wandb.id"),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        # W&B drops figures of steps that it knows already, so a resumed run has an axis of its own.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, epoch: float, values: Mapping[str, float | str]) -> None:
        self._run.log({"step": step, "epoch": epoch, **values})

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path) -> str:
    """The name under which W&B finds the run again."""
    if not path.exists():
        with replacing(path) as file:
            file.write(secrets.token_hex(8).encode() + os.linesep.encode())
    return path.read_text().strip()
