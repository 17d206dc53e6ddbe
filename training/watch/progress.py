"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.watch.alarms import Alarm
from training.watch.quality import quality_words

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import Task, TaskID
    from rich.text import Text

__all__ = ["Progress", "about_captions", "duration"]

LINE_SECONDS, DECODING_SECONDS, SHOWN_PROBLEMS = 30.0, 0.2, 5


class Progress:
    """Shows a run from decoding to the end.

    Args:
        hidden: Show nothing: for all processes but the first.
    """

    def __init__(self, *, hidden: bool = False) -> None:
        self._hidden = hidden
        self._terminal = not hidden and sys.stderr.isatty()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._decoding: tuple[float, int, float] | None = None
        self._epochs = self._steps = self._first_step = self._batch_size = 0
        self._started = self._last_line = self._last_speed = 0.0
        self._last_step = 0
        self._loss, self._quality, self._speed = math.nan, "", 0.0

    # ------------------------------------------------------------------------------------ before the loop

    def decoding(self, done: int, total: int) -> None:
        """Images that are decoded, of how many."""
        if self._hidden:
            return
        now = time.monotonic()
        if self._decoding is None:
            self._decoding = (now, done, 0.0)
        started, before, shown = self._decoding
        if now - shown < (DECODING_SECONDS if self._terminal else LINE_SECONDS) and done < total:
            return
        self._decoding = (now, done, now) if done >= total else (started, before, now)
        speed = (done - before) / (now - started) if now > started else 0.0
        # The cursor rests below the line, so that an error that ends decoding has a line of its own.
        again = "\x1b[1A\x1b[2K" if self._terminal and shown else ""
        self._say(f"{again}decoding {done:,} of {total:,} images{f' · {speed:,.0f}/s' if speed else ''}")

    def settings(self, record: Mapping[str, Any], first_step: int) -> None:
        """What will be trained on what, and which settings follow the data.

        Args:
            record: What config.json holds.
            first_step: Steps that are done already.
        """
        config, facts, data = record["config"], record["facts"], record["data"]
        classes = f", {len(data['classes'])} classes" if data["classes"] else ""
        self._epochs = facts["epochs"]
        self._say(
            f"{config['method']} on {config['data']}: {data['images']:,} images to train on, "
            f"{data['heldout']:,} held out{classes}"
        )
        plural = "" if facts["epochs"] == 1 else "s"
        self._say(
            f"  {record['encoder']['name']}, {config['size']} pixels, {facts['epochs']} epoch{plural} of "
            f"{facts['steps_per_epoch']} steps, {config['batch_size']} images each"
        )
        values = {**config, **record["recipe"], **record["augmentation"], **record["options"]}
        for origin, words in (("set", "set by you"), ("suited", "chosen for this data and machine")):
            keys = [key for key, one in record["origin"].items() if one == origin]
            shown = [f"{key}={_short(values[key])}" for key in keys if key not in {"method", "data"}]
            if shown:
                self._say(f"  {words}: {' '.join(shown)}")
        for note in record["encoder"].get("notes", ()):
            self._say(f"  {note}")
        for one in data["skipped"][:SHOWN_PROBLEMS]:
            self._say(f"  skipped {one['key']}: {one['reason']}")
        if len(data["skipped"]) > SHOWN_PROBLEMS:
            self._say(f"  … and {len(data['skipped']) - SHOWN_PROBLEMS} more; config.json lists all")
        for line in about_captions(data.get("captions")):
            self._say(f"  {line}")
        if first_step:
            epoch = first_step / facts["steps_per_epoch"]
            self._say(f"  going on after step {first_step:,}, epoch {epoch:.4g}")

    # ------------------------------------------------------------------------------------------- the loop

    @contextmanager
    def running(self, steps: int, first_step: int, batch_size: int, steps_per_epoch: int) -> Iterator[None]:
        """The loop runs inside of this.

        Args:
            steps: Of the whole run.
            first_step: Steps that were done before.
            batch_size: Images of a step, over all ranks.
            steps_per_epoch: As the loop counts them.
        """
        self._steps, self._first_step, self._batch_size = steps, first_step, batch_size
        self._epochs = steps // steps_per_epoch
        self._last_step, self._started = first_step, time.monotonic()
        self._last_speed = self._last_line = self._started
        if not self._terminal or self._hidden:
            yield
            return
        with _bar() as bar:
            self._bar = bar
            self._task = bar.add_task("", total=steps, completed=first_step, figures="")
            self._show(first_step, first_step / steps_per_epoch)
            try:
                yield
            finally:
                self._bar = None

    def speed(self, step: int) -> float:
        """Images a second since the last call, of all ranks; with what else the loop did meanwhile."""
        now = time.monotonic()
        seconds, images = now - self._last_speed, (step - self._last_step) * self._batch_size
        self._last_speed, self._last_step = now, step
        self._speed = images / seconds if seconds > 0 else 0.0
        return self._speed

    def step(self, step: int, epoch: float, line: Mapping[str, float]) -> None:
        """Where the run is, with the figures of its log line."""
        if self._hidden:
            return
        self._loss = line.get("loss", math.nan)
        if self._bar is not None:
            self._show(step, epoch)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            done = step - self._first_step
            left = (self._last_line - self._started) / done * (self._steps - step) if done else 0.0
            self._say(f"epoch {epoch:.2f} of {self._epochs} · {self._figures()} · {duration(left)} left")

    def measured(self, epoch: float, figures: Mapping[str, float], alarms: Sequence[Alarm]) -> None:
        """A measurement, and the alarms that are new with it."""
        self._quality = quality_words(figures)
        quality = f"{self._quality} · " if self._quality else ""
        loss = f"loss {self._loss:.3f} · " if math.isfinite(self._loss) else ""
        self._say(
            f"epoch {epoch:>{len(str(self._epochs))}.4g} of {self._epochs} · {loss}{quality}"
            f"spread {figures['feature_std']:.2f} · rank {figures['feature_rank']:.1f}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=self._figures())
        for one in alarms:
            self._say(f"WARNING {one.code}: {one.message}", loud=True)

    def ended(self, out: Path, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """How the run ended, and what can be done with it."""
        quality = f" with {words}" if (words := quality_words(figures)) else ""
        if step < steps:
            self._say(
                f"stopped after step {step:,} of {steps:,}{quality}; the same command goes on from there"
            )
            return
        took = f" in {duration(time.monotonic() - self._started)}" if step > self._first_step else ""
        self._say(
            f"finished {steps:,} steps{took}{quality}; "
            f"'{out / 'README.md'}' shows the run and what comes next"
        )

    # ------------------------------------------------------------------------------------------ inside

    def _show(self, step: int, epoch: float) -> None:
        if self._bar is not None and self._task is not None:
            now = min(math.floor(epoch) + 1, self._epochs)
            words = f"epoch {now}/{self._epochs}"
            self._bar.update(self._task, completed=step, description=words, figures=self._figures())

    def _figures(self) -> str:
        parts = [f"{self._speed:,.0f}/s"] if self._speed else []
        parts += [f"loss {self._loss:.3f}"] if math.isfinite(self._loss) else []
        parts += [self._quality] if self._quality else []
        return " · ".join(parts)

    def _say(self, line: str, *, loud: bool = False) -> None:
        if self._hidden:
            return
        if self._bar is not None:  # above the bar, which stays at the bottom
            from rich.text import Text

            self._bar.console.print(Text(line, style="bold red" if loud else ""), highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Left(ProgressColumn):
        """Time left. A step is too even a thing to need rich's window of the last 30 seconds."""

        def render(self, task: Task) -> Text:
            return Text(f"{duration(task.time_remaining)} left" if task.time_remaining else "", style="cyan")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}"),
        Left(),
    )
    return Bar(*columns, console=Console(stderr=True), speed_estimate_period=300)


def about_captions(captions: Mapping[str, Any] | None) -> list[str]:
    """Where they are from, what was left out, and what may be wrong with them."""
    if captions is None:
        return []
    left_out = ", ".join(f"{count:,} {why}" for why, count in captions["left_out"].items())
    said = f"{captions['captions']:,} captions from {captions['from']}, {captions['different']:,} different"
    return [said + (f"; left out: {left_out}" if left_out else ""), *captions["remarks"]]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """A duration for people: '45 s', '12 min', '3 h 05 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
