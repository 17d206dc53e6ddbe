"""The verbs that make encoders: `train`, `eval`, `blend`, `export`. The package `training` does the work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from embedserve.cli.base import HERE, INTERRUPTED, OK, Usage, Where, app
from embedserve.cli.terminal import note, print_json, progress_bar
from embedserve.config import Switch
from embedserve.errors import EmbedServeError

if TYPE_CHECKING:
    from training.settings_help import KeyHelp

ListSwitch = Annotated[bool, Parameter(name="--list", negative=())]
Precision = Literal["fp32", "fp16", "int8", "auto"]
Pooling = Literal["auto", "class", "mean"]
Wanted = Literal["auto", "linear", "prototypes"]
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


train_app = App(name="train")
app.command(train_app)


@train_app.default
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
        from training.settings import parse_assignments
        from training.settings_help import help_for

        if show and method is None:
            for name, kind in METHODS.items():
                print(f"{name:14}{kind.summary} ({kind.paper})")
            return OK
        if method is None:
            raise Usage("Name a method, such as `embedserve train simclr`; --list shows all.")
        find(method)  # an unknown one, before what else is missing
        if show:
            for section, keys in help_for(method).items():
                print(f"\n{section}")
                for one in keys:
                    _print_key(one)
            note("\n'32 to 224' follows from your data and machine; a run prints what it takes.")
            return OK
        if data is None or out is None:
            raise Usage(
                f"Give --data and --out, as in `embedserve train {method} --data photos --out runs/first`."
            )
        from training.train import train as run

        outcome = run(method, data, out, parse_assignments(settings or ()))
    return OK if outcome.finished else INTERRUPTED


@train_app.command(name="probe")
def train_probe(
    *,
    collection: str,
    label: str,
    save: str,
    kind: Wanted = "auto",
    where: Where = HERE,
) -> int:
    """Teach an encoder your labels from the labelled items of a collection. Text and torch are not needed.

    The label set is then served by name: `embedserve classify --label-set NAME`, POST /v1/classify.

    Args:
        collection: Its name.
        label: The metadata field that holds the labels; dots go into objects.
        save: The name of the label set; one of that name is replaced.
        kind: prototypes (the mean direction of each label's images), linear (logistic regression), or auto,
            what is right more often on items that were held out.
    """
    from training.probe.saving import train_probe as run

    saved = where.run(lambda client: run(client, collection, label=label, save=save, kind=kind))
    if where.json:
        print_json(saved.document())
    else:
        for line in saved.lines():
            print(line)
        note(f"saved: label set '{save}'; next: embedserve classify IMAGE --label-set {save}")
    return OK


def _print_key(one: KeyHelp) -> None:
    for line in one.lines():
        print(line)


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
        from training.settings import parse_assignments
        from training.settings_help import help_for_class

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
def blend(run: Path, /, *, alpha: float, out: Path) -> int:
    """Write the weights between those that a run began with and those that it learned (WiSE-FT).

    The checkpoint is evaluated and exported like any other: embedserve eval knn OUT, embedserve export OUT.

    Args:
        run: A run that began with trained weights (--set start=…), or a checkpoint of it.
        alpha: 0 for the start to 1 for what was learned; 0.5 is a good first try.
        out: The checkpoint's file, such as half.pt.
    """
    with _training_extra("Blending"):
        from training.blend import blend as write

        write(run, alpha, out)
    print(f"{out}: {1 - alpha:.0%} of the start, {alpha:.0%} of what '{run}' learned")
    return OK


@app.command
def export(
    source: str | None = None,
    /,
    *,
    out: Path | None = None,
    weights: Path | None = None,
    precision: Precision = "fp32",
    calibrate: Path | None = None,
    pooling: Pooling = "auto",
    projection: Switch = False,
    size: int | None = None,
    random: Switch = False,
    show: ListSwitch = False,
    json: Switch = False,
) -> int:
    """Write an encoder bundle, and prove it against the network it was made from.

    Args:
        source: A run or checkpoint of `embedserve train`; open_clip:ARCH/TAG; timm:NAME;
            torchvision:NAME/WEIGHTS; hf:OWNER/NAME or hf:FOLDER; published:NAME; or 'starter', which builds
            the bundled encoder anew.
        out: The bundle's folder.
        weights: A local file with the weights, instead of the library's cache or hub.
        precision: fp32; fp16 for GPUs; int8; or auto, the fastest on this CPU that keeps enough of vectors.
        calibrate: A folder of your images to measure on, instead of the built-in ones.
        pooling: A vision transformer's class token or the mean of its patches; auto: as it was trained.
        projection: A run's projection head as well.
        size: Pixels of a side, for networks that take several.
        random: Random weights, to measure the speed of an architecture.
        show: Show the forms of sources and the published checkpoints.
        json: Print JSON only.
    """
    with _training_extra("Exporting"):
        if show:
            return _list_sources()
        if source is None or out is None:
            raise Usage("Give a source and --out, as in `embedserve export runs/first --out bundles/first`.")
        from training.export import export as write
        from training.export.calibration import from_folder
        from training.export.original import Choices
        from training.export.report import report

        chosen = Choices(weights=weights, random=random, projection=projection, pooling=pooling, size=size)
        bundle = write(
            source,
            out,
            choices=chosen,
            calibration=from_folder(calibrate) if calibrate is not None else None,
            precision=precision,
            say=note if sys.stderr.isatty() and not json else lambda step: None,
        )
    if json:
        described = bundle.description.model_dump(mode="json", exclude={"probe", "files"})
        print_json({"folder": str(bundle.folder), **described})
        return OK
    for line in report(bundle):
        print(line)
    note(f"next: embedserve check {out}, or embedserve serve --encoder {out}")
    return OK


def _list_sources() -> int:
    from training.export import EXAMPLES
    from training.published import rows

    print("sources")
    for example in ("starter", *EXAMPLES.values()):
        print(f"  {example}")
    print("\npublished checkpoints (docs/published.md says where to get each)")
    for row in rows():
        print("  " + "  ".join(f"{value}" for value in row.values() if value))
    return OK
