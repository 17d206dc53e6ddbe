"""What an encoder is worth, measured: one file for each evaluation.

    encoder = open_encoder("runs/mine")                        # or a bundle
    evaluation = find("knn")
    result = evaluation.run(encoder, open_source("photos/"), evaluation.Settings(), Path("runs/mine/eval"))
    print(result.summary())

An evaluation is a function from an encoder, a source and its settings to a result, a dataclass of figures
that draws its own picture. `Evaluation.run` times it and writes `<name>.json` and `<name>.png`.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from embedserve.errors import NotFound, closest
from training.data import Source
from training.evaluate.attention import AttentionSettings, evaluate_attention
from training.evaluate.captions import CaptionsSettings, evaluate_captions
from training.evaluate.dense import DenseSettings, evaluate_dense
from training.evaluate.encoder import EvaluationEncoder, open_encoder
from training.evaluate.finetune import FinetuneSettings, evaluate_finetune
from training.evaluate.knn import KnnSettings, evaluate_knn
from training.evaluate.linear import LinearSettings, evaluate_linear
from training.evaluate.near_duplicates import DuplicatesSettings, evaluate_near_duplicates
from training.evaluate.report import (
    Progress,
    Result,
    figures,
    folder_for,
    silent,
    write_json,
    write_picture,
)
from training.evaluate.retrieval import RetrievalSettings, evaluate_retrieval
from training.evaluate.semi_supervised import SemiSettings, evaluate_semi_supervised
from training.evaluate.zero_shot import ZeroShotSettings, evaluate_zero_shot, store_zero_shot

__all__ = ["EVALUATIONS", "Evaluation", "EvaluationEncoder", "Result", "find", "open_encoder"]

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Evaluation(Generic[S]):
    """One way to measure an encoder."""

    name: str
    summary: str
    """One line for `embedserve eval --list`."""
    Settings: type[S]
    """A frozen dataclass; each field is a key of `--set`."""
    measure: Callable[[EvaluationEncoder, Source, S, Progress], Result]
    keep: Callable[[EvaluationEncoder, S, Any, dict[str, Any]], None] | None = None
    """Puts into the encoder what its settings ask to be kept there, with how it was measured."""
    captioned: bool = False
    """Whether it needs captions."""

    def run(
        self,
        encoder: EvaluationEncoder,
        source: Source,
        settings: S,
        out: Path,
        progress: Progress = silent,
        *,
        command: str = "",
    ) -> Result:
        """Measures, and writes `<out>/<name>.json` and `<out>/<name>.png`.

        Args:
            encoder: From `open_encoder`.
            source: From `training.data.open_source`.
            settings: An instance of `Settings`.
            out: A folder; made where it is missing.
            progress: Called with how much is done, and of how much; some evaluations have several passes.
            command: What was typed, for the record; told from the arguments where it is empty.

        Raises:
            InvalidField: The data or the encoder lacks what is needed, or a setting makes no sense.
            EmbedServeError: The results cannot be written.
        """
        folder_for(out)  # before hours of work, not after them
        started = time.perf_counter()
        result = self.measure(encoder, source, settings, progress)
        document = {
            "evaluation": self.name,
            "command": command or self._command(encoder, source, settings),
            "encoder": encoder.name,
            "device": str(encoder.device),
            "data": source.name,
            "images": len(source),
            "seconds": round(time.perf_counter() - started, 3),
            "settings": dataclasses.asdict(settings),  # type: ignore[call-overload]
            "result": figures(result),
        }
        write_json(out / f"{self.name}.json", document)
        write_picture(out / f"{self.name}.png", result.picture())
        if self.keep is not None:
            self.keep(encoder, settings, result, {key: document[key] for key in ("command", "data")})
        return result

    def _command(self, encoder: EvaluationEncoder, source: Source, settings: S) -> str:
        changed = [
            f"{one.name}={getattr(settings, one.name)}"
            for one in dataclasses.fields(settings)  # type: ignore[arg-type]
            if getattr(settings, one.name) != one.default
        ]
        return command_line(self.name, encoder.name, source.name, changed)


def command_line(name: str, encoder: str, data: str | None, settings: Sequence[str]) -> str:
    """`embedserve eval …` as it can be pasted into a shell."""
    words = ["embedserve", "eval", name, encoder, *(("--data", data) if data else ())]
    return shlex.join([*words, *(word for one in settings for word in ("--set", one))])


EVALUATIONS: dict[str, Evaluation[Any]] = {
    "knn": Evaluation("knn", "weighted vote of the nearest labelled images", KnnSettings, evaluate_knn),
    "linear": Evaluation("linear", "a linear layer on frozen features", LinearSettings, evaluate_linear),
    "semi_supervised": Evaluation(
        "semi_supervised", "1% and 10% of the labels", SemiSettings, evaluate_semi_supervised
    ),
    "finetune": Evaluation(
        "finetune", "the whole network trained on the labels", FinetuneSettings, evaluate_finetune
    ),
    "retrieval": Evaluation(
        "retrieval", "whether neighbours share a group or a label", RetrievalSettings, evaluate_retrieval
    ),
    "zero_shot": Evaluation(
        "zero_shot",
        "class names in words instead of labelled images; whether probabilities can be believed",
        ZeroShotSettings,
        evaluate_zero_shot,
        store_zero_shot,
    ),
    "captions": Evaluation(
        "captions",
        "images find their captions, captions their images",
        CaptionsSettings,
        evaluate_captions,
        captioned=True,
    ),
    "near_duplicates": Evaluation(
        "near_duplicates",
        "altered copies find their originals; needs no labels",
        DuplicatesSettings,
        evaluate_near_duplicates,
    ),
    "dense": Evaluation(
        "dense",
        "patch features segment objects and find them again; needs images with transparency",
        DenseSettings,
        evaluate_dense,
    ),
    "attention": Evaluation(
        "attention",
        "where a vision transformer's class token looks; needs no labels",
        AttentionSettings,
        evaluate_attention,
    ),
}
"""Name → evaluation."""


def find(name: str) -> Evaluation[Any]:
    """The evaluation of that name. Raises NotFound with the closest one."""
    if name not in EVALUATIONS:
        raise NotFound(f"There is no evaluation '{name}'; {closest(name, EVALUATIONS)}", param="name")
    return EVALUATIONS[name]
