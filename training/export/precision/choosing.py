"""The rule by which a precision is chosen, and the layers that stay in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from embedserve.errors import EmbedServeError
from training.export.precision.forms import FLOAT16, INT8, Form, layers
from training.export.precision.judging import Inputs, Judged, embed, further, judge, speeds

__all__ = ["LEAST_COSINE", "LEAST_OVERLAP", "Chosen", "Wanted", "choose", "suffices", "tolerated"]

Wanted = Literal["fp32", "fp16", "int8", "auto"]

LEAST_COSINE, LEAST_OVERLAP = 0.98, 0.95
"""Of every vector to its float32 one, and of the ten nearest neighbours: what a precision must keep."""

INDEPENDENT = 0.999999
"""Least cosine between alone and in company, of a form whose vectors do not depend on others in the batch."""

MUCH_FASTER = 1.5
"""How much faster than the fastest independent form one has to be that is not. A server's answer should not
depend on who else asks: measured on ViT-B-32, dynamic int8 gives up that for 6 to 14 %."""

CALIBRATED = 8
"""Inputs of a batch from which the scales of static int8 are found."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a tower's graph computes in from now on.

    Attributes:
        words: 'float32', 'float16' or 'int8', for `Description.precision`.
        path: The file with that graph; the float32 one where that was chosen.
        figures: What was measured of every candidate, for the bundle's parity.
        notes: Sentences a person should read.
    """

    words: str
    path: Path
    figures: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Candidate:
    form: Form
    path: Path
    judged: Judged
    in_float: list[str] = field(default_factory=list)
    """Layers that had to stay in float32."""


def choose(path: Path, wanted: Wanted, inputs: Inputs, folder: Path) -> Chosen:
    """Writes the candidates of a tower into `folder`, measures them, and chooses.

    Args:
        path: The float32 graph.
        wanted: 'fp16' and 'int8' are given where they keep enough; 'auto' takes the fastest of float32 and
            int8 on this machine's CPU that does. Of the forms of int8 those come first in which a vector does
            not depend on its batch.
        inputs: The calibration set. Its neighbours say something only where the network's weights do: random
            weights give all inputs nearly one vector, and nearly everything passes or fails by accident.
        folder: For files, which the caller takes or removes.

    Raises:
        EmbedServeError: float16 or int8 was asked for by name and no form of it keeps enough.
    """
    if wanted == "fp32":
        return Chosen("float32", path, {})
    expected = embed(path, inputs.batches(8))
    forms = (FLOAT16,) if wanted == "fp16" else INT8
    candidates = [one for form in forms if (one := _try(form, path, inputs, expected, folder)) is not None]
    good = [one for one in candidates if suffices(one.judged)]
    rates = speeds([path, *(one.path for one in good)], inputs)
    figures: dict[str, Any] = {
        "rule": f"cosine at least {LEAST_COSINE}, top-10 overlap at least {LEAST_OVERLAP}, then the fastest; "
        f"one whose vectors depend on their batch only if {MUCH_FASTER} times as fast",
        "float32_per_second": round(rates[0], 1),
    }
    for one in candidates:
        figures[one.form.name] = {**one.judged.figures(), "layers_in_float": one.in_float}
    for one, rate in zip(good, rates[1:], strict=True):
        figures[one.form.name] |= {"per_second": round(rate, 1), "times_float32": round(rate / rates[0], 2)}
    if not good:
        if wanted != "auto":
            raise _refused(wanted, candidates)
        note = "No int8 form keeps enough of this encoder's neighbours; it stays in float32."
        return Chosen("float32", path, figures, (note,))
    best, rate = _fastest(list(zip(good, rates[1:], strict=True)))
    if wanted == "auto" and rate <= rates[0]:
        return Chosen("float32", path, figures, ("int8 is no faster here than float32, which was kept.",))
    figures["chosen"] = best.form.name
    if beside := further(best.path, path, inputs):
        figures["outputs"] = beside
    return Chosen(best.form.name.partition(" ")[0], best.path, figures, _notes(best))


def _fastest(timed: Sequence[tuple[_Candidate, float]]) -> tuple[_Candidate, float]:
    independent = [one for one in timed if one[0].judged.batch_cosine >= INDEPENDENT]
    first = max(timed, key=lambda one: one[1])
    if not independent:
        return first
    best = max(independent, key=lambda one: one[1])
    return first if first[1] >= MUCH_FASTER * best[1] else best


def suffices(judged: Judged) -> bool:
    """The rule: what a precision has to keep."""
    return judged.min_cosine >= LEAST_COSINE and judged.top10_overlap >= LEAST_OVERLAP


def tolerated(names: Sequence[str], works: Callable[[Sequence[str]], bool]) -> list[str]:
    """The most layers found by halving that can be changed together.

    What fails is cut in two and each half judged by itself, down to single layers; then the parts that passed
    alone are joined one by one, and a part that the others do not bear is left out.

    Args:
        names: Layers, in the order in which they run.
        works: Whether the network is still good enough with only these changed.
    """
    kept: list[str] = []
    for part in _parts(list(names), works):
        if not kept or works([*kept, *part]):
            kept += part
    return [name for name in names if name in set(kept)]


def _parts(names: list[str], works: Callable[[Sequence[str]], bool]) -> list[list[str]]:
    if not names:
        return []
    if works(names):
        return [names]
    if len(names) == 1:
        return []
    middle = len(names) // 2
    return _parts(names[:middle], works) + _parts(names[middle:], works)


def _try(form: Form, path: Path, inputs: Inputs, expected: Any, folder: Path) -> _Candidate | None:
    """The form with as many layers as the rule allows; None where the graph has none for it."""
    out = folder / f"{path.stem}-{form.name.replace(' ', '-')}.onnx"
    batches = inputs.batches(CALIBRATED)
    if form is FLOAT16:
        form.write(path, out, batches, ())
        return _Candidate(form, out, judge(out, inputs, expected))
    every = layers(path, form)
    found: dict[tuple[str, ...], Judged] = {}

    def judged(names: Sequence[str]) -> Judged:
        key = tuple(names)
        if key not in found:
            _remove(out)
            form.write(path, out, batches, names)
            found[key] = judge(out, inputs, expected)
        return found[key]

    if not every:
        return None
    kept = tolerated(every, lambda names: suffices(judged(names)))
    if not kept:
        return _Candidate(form, out, judged(every), [])
    result = judged(kept)
    if next(reversed(found)) != tuple(kept):  # the file is that of the last trial
        _remove(out)
        form.write(path, out, batches, kept)
    return _Candidate(form, out, result, [name for name in every if name not in set(kept)])


def _remove(out: Path) -> None:
    for file in (out, out.with_name(f"{out.name}.data")):
        file.unlink(missing_ok=True)


def _notes(best: _Candidate) -> tuple[str, ...]:
    notes = []
    if best.in_float:
        notes.append(f"{len(best.in_float)} layers stay in float32, because int8 hurts there.")
    if best.judged.batch_cosine < INDEPENDENT:
        notes.append(
            "An input's vector depends a little on what else is in its batch: cosine "
            f"{best.judged.batch_cosine:.6f} at least between alone and in company."
        )
    return tuple(notes)


def _refused(wanted: Wanted, candidates: Sequence[_Candidate]) -> EmbedServeError:
    tried = "; ".join(
        f"{one.form.name} has cosine {one.judged.min_cosine:.4f} and overlap {one.judged.top10_overlap:.3f}"
        for one in candidates
    )
    return EmbedServeError(
        f"--precision {wanted} is refused: {tried or 'the graph has no layers for it'}; needed are at least "
        f"{LEAST_COSINE} and {LEAST_OVERLAP}. Use --precision fp32 or auto, or your images with --calibrate.",
        code="precision_refused",
    )
