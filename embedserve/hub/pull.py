"""From a repository to a proven bundle, top to bottom."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime as ort

from embedserve.bundle import (
    Bundle,
    Description,
    ImageTower,
    Probe,
    Scoring,
    TextTower,
    check_out,
    new_bundle,
    open_bundle,
    seal,
)
from embedserve.encoder import Encoder
from embedserve.errors import BundleError, EmbedServeError
from embedserve.hub import proof
from embedserve.hub.card import model_card
from embedserve.hub.fetching import Hub, Repository, open_repository
from embedserve.hub.foreign import Foreign, ForeignImages, ForeignTexts
from embedserve.hub.graft import graft_images, graft_texts
from embedserve.hub.graphs import bring_weights, image_face, load, precision, text_face
from embedserve.hub.layouts import recognise
from embedserve.hub.proof import Agreement, Theirs

__all__ = ["Pulled", "Wishes", "pull"]

Precision = Literal["float32", "float16", "quantised"]

USUAL_SCORING = {
    "softmax": Scoring(activation="softmax", logit_scale=100.0),
    "sigmoid": Scoring(activation="sigmoid", logit_scale=117.33, logit_bias=-12.93),
}
"""OpenAI's CLIPs and most others ended training at their clamp of 100; google/siglip-base-patch16-224 at
117.33 and −12.93, other SigLIPs elsewhere."""

MIN_COSINE = {"float32": 0.999, "float16": 0.998, "quantised": 0.95}
"""What the probe forgives another machine: integer kernels saturate on processors without VNNI."""

BATCH_MATTERS = 0.99
"""Below this cosine between alone and in a batch, a person is told."""

SHORTEST_NAME = 4
"""Letters that two repositories' names must share to be called by what they share."""

PROBE_TEXT = "a red circle beside a blue square"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a person may set where the repository is silent or has a choice."""

    variant: str = "fp32"
    name: str | None = None
    activation: Literal["softmax", "sigmoid"] | None = None
    logit_scale: float | None = None
    logit_bias: float | None = None


@dataclass(frozen=True, slots=True)
class Pulled:
    bundle: Bundle
    warnings: tuple[str, ...]
    """Facts that the repository does not tell and that were assumed."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One repository and what is in it."""

    repository: Repository
    layout: str
    foreign: Foreign


@dataclass(frozen=True, slots=True)
class _Plan:
    name: str
    parts: Sequence[_Part]
    images: _Part | None
    """The one with the images."""
    texts: _Part | None


@dataclass(frozen=True, slots=True)
class _Tower:
    """A graph of our contract, written, and what their graph gives."""

    theirs: Theirs
    precision: Precision
    foreign: ForeignImages | ForeignTexts

    def compare(self, encoder: Encoder) -> Agreement:
        exact = self.precision != "quantised"
        if isinstance(self.foreign, ForeignImages):
            return proof.compare_images(encoder, self.theirs, self.foreign, exact=exact)
        return proof.compare_texts(encoder, self.theirs, self.foreign, exact=exact)


def pull(
    sources: Sequence[str],
    out: Path | None,
    wishes: Wishes,
    hub: Hub,
    *,
    say: Callable[[str], None] = lambda step: None,
) -> Pulled:
    """Writes the encoder that `sources` hold to `out` as a bundle, proven against their own graphs.

    Args:
        sources: Repositories ('owner/name' or 'owner/name@revision') or local folders; two where one has the
            images and the other the texts.
        out: New, empty, or the folder of a bundle, which is replaced only once the new one is proven. None: a
            folder here with the encoder's name.
        wishes: Choices.
        hub: Where repositories are.
        say: Called with a sentence before what takes a while.

    Raises:
        NotFound, NotReady: A repository, revision, file or variant is not there or cannot be reached.
        BundleError: A layout, graph or configuration that is not known, or `out` holds something else.
        EmbedServeError: Also when `out` cannot be written.
    """
    if out is not None:
        check_out(out)
    parts = [_read(source, wishes, hub) for source in sources]
    images = _only([part for part in parts if part.foreign.images], "an image tower")
    texts = _only([part for part in parts if part.foreign.texts], "a text tower")
    name = _name(parts, wishes)
    out = Path(name) if out is None else Path(out)
    say(f"Writing '{out}' and comparing it with the graphs it is made from; large models take minutes.")
    try:
        with new_bundle(out) as folder:
            warnings = _write(folder, _Plan(name, parts, images, texts), wishes)
    except OSError as error:
        raise EmbedServeError(
            f"'{out}' cannot be written ({error.strerror or error}); nothing of it was left behind. Free "
            "some space or choose another --out.",
            code="not_writable",
        ) from None
    return Pulled(open_bundle(out, verify=False), warnings)


def _read(source: str, wishes: Wishes, hub: Hub) -> _Part:
    repository = open_repository(source, hub)
    name, layout = recognise(repository)
    try:
        foreign = layout.read(repository, wishes.variant)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of settings with other contents
        raise BundleError(
            f"A settings file of {repository.at} is not as the {name} layout has it "
            f"({type(error).__name__}: {error})."
        ) from error
    return _Part(repository, name, foreign)


def _only(parts: Sequence[_Part], what: str) -> _Part | None:
    if len(parts) > 1:
        names = " and ".join(part.repository.at for part in parts)
        raise BundleError(f"{names} both hold {what}; pull them one by one, into two bundles.")
    return parts[0] if parts else None


def _write(folder: Path, plan: _Plan, wishes: Wishes) -> tuple[str, ...]:
    parts, images, texts = plan.parts, plan.images, plan.texts

    # ---- graphs, and what theirs give ---------------------------------------------------------------
    towers: dict[str, _Tower] = {}
    image_tower = text_tower = None
    if images is not None and images.foreign.images is not None:
        towers["image"], image_tower = _images(images.repository, images.foreign.images, folder)
    if texts is not None and texts.foreign.texts is not None:
        towers["text"], text_tower = _texts(texts.repository, texts.foreign.texts, folder)
    dims = {tower.theirs.dim for tower in towers.values()}
    if len(dims) != 1:
        raise BundleError(
            f"The towers give vectors of different lengths ({', '.join(map(str, sorted(dims)))}), so texts "
            "and images cannot be compared; are these towers of one model?"
        )

    # ---- what the repositories do not say -----------------------------------------------------------
    scoring, warnings = _scoring((texts or parts[0]).foreign.activation, wishes, has_texts=texts is not None)
    licences = {part.repository.name: part.repository.licence() for part in parts}
    for repository in [one for one, licence in licences.items() if licence is None]:
        warnings.append(f"'{repository}' names no licence; ask its authors before you use it.")
    precisions = {which: tower.precision for which, tower in towers.items()}
    description = Description(
        name=plan.name,
        dim=dims.pop(),
        image=image_tower,
        text=text_tower,
        scoring=scoring,
        precision=_precision(precisions, wishes.variant),
        licence=", ".join(dict.fromkeys(one or f"unknown: ask {who}" for who, one in licences.items())),
        source="; ".join(_source(part) for part in parts),
    )

    # ---- proof ---------------------------------------------------------------------------------------
    seal(folder, description)
    agreements, probe = _prove(folder, towers)
    for which, agreement in agreements.items():
        if agreement.batched_cosine < BATCH_MATTERS:
            warnings.append(
                f"The {which} tower computes in integers scaled for a whole batch: a vector depends on what "
                f"else is in its batch (least cosine {agreement.batched_cosine:.4f}). Where that matters, "
                "use fp16 or fp32."
            )

    # ---- the bundle ----------------------------------------------------------------------------------
    description = description.model_copy(
        update={
            "probe": probe.model_copy(
                update={"min_cosine": min(MIN_COSINE[one] for one in precisions.values())}
            ),
            "parity": {which: one.document() for which, one in agreements.items()}
            | {
                "against": f"the repository's own graphs in ONNX Runtime {ort.__version__}, input by input, "
                "preprocessed as the files beside them say"
            },
        }
    )
    (folder / "README.md").write_text(model_card(description, warnings), encoding="utf-8")
    Encoder(seal(folder, description)).prove()
    return tuple(warnings)


def _prove(folder: Path, towers: Mapping[str, _Tower]) -> tuple[dict[str, Agreement], Probe]:
    """Raises BundleError: the vectors are not those of their graphs."""
    encoder = Encoder.load(folder, verify=False)
    agreements = {which: tower.compare(encoder) for which, tower in towers.items()}
    picture = proof.png(proof.images()[1]) if encoder.has_images else None
    return agreements, encoder.make_probe(picture, PROBE_TEXT if encoder.has_text else None)


@contextmanager
def _original(
    model: onnx.ModelProto,
    repository: Repository,
    foreign: ForeignImages | ForeignTexts,
    folder: Path,
    stem: str,
) -> Iterator[Path]:
    """Their graph as a file that ONNX Runtime can load, with its outside weights copied into `folder`.

    A hub's cache keeps files as links to elsewhere, where ONNX Runtime looks for no weights.
    """
    if not bring_weights(model, repository, foreign.label, folder, stem):
        yield foreign.graph
        return
    beside = folder / f".{stem}-original.onnx"
    beside.write_bytes(model.SerializeToString())
    yield beside
    beside.unlink()


def _images(repository: Repository, foreign: ForeignImages, folder: Path) -> tuple[_Tower, ImageTower]:
    model = load(foreign.graph)
    spec = foreign.rules.preprocessing
    face = image_face(model, spec.height, spec.width, foreign.label)
    output = foreign.output.choose([one.name for one in model.graph.output], foreign.label)
    tower = ImageTower(preprocessing=spec)
    with _original(model, repository, foreign, folder, "image") as graph:
        theirs = proof.their_images(graph, face, foreign)
    found = precision(model)
    graft_images(model, face, foreign.rules, output, class_token=theirs.class_token, dim=theirs.dim)
    (folder / tower.file).write_bytes(model.SerializeToString())
    return _Tower(theirs, found, foreign), tower


def _texts(repository: Repository, foreign: ForeignTexts, folder: Path) -> tuple[_Tower, TextTower]:
    model = load(foreign.graph)
    face = text_face(model, foreign.label)
    output = foreign.output.choose([one.name for one in model.graph.output], foreign.label)
    if face.length is not None and face.length != foreign.context_length:
        raise BundleError(
            f"'{foreign.label}' takes texts of {face.length} tokens, but the files beside it say "
            f"{foreign.context_length}; they do not belong together."
        )
    tower = TextTower(
        context_length=foreign.context_length,
        pad_id=foreign.pad_id,
        padding="context" if face.length is not None else foreign.padding,
        cleaning=foreign.cleaning,
    )
    with _original(model, repository, foreign, folder, "text") as graph:
        theirs = proof.their_texts(graph, face, foreign)
    found = precision(model)
    graft_texts(
        model,
        face,
        output,
        pad_id=foreign.pad_id,
        pad_ends_texts=foreign.their_tokens("a")[-1] == foreign.pad_id,
        masked=foreign.masked,
        class_token=theirs.class_token,
        dim=theirs.dim,
    )
    (folder / tower.file).write_bytes(model.SerializeToString())
    (folder / tower.tokenizer).write_text(foreign.tokenizer, encoding="utf-8")
    return _Tower(theirs, found, foreign), tower


def _scoring(
    activation: Literal["softmax", "sigmoid"], wishes: Wishes, *, has_texts: bool
) -> tuple[Scoring, list[str]]:
    usual = USUAL_SCORING[wishes.activation or activation]
    given = {"logit_scale": wishes.logit_scale, "logit_bias": wishes.logit_bias}
    given = {key: value for key, value in given.items() if value is not None}
    scoring = Scoring.model_validate({**usual.model_dump(), **given})
    missing = [
        f"{flag} {getattr(usual, key):g}"
        for key, flag in (("logit_scale", "--logit-scale"), ("logit_bias", "--logit-bias"))
        if key not in given and (key == "logit_scale" or usual.activation == "sigmoid")
    ]
    if not has_texts or not missing:
        return scoring, []
    return scoring, [
        f"The trained scale of similarities is in none of the files; {' and '.join(missing)} "
        f"{'are' if len(missing) > 1 else 'is'} assumed, usual for such models. That shifts zero-shot "
        "probabilities, not their order; vectors and search do not use it."
    ]


def _common_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return next((first[:at] for at, letter in enumerate(first) if last[at : at + 1] != letter), first)


def _name(parts: Sequence[_Part], wishes: Wishes) -> str:
    """Of two repositories what their names begin with, without the loose end: 'clip-ViT-B-32-vision' and
    '…-text' are 'clip-ViT-B-32'."""
    names = [part.repository.name.rpartition("/")[2] for part in parts]
    shared = _common_start(names)
    name = shared if len(shared) >= SHORTEST_NAME else "-".join(names)
    name = wishes.name or name + ("" if wishes.variant == "fp32" else f"-{wishes.variant}")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:128] or "pulled"


def _source(part: _Part) -> str:
    graphs = (part.foreign.images, part.foreign.texts)
    files = ", ".join(one.label for one in graphs if one is not None)
    return f"{part.repository.at} ({part.layout} layout): {files}"


def _precision(found: Mapping[str, Precision], variant: str) -> str:
    quantised = "quantised" if variant in {"fp32", "quantized"} else f"quantised ({variant})"
    spelled = {which: quantised if one == "quantised" else one for which, one in found.items()}
    if len(set(spelled.values())) == 1:
        return next(iter(spelled.values()))
    return ", ".join(f"{which} {one}" for which, one in spelled.items())
