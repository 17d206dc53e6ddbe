"""README.md of a run: what was trained on what, how it went, what each file is, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from training.durable import replacing
from training.watch.alarms import Alarm
from training.watch.progress import about_captions, duration
from training.watch.quality import score

__all__ = ["write_readme"]

Record = Mapping[str, Any]

FILES = {
    "config.json": "every setting with its origin, the data and the encoder",
    "metrics.jsonl": "the figures, one JSON object a line: `pandas.read_json('metrics.jsonl', lines=True)`",
    "checkpoints/last.pt": "the state after the last step, from which the run goes on exactly",
    "checkpoints/best.pt": "the state that was best on held-out images",
    "views.png": "images, and what the method saw of them",
    "curves.png": "how it went",
    "neighbours.png": "images, and which others the encoder finds alike",
    "eval": "measurements of `embedserve eval`",
    "tensorboard": "event files: `tensorboard --logdir` on this folder",
}
PICTURES = {
    "curves.png": "How it went",
    "neighbours.png": "What it finds alike",
    "views.png": "What it saw",
}
ORIGINS = {"set": "**set**", "suited": "follows the data and the machine", "default": "default"}
SECTIONS = {"config": "Run", "recipe": "Optimiser", "options": "Method", "augmentation": "Views"}
SETTINGS_HEAD = ("| setting | value | |", "|---|---|---|")
SHOWN_SKIPPED = 10


def write_readme(
    folder: Path, record: Record, records: Sequence[Record], alarms: Sequence[Alarm], *, finished: bool
) -> None:
    """Writes the README.md of a run, replaced whole.

    Args:
        folder: The run's. Pictures and files are mentioned that lie in it.
        record: What its config.json holds.
        records: Those of metrics.jsonl.
        alarms: All that were raised.
        finished: False for a run that was interrupted.

    Raises:
        EmbedServeError: The file cannot be written.
    """
    parts = [
        _head(record, records, finished),
        _alarms(alarms),
        _result(records),
        *(
            f"## {title}\n\n![{title}]({name})"
            for name, title in PICTURES.items()
            if (folder / name).exists()
        ),
        _commands(folder, record, finished),
        _files(folder),
        _settings(record),
        _data(record),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with replacing(folder / "README.md", needed=len(text)) as file:
        file.write(text.encode())


def _head(record: Record, records: Sequence[Record], finished: bool) -> str:
    config, facts, data, encoder = (record[key] for key in ("config", "facts", "data", "encoder"))
    name = Path(str(config["data"])).name or str(config["data"])
    classes = f" of {len(data['classes'])} classes" if data["classes"] else ""
    size = f" ({encoder['parameters'] / 1e6:.1f} million parameters, {encoder['dim']} features)"
    start = f", starting from `{config['start']}`" if config["start"] else ""
    done = max((float(one["epoch"]) for one in records), default=0.0)
    length = f"{facts['epochs']} epochs" if finished else f"{done:.4g} of {facts['epochs']} epochs"
    lines = [
        f"# {config['method']} on {name}",
        "",
        f"A {encoder['name']}{size}, trained by {config['method']} for {length} on {data['images']:,} "
        f"images{classes}, {config['size']} pixels a side{start}{_duration(record, records)}.",
    ]
    if not finished:
        lines += ["", "It was interrupted. The same command goes on exactly where it stopped."]
    return "\n".join(lines)


def _duration(record: Record, records: Sequence[Record]) -> str:
    """How long the steps took, over all sessions, from the speeds that were logged."""
    seconds, step, speeds = 0.0, 0, []
    for one in records:
        speed = one.get("images_per_second")
        if isinstance(speed, int | float) and speed > 0:
            seconds += (one["step"] - step) * record["config"]["batch_size"] / speed
            step = one["step"]
            speeds.append(speed)
    if not speeds:
        return ""
    processes = f" with {record['world_size']} processes" if record["world_size"] > 1 else ""
    return f"; {duration(seconds)}{processes}, {median(speeds):,.0f} images/s (median)"


def _alarms(alarms: Sequence[Alarm]) -> str:
    if not alarms:
        return ""
    lines = ["## Alarms", ""]
    for one in alarms:
        until = "" if one.until is None else f", until epoch {one.until:.4g}"
        lines.append(f"- **{one.code}**, from epoch {one.epoch:.4g}{until}: {_escaped(one.message)}")
    return "\n".join(lines)


def _result(records: Sequence[Record]) -> str:
    measured = [one for one in records if isinstance(one.get("feature_std"), int | float)]
    if not measured:
        return ""
    last = measured[-1]
    scored = [one for one in measured if not math.isnan(score(one))]
    best = max(scored, key=score) if scored else None
    lines = ["## Result", ""]
    lines += ["| | best | last |", "|---|---:|---:|"] if best else ["| | last |", "|---|---:|"]
    rows = (
        ("held-out images find their captions (R@1)", "image_to_text", "{:.1%}"),
        ("captions find their held-out images (R@1)", "text_to_image", "{:.1%}"),
        ("k-NN accuracy on held-out images", "knn", "{:.1%}"),
        ("spread of features (1 is even, 0 collapsed)", "feature_std", "{:.3f}"),
        ("effective rank of features", "feature_rank", "{:.1f}"),
        ("after epoch", "epoch", "{:.4g}"),
        ("after step", "step", "{:,}"),
    )
    for words, key, form in rows:
        cells = [_cell(one, key, form) for one in (best, last) if one is not None]
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    if best is None:
        lines += [
            "",
            "Without labels there is nothing to choose a best checkpoint by; the last one counts.",
        ]
    return "\n".join(lines)


def _cell(one: Record, key: str, form: str) -> str:
    return form.format(one[key]) if isinstance(one.get(key), int | float) else ""


def _commands(folder: Path, record: Record, finished: bool) -> str:
    config, origin = record["config"], record["origin"]
    run = shlex.quote(str(folder))
    values = {**config, **record["recipe"], **record["augmentation"], **record["options"]}
    chosen = [key for key, one in origin.items() if one == "set" and key not in {"method", "data"}]
    program = "embedserve"
    if record["world_size"] > 1:
        program = f"torchrun --nproc-per-node {record['world_size']} -m embedserve"
    train = [f"{program} train {config['method']} --data {shlex.quote(str(config['data']))} --out {run}"]
    train += [f"--set {shlex.quote(f'{key}={_value(values[key])}')}" for key in chosen]
    what = "Train it again, in a new folder" if finished else "Go on"
    again = " ".join(train) if not finished else " ".join(train).replace(f"--out {run}", f"--out {run}-again")
    return "\n".join(
        [
            "## Commands",
            "",
            "```sh",
            f"# {what}",
            again,
            "# Measure it",
            f"embedserve eval knn {run}",
            f"embedserve eval linear {run}",
            "```",
        ]
    )


def _files(folder: Path) -> str:
    present = [f"| `{name}` | {words} |" for name, words in FILES.items() if (folder / name).exists()]
    return "\n".join(["## Files", "", "| | |", "|---|---|", *present]) if present else ""


def _settings(record: Record) -> str:
    origins = {**record["origin"], "method": "set", "data": "set"}
    lines = ["## Settings", "", "Those that differ from the defaults:", "", *SETTINGS_HEAD]
    for section in SECTIONS:
        lines += [
            _setting(key, value, origins.get(key, ""))
            for key, value in record[section].items()
            if origins.get(key) in {"set", "suited"}
        ]
    lines += ["", "<details><summary>All settings</summary>"]
    for section, title in SECTIONS.items():
        lines += ["", f"### {title}", "", *SETTINGS_HEAD]
        lines += [_setting(key, value, origins.get(key, "")) for key, value in record[section].items()]
    return "\n".join([*lines, "", "</details>"])


def _setting(key: str, value: object, origin: str) -> str:
    shown = f"`{_escaped(_value(value))}`" if _value(value) else ""
    return f"| {key} | {shown} | {ORIGINS.get(origin, '')} |"


def _data(record: Record) -> str:
    data, encoder = record["data"], record["encoder"]
    lines = ["## Data and machine", ""]
    lines.append(f"- {data['images']:,} images to train on, {data['heldout']:,} held out.")
    if data["classes"]:
        shown = ", ".join(str(name) for name in data["classes"][:20])
        lines.append(f"- Classes: {_escaped(shown)}{', …' if len(data['classes']) > 20 else ''}.")
    lines += [f"- {_escaped(line)}" for line in about_captions(data.get("captions"))]
    lines.append(f"- Median shorter side: {data['native_size']} pixels.")
    lines.append(f"- Fingerprint of the data: `{data['fingerprint']}`.")
    lines.append(
        f"- torch {record['torch']}, {record['world_size']} process{'es'[: 2 * (record['world_size'] > 1)]}."
    )
    lines += [f"- {_escaped(str(note))}" for note in encoder.get("notes", ())]
    skipped = data["skipped"]
    if skipped:
        lines += ["", "Left out:", ""]
        lines += [f"- `{one['key']}`: {_escaped(one['reason'])}" for one in skipped[:SHOWN_SKIPPED]]
        if len(skipped) > SHOWN_SKIPPED:
            lines.append(f"- … and {len(skipped) - SHOWN_SKIPPED} more, all in config.json.")
    return "\n".join(lines)


def _value(value: object) -> str:
    """As `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _escaped(text: str) -> str:
    """Text that a Markdown table or list shows as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
