"""Networks become encoder bundles: `embedserve export SOURCE --out FOLDER`.

original.py       what a source hands over: the network as PyTorch has it, and all that serving must know
sources/          one module for each library that networks come from
towers.py         pixels and token ids in, unit vectors out
graphs.py         PyTorch → ONNX
calibration.py    the images and texts that everything is measured on
parity.py         serving against PyTorch
precision/        float16 and int8, by measurement
report.py         what a person reads after it
write.py          all of it together, in a folder that appears whole or not at all
card.py           the model card
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedserve.bundle import Bundle, check_out
from embedserve.errors import InvalidField, closest

if TYPE_CHECKING:
    from training.export.calibration import Calibration
    from training.export.original import Choices
    from training.export.precision import Wanted

__all__ = ["RUN", "SOURCES", "STARTER", "export"]

STARTER, RUN = "starter", "run"

SOURCES: dict[str, str] = {
    STARTER: "training.starter.build",
    "open_clip": "training.export.sources.open_clip",
    "timm": "training.export.sources.timm",
    "torchvision": "training.export.sources.torchvision",
    "hf": "training.export.sources.hugging_face",
    "published": "training.export.sources.published",
    RUN: "training.export.sources.runs",
}
"""What stands before the colon of a source → the module that knows it. 'starter' stands alone, and a path
is a run or checkpoint of `embedserve train` without saying so."""

LOOKED_AT: dict[str, frozenset[str]] = {
    STARTER: frozenset(),
    "open_clip": frozenset({"weights", "random", "pooling"}),
    "timm": frozenset({"weights", "random", "pooling", "size"}),
    "torchvision": frozenset({"weights", "random", "pooling", "size"}),
    "hf": frozenset({"weights", "random", "pooling"}),
    "published": frozenset({"weights", "random", "pooling", "projection"}),
    RUN: frozenset({"weights", "random", "pooling", "size", "projection"}),
}
"""Which of `Choices` a source looks at, be it to refuse a value. Others are refused here: none is ignored."""


def export(
    source: str,
    out: Path,
    *,
    choices: Choices | None = None,
    calibration: Calibration | None = None,
    precision: Wanted = "fp32",
    say: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Writes the encoder bundle of `source` to the folder `out`, replacing a bundle that is there.

    Args:
        source: 'starter', one of `SOURCES` with what it should fetch behind a colon, or the path of a run or
            checkpoint.
        out: New, empty, or the folder of a bundle. It is replaced only once the new bundle is complete.
        choices: What may be chosen about a source; its defaults otherwise.
        calibration: What serving is compared with PyTorch on; a built-in set otherwise.
        precision: What to compute in: 'fp32', 'fp16' (for GPUs), 'int8', or 'auto', which takes the fastest
            on this machine's CPU that keeps enough of the vectors.
        say: Told what is being done, before each step that takes a while.

    Raises:
        InvalidField: The source is unknown, or a choice does not suit it.
        NotFound: There is nothing of that name.
        BundleError: `out` holds something else, or an ingredient is missing.
        EmbedServeError: The graph departs from the network, code `departs`; weights cannot be fetched; or the
            network cannot be written as a graph.
        ModuleNotFoundError: torch or another package of the extra `train` is not installed.
    """
    out = Path(out)
    check_out(out)  # before anything is downloaded or computed
    scheme, rest = _parsed(source)
    given = [] if choices is None else list(_given(choices))
    _refuse_ignored(scheme, given, precision, calibration)
    say("Reading the network")
    module: Any = importlib.import_module(SOURCES[scheme])
    if scheme == STARTER:
        bundle: Bundle = module.build(out)
        return bundle
    from training.export.calibration import built_in
    from training.export.original import Choices
    from training.export.write import write

    original = module.original(rest, choices or Choices())
    return write(
        original,
        out,
        calibration=calibration or built_in(),
        precision=precision,
        command=_command(scheme, rest, given, precision),
        say=say,
    )


def _given(choices: Choices) -> Iterator[tuple[str, Any]]:
    """The choices that are not their defaults."""
    for one in fields(choices):
        value = getattr(choices, one.name)
        if value != one.default:
            yield one.name, value


def _refuse_ignored(
    scheme: str, given: Sequence[tuple[str, Any]], precision: Wanted, calibration: Calibration | None
) -> None:
    names = [name for name, _ in given if name not in LOOKED_AT[scheme]]
    if scheme == STARTER:  # built by a recipe of its own
        names += ["precision"] if precision != "fp32" else []
        names += ["calibrate"] if calibration is not None else []
    for name in names:
        takes = ", ".join(f"--{one}" for one in sorted(LOOKED_AT[scheme])) or "no choices"
        raise InvalidField(
            f"--{name} means nothing for a source of the kind '{scheme}', which takes {takes}; leave it out.",
            param=name,
        )


def _command(scheme: str, rest: str, given: Sequence[tuple[str, Any]], precision: Wanted) -> str:
    """What was typed, for the model card, without the folders of this machine."""
    words = ["embedserve export", _without_folders(scheme, rest)]
    for name, value in given:
        words += [f"--{name}"] if value is True else [f"--{name}", getattr(value, "name", str(value))]
    if precision != "fp32":
        words += ["--precision", precision]
    return " ".join(words)


def _without_folders(scheme: str, rest: str) -> str:
    if scheme == RUN:
        return Path(rest).name
    head, slash, tail = rest.partition("/")
    if Path(rest).exists():  # a folder of Hugging Face
        return f"{scheme}:{Path(rest).name}"
    if slash and Path(tail).exists():  # a local checkpoint in the place of a tag
        return f"{scheme}:{head}/{Path(tail).name}"
    return f"{scheme}:{rest}"


def _parsed(source: str) -> tuple[str, str]:
    """Which of `SOURCES`, and what it should fetch."""
    if source == STARTER:
        return STARTER, ""
    scheme, colon, rest = source.partition(":")
    if colon and scheme in SOURCES and scheme != STARTER:
        if not rest:
            raise _unknown(
                f"'{source}' does not say what to export; it goes on behind the colon, as in {_form(scheme)}."
            )
        return scheme, rest
    path = Path(source).expanduser()
    if path.exists():
        if (path / "model.safetensors").exists() or (path / "pytorch_model.bin").exists():
            raise _unknown(f"'{source}' is a folder of Hugging Face; export it as 'hf:{source}'.")
        return RUN, str(path)
    if colon:
        raise _unknown(f"There is no kind of source '{scheme}'; {closest(scheme, SOURCES)}")
    raise _unknown(f"'{source}' cannot be exported; {closest(source, SOURCES)} A path has to exist.")


EXAMPLES = {
    "open_clip": "open_clip:ViT-B-32/laion2b_s34b_b79k",
    "timm": "timm:vit_small_patch14_dinov2.lvd142m",
    "torchvision": "torchvision:resnet50/IMAGENET1K_V2",
    "hf": "hf:facebook/dinov2-small",
    "published": "published:moco_v2/resnet50-800ep",
    RUN: "run:runs/first",
}


def _form(scheme: str) -> str:
    return f"'{EXAMPLES[scheme]}'"


def _unknown(message: str) -> InvalidField:
    return InvalidField(message, param="source", code="unknown_source")
