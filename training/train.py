"""The loop: one for all methods. Read it from top to bottom.

    train("simclr", "photos/", Path("runs/first"), {"epochs": "20"})

Several GPUs or machines: `torchrun --nproc-per-node N -m embedserve train …`; nothing else changes.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from embedserve.errors import InvalidField
from training import checkpoint
from training.backbones import Backbone, describe
from training.batch_norm import synchronize_batch_norms
from training.batches import Batches
from training.blend import BEGUN, digest
from training.checkpoint import Best, Checkpoints
from training.config import TrainConfig
from training.distributed import agreed, any_rank, is_main, process_group, rank, synchronize, world_size
from training.method import Batch
from training.methods import find
from training.online import OnlineEvaluation
from training.optim import build_optimizer, set_rates
from training.pictures import draw_neighbours, draw_views
from training.precision import Precision
from training.prepare import prepare
from training.recording import record_backbones
from training.run import (
    CHECKPOINTS,
    CONFIG,
    WEIGHTS,
    begin,
    build_method,
    check_same_run,
    encoder_prefix,
    locked,
    read_json,
    remove_empty,
    write_json,
)
from training.schedules import Now
from training.seeding import seed_everything
from training.settings import typed_value
from training.watch import Monitor, Progress, RunLog, curves_picture, score, write_readme

__all__ = ["Outcome", "train"]

STEPS = 2
"""Sets the random numbers of each step apart from others of the same seed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    folder: Path
    steps: int
    finished: bool
    """False when it was interrupted; the same command goes on."""
    figures: dict[str, float]
    """The last measurement: feature_std, feature_rank, and knn where there are labels."""


def train(method: str, data: str, out: Path, given: Mapping[str, str]) -> Outcome:
    """Trains, or goes on exactly where an earlier run of the same command stopped.

    Args:
        method: A key of `training.methods.METHODS`.
        data: What `training.data.open_source` takes.
        out: The run's folder, made when missing.
        given: Settings by key, as text.

    Raises:
        NotFound, InvalidField, BadRequest: As resolving the settings and opening the data do.
        Conflict: The folder holds a run with other settings, data or number of processes, or another process
            trains into it.
        EmbedServeError: The loss is no longer a number, or the disk is full. Earlier checkpoints are intact.
    """
    find(method)  # before anything is decoded
    device_name = typed_value(TrainConfig, "device", given.get("device", "auto"))
    with contextlib.ExitStack() as exits:
        device = exits.enter_context(process_group(device_name))
        if is_main():
            new = not Path(out).exists()
            Path(out).mkdir(parents=True, exist_ok=True)
            exits.enter_context(locked(Path(out)))
            if new:
                exits.callback(remove_empty, Path(out))
        return _train(method, data, Path(out), given, device=device, exits=exits)


def _train(  # noqa: PLR0912, PLR0915 -- the whole run, to be read from top to bottom
    method_name: str,
    data: str,
    out: Path,
    given: Mapping[str, str],
    *,
    device: torch.device,
    exits: contextlib.ExitStack,
) -> Outcome:
    # ------------------------------------------------------------------------------- data and settings
    progress = Progress(hidden=not is_main())
    prepared = prepare(method_name, data, given, device, progress=progress.decoding)
    settings, facts = prepared.settings, prepared.settings.facts
    checkpoints = Checkpoints(out / CHECKPOINTS, keep=settings.config.keep)
    latest = checkpoints.latest()
    state = checkpoint.load(latest) if latest is not None else None
    first_step = 0 if state is None else int(state["step"])
    if not agreed(first_step):
        raise InvalidField(
            f"Not every machine sees the checkpoints in '{out}' (here the run is at step {first_step}). "
            "Give an --out on a disk that all machines share.",
            param="out",
        )

    # --------------------------------------------------------------------------------------- networks
    if state is None:
        method = begin(settings)
    else:
        seed_everything(settings.config.seed, WEIGHTS)
        method = build_method(settings, start=str(latest), carried=state.get("carried"))
    captions = prepared.captions_for(method)
    settings = replace(settings, config=replace(settings.config, backbone=method.backbone.name))
    config, recipe = settings.config, settings.recipe
    record = {
        **settings.as_json(),
        "encoder": describe(method.encoder),
        "data": prepared.about_data(captions),
        "world_size": world_size(),
        "torch": torch.__version__,
    }
    if (out / CONFIG).exists():
        earlier = read_json(out / CONFIG)
        check_same_run(out, earlier, record)
        record["encoder"] = earlier["encoder"]  # its notes are of the weights that the run started from
        record |= {BEGUN: earlier[BEGUN]} if BEGUN in earlier else {}
    if state is None and config.start:
        record[BEGUN] = digest(method)
    if state is not None:
        method.load_state_dict(state["model"])
    if world_size() > 1 and config.sync_batch_norm and not method.local_batch_norm:
        synchronize_batch_norms(method, device)
    method.to(device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch annotates only some forms
    if config.compile:
        for module in method.modules():
            if isinstance(module, Backbone):  # the momentum encoder's too
                module.compile()
    replayed = config.cuda_graphs and method.replayable and _alone_on_gpu(device)
    recordings = record_backbones(method) if replayed else None
    network: nn.Module = method
    if world_size() > 1:
        network = DistributedDataParallel(method, forward_sync_buffers=False)

    # -------------------------------------------------------------------------------------- optimiser
    precision = Precision(config.precision, device, deterministic=config.deterministic)
    optimizer, scaler = build_optimizer(method, recipe), precision.scaler()
    trained = [one for one in method.parameters() if one.requires_grad]
    schedules = method.schedules()
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])

    # ---------------------------------------------------------------------------------------- batches
    steps = config.epochs * facts.steps_per_epoch
    batches = Batches(
        prepared.pixels,
        prepared.train,
        type(method).views(settings.augmentation, settings.options, facts),
        batch_size=config.batch_size,
        parts=config.accumulate,
        seed=config.seed,
        groups=facts.groups,
        compile=config.compile,
        captions=captions,
    )

    # --------------------------------------------------------------------------------------- watching
    online = OnlineEvaluation(
        prepared.pixels,
        prepared.train,
        prepared.heldout,
        size=config.size,
        seed=config.seed,
        captions=captions,
    )
    monitor = Monitor(method_name, classes=method.logit_count())
    figures: dict[str, float] = {}
    if state is not None:
        monitor.load_state_dict(state["monitor"])
        figures = dict(state["figures"])
        if is_main() and _is_better(figures, checkpoints.best_mark()):  # killed before it could be marked
            checkpoints.mark_best(first_step, score(figures))
    log = None
    if is_main():
        write_json(out / CONFIG, record)
        log = RunLog(
            out, resume_at=first_step, tensorboard=config.tensorboard, wandb=config.wandb, config=record
        )
        progress.settings(record, first_step)
        exits.callback(log.close)
        if first_step == 0:
            draw_views(out / "views.png", batches, config.size)

    def save(step: int) -> None:
        """All that the next step needs; random numbers and the position in the data follow from `step`."""
        monitor.require_finite(step, rates["lr"], checkpoints.latest())
        if is_main():
            content = {
                "method": method_name,
                "settings": settings.as_json(),
                "step": step,
                "model": method.state_dict(),
                "encoder_prefix": encoder_prefix(method),
                "backbone": describe(method.encoder),
                "carried": method.carried(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "monitor": monitor.state_dict(),
                "figures": figures,
            }
            checkpoints.write(step, content)

    # ------------------------------------------------------------------------------------------- loop
    step, measured = first_step, None
    rates: dict[str, float] = {"lr": 0.0}
    parts = exits.enter_context(contextlib.closing(batches.from_step(first_step, steps)))
    with (
        _stop_requested() as stop,
        progress.running(steps, first_step, config.batch_size, facts.steps_per_epoch),
    ):
        while step < steps and not _asked_to_stop(stop, step, config.log_every):
            now = Now(step, steps, facts.steps_per_epoch)
            values = {name: schedule(now) for name, schedule in schedules.items()}
            rates = set_rates(optimizer, recipe, now, batch_size=config.batch_size)
            seed_everything(config.seed, STEPS, step, rank())

            for _ in range(config.accumulate):
                part = next(parts)
                if recordings is not None:
                    recordings.begin()
                with contextlib.nullcontext() if part.last else _without_averaging(network):
                    with precision.autocast():
                        losses = network(Batch(part.views, part.ids, now, values, part.texts))
                    scaler.scale(losses["loss"] / config.accumulate).backward()
                monitor.see(losses)

            if recipe.clip > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trained, recipe.clip)
            method.before_step(now)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(now, values)
            step += 1

            # ------------------------------------------------------------------------- after the step
            last, epoch = step == steps, step / facts.steps_per_epoch
            if last or step % config.log_every == 0:
                monitor.require_finite(step, rates["lr"], checkpoints.latest())
                line = {**monitor.read(), **rates, **values, "images_per_second": progress.speed(step)}
                progress.step(step, epoch, line)
                if log is not None:
                    log.write(step, epoch, line)
            better = False
            if last or step % (config.knn_every * facts.steps_per_epoch) == 0:
                if is_main():
                    measured = online.measure(method)
                    figures = measured.figures
                    better = _is_better(figures, checkpoints.best_mark())
                    alarms = monitor.judge(figures, epoch)
                    progress.measured(epoch, figures, alarms)
                    if log is not None:
                        log.write(
                            step, epoch, {**figures, **{f"alarm_{one.code}": one.message for one in alarms}}
                        )
                synchronize()
            if last or better or step % config.checkpoint_every == 0:
                save(step)
                if better:
                    checkpoints.mark_best(step, score(figures))
    parts.close()

    # ----------------------------------------------------------------------------------------- the end
    finished = step == steps
    if not finished:
        save(step)
    if log is not None:
        measured = measured or online.measure(method)
        draw_neighbours(out / "neighbours.png", online, measured, config.size)
        curves_picture(log.records(), out / "curves.png")
        write_readme(out, record, log.records(), monitor.alarms, finished=finished)
    progress.ended(out, step, steps, figures)
    synchronize()
    return Outcome(out, step, finished, figures)


@contextlib.contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets: the step is finished and saved. A second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield event
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _alone_on_gpu(device: torch.device) -> bool:
    """Averaging over ranks happens while gradients are computed, which a recording would not see."""
    return device.type == "cuda" and world_size() == 1


def _asked_to_stop(stop: threading.Event, step: int, every: int) -> bool:
    """Ranks must stop at the same step; asking each other costs time, so they do it now and then."""
    if world_size() == 1:
        return stop.is_set()
    return step % every == 0 and any_rank(stop.is_set())


def _is_better(figures: Mapping[str, float], best: Best | None) -> bool:
    return not math.isnan(score(figures)) and (best is None or score(figures) > best.score)


def _without_averaging(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """DDP averages gradients over ranks with the step's last part only."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()
