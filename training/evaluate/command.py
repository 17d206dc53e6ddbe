"""`embedserve eval NAME ENCODER`: from texts to an evaluation's result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedserve.errors import InvalidField, closest
from training.captions import CaptionRules
from training.data import open_source
from training.evaluate import Evaluation, Result, command_line, open_encoder
from training.evaluate.encoder import RunEncoder
from training.evaluate.report import Progress
from training.settings import typed_value

__all__ = ["Evaluated", "evaluate"]

OF_DATA = ("group_by", "label_by")
"""Keys that say how the data is read, beside the evaluation's own."""
CAPTIONS = "captions"
"""One more, of evaluations that need captions."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A result and where it was written."""

    result: Result
    json_file: Path
    picture_file: Path

    def document(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return dict(json.loads(self.json_file.read_text()))


def evaluate(
    evaluation: Evaluation[Any],
    path: str,
    *,
    data: str | None,
    out: Path | None,
    given: Mapping[str, str],
    device: str,
    progress: Progress,
) -> Evaluated:
    """Opens the encoder and the data, measures, and writes the results.

    Args:
        path: As `open_encoder` takes it.
        data: As `open_source` takes it; what the run was trained on where it is None.
        out: A folder; 'eval' in the run's folder where it is None, else in the current one.
        given: Settings of the evaluation, and `group_by`, `label_by` and `captions` of the data, as text.

    Raises:
        InvalidField: A bundle without data, an unknown key, or what `Evaluation.run` raises.
    """
    known = [one.name for one in dataclasses.fields(evaluation.Settings)]
    keys = (*known, *OF_DATA, *((CAPTIONS,) if evaluation.captioned else ()))
    for key in given:
        if key not in keys:
            raise InvalidField(
                f"--set {key}: there is no such key for {evaluation.name}; {closest(key, keys)}", param=key
            )
    settings = evaluation.Settings(
        **{key: typed_value(evaluation.Settings, key, value) for key, value in given.items() if key in known}
    )
    encoder = open_encoder(path, device=device)
    as_trained = {"group_by": "", "label_by": ""}
    captions = None
    asked = command_line(evaluation.name, path, data, [f"{key}={value}" for key, value in given.items()])
    if isinstance(encoder, RunEncoder):
        if data in {None, encoder.data}:
            data, as_trained = encoder.data, {"group_by": encoder.group_by, "label_by": encoder.label_by}
            captions = encoder.captions  # the same images, so the same ones are held out
        if out is None and Path(path).is_dir():
            out = Path(path) / "eval"
    if data is None:
        raise InvalidField(f"'{path}' is a bundle and knows no data; name some with --data.", param="data")
    folder = out or Path("eval")
    group_by, label_by = (given.get(key, as_trained[key]) for key in OF_DATA)
    if evaluation.captioned:
        captions = captions or CaptionRules()
        captions = dataclasses.replace(captions, by=given.get(CAPTIONS, captions.by))
    source = open_source(data, group_by=group_by, label_by=label_by, captions=captions)
    result = evaluation.run(encoder, source, settings, folder, progress, command=asked)
    return Evaluated(result, folder / f"{evaluation.name}.json", folder / f"{evaluation.name}.png")
