"""The verbs that make encoders: `train`, `eval`, `export`. The work is done by the package `training`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from embedserve.cli.base import INTERRUPTED, OK, Usage, app
from embedserve.cli.terminal import note, print_json, progress_bar
from embedserve.config import Switch
from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    from training.settings import KeyHelp

ListSwitch = Annotated[bool, Parameter(name="--list", negative=())]
Assignments = Annotated[list[str] | None, Parameter(name="--set", negative=())]


@contextmanager
def _training_extra(doing: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("training"):  # our own fault, not a missing extra
            raise
        raise EmbedServeError(
            f"{doing} needs '{error.name}'; install it with `pip install 'embedserve[train]'`.",
            code="missing_extra",
        ) from None


@app.command
def train(
    method: str | None = None,
    /,
    *,
    data: str | None = None,
    out: Path | None = None,
    settings: Assignments = None,
    show: ListSwitch = False,
) -> int:
    """Train an encoder on your images. The same command goes on where an interrupted run stopped.

    Args:
        method: What to train with, such as simclr; --list shows all.
        data: Folder of images, list of them (CSV, Parquet, JSONL), WebDataset tars, MNIST or CIFAR files.
        out: The run's folder, such as runs/first.
        settings: A setting, as in epochs=20; repeatable.
        show: Show the methods or, with a method, everything that can be set for it.
    """
    with _training_extra("Training"):
        from training.methods import METHODS, find
        from training.settings import help_for, parse_assignments

        if show and method is None:
            for name, kind in METHODS.items():
                print(f"{name:14}{kind.summary} ({kind.paper})")
            return OK
        if method is None:
            raise Usage("Name a method, such as `embedserve train simclr`; --list shows all.")
        kind = find(method)
        if show:
            for section, keys in help_for(kind).items():
                print(f"\n{section}")
                for one in keys:
                    _print_key(one)
            return OK
        if data is None or out is None:
            raise Usage(
                f"Give --data and --out, as in `embedserve train {method} --data photos --out runs/first`."
            )
        from training.train import train as run

        outcome = run(method, data, out, parse_assignments(settings or ()))
    return OK if outcome.finished else INTERRUPTED


def _print_key(one: KeyHelp) -> None:
    print(f"  {one.key + ' = ' + one.default:34}{one.text}")


@app.command(name="eval")
def evaluate(
    name: str | None = None,
    encoder: str | None = None,
    /,
    *,
    data: str | None = None,
    out: Path | None = None,
    settings: Assignments = None,
    device: str = "auto",
    show: ListSwitch = False,
    json: Switch = False,
) -> int:
    """Measure an encoder, with a JSON file and a picture as the result.

    Args:
        name: What to measure, such as knn; --list shows all.
        encoder: A run's folder, a checkpoint, the folder of a bundle, or 'starter'.
        data: Images, as for `train`; those that the run was trained on when left out.
        out: Where the results go; the folder 'eval' in the run when left out.
        settings: A setting, as in k=10; repeatable.
        device: auto, cpu, cuda or cuda:0.
        show: Show what can be measured or, with a name, what can be set for it.
        json: Print JSON only.
    """
    with _training_extra("Evaluation"):
        from training.evaluate import EVALUATIONS, find
        from training.evaluate import command as evaluation_command
        from training.settings import help_for_class, parse_assignments

        if show and name is None:
            for key, one in EVALUATIONS.items():
                print(f"{key:17}{one.summary}")
            return OK
        if name is None:
            raise Usage("Name what to measure, as in `embedserve eval knn runs/first`; --list shows all.")
        evaluation = find(name)
        if show:
            for key_help in help_for_class(evaluation.Settings):
                _print_key(key_help)
            return OK
        if encoder is None:
            raise Usage(f"Name the encoder, as in `embedserve eval {name} runs/first`.")
        with progress_bar(name, hidden=json) as progress:
            done = evaluation_command.evaluate(
                evaluation,
                encoder,
                data=data,
                out=out,
                given=parse_assignments(settings or ()),
                device=device,
                progress=progress,
            )
    if json:
        print_json(done.document())
    else:
        print(done.result.summary())
        note(f"written: {done.json_file} and {done.picture_file}")
    return OK


@app.command
def export(source: str, /, *, out: Path) -> int:
    """Write an encoder bundle, and prove it against the network it was made from.

    Args:
        source: What to export; 'starter' builds the bundled encoder anew.
        out: The bundle's folder.
    """
    with _training_extra("Exporting"):
        from training.export import export as write

        bundle = write(source, out)
    print(f"{bundle.name}: {bundle.dim} numbers, written to '{bundle.folder}'")
    return OK
