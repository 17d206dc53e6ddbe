"""`POST /v1/classify`: images against labels in words or a fitted classifier, and the saved label sets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, RootModel
from pydantic_core import from_json

from embedserve.api.bodies import Form, RequestModel, body_kind, json_field, parse_model, read_form, read_json
from embedserve.api.embed import answer_each, error_result
from embedserve.api.failures import json_response
from embedserve.api.inputs import Source, check_count, embed
from embedserve.api.openapi import BINARY, Failure, answers, body
from embedserve.api.services import Services, check_model, services, unless_gone
from embedserve.classify import Scored, linear_scores
from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound
from embedserve.label_sets import (
    Activation,
    Fitted,
    LabelSet,
    LinearLabelSet,
    ProbeKind,
    as_json,
    check_encoder,
    check_labels,
    check_templates,
    linear_label_set,
)
from embedserve.prefix import shorten

__all__ = ["router"]

router = APIRouter(tags=["classification"])

Labels = list[str] | dict[str, list[str]]
Vector = NDArray[np.float32]


class ClassifyRequest(RequestModel):
    images: list[str] = Field(min_length=1, description="Base64, data URIs or http(s) URLs.")
    labels: Labels | None = Field(
        None, description="Words to choose from, or each with the phrases that mean it. Or `label_set`."
    )
    label_set: str | None = Field(None, description="The name of saved labels.")
    templates: list[str] | None = Field(
        None, description="Each holds `{}` once, where the label goes. A default set when left out."
    )
    top: int | None = Field(5, ge=1, description="So many labels for each image; null for all.")
    activation: Activation | None = Field(None, description="The encoder's own when left out.")
    model: str | None = None


class ClassifyOptions(RequestModel):
    """The fields of the form that are no images."""

    labels: Labels | None = None
    label_set: str | None = None
    templates: list[str] | None = None
    top: int | None = Field(5, ge=1)
    activation: Activation | None = None
    model: str | None = None


class ScoredLabel(BaseModel):
    label: str
    probability: float
    cosine: float = Field(description="Of the image's vector and the label's: its prompts, or its weights.")


class ClassifyResult(BaseModel):
    """`labels`, the most probable first, or `error`."""

    index: int
    labels: list[ScoredLabel] | None = None
    error: Failure | None = None


class ClassifyAnswer(BaseModel):
    model: str
    results: list[ClassifyResult]


class LabelSetBody(RequestModel):
    """Labels as words."""

    labels: Labels
    templates: list[str] | None = Field(None, description="The default set when left out.")
    activation: Activation | None = Field(None, description="The encoder's own when left out.")


class FittedBody(RequestModel):
    """How a linear set was fitted. Figures are of images that were held out, each once."""

    kind: ProbeKind
    counts: dict[str, int] = Field(description="Label → images it was fitted to, in the labels' order.")
    judged: int = Field(0, description="Images that were held out, each once, to be judged.")
    accuracy: float | None = Field(None, description="Share of those named right; null where none was.")
    ece: float | None = Field(None, description="Their expected calibration error; null where none was.")
    collection: str | None = None
    field: str | None = None


class LinearLabelSetBody(RequestModel):
    """Labels as a linear classifier on the encoder's vectors: softmax(weights · vector + bias)."""

    kind: Literal["linear"]
    labels: list[str]
    dim: int = Field(description="Numbers of each label; the leading ones of a vector where it has more.")
    weights: str = Field(description="Base64 of little-endian float32, label after label.")
    bias: list[float]
    encoder: str = Field(description="The name of the encoder that the vectors are of.")
    fingerprint: str = Field(description="Its fingerprint, as collections of it have.")
    fitted: FittedBody


class LabelSetRequest(RootModel[LabelSetBody | LinearLabelSetBody]):
    """What to save."""


class SavedLabelSet(BaseModel):
    """Labels as words."""

    name: str
    labels: dict[str, list[str]]
    templates: list[str]
    activation: Activation | None


class SavedLinearLabelSet(LinearLabelSetBody):
    """Labels as a linear classifier."""

    name: str


AnyLabelSet = SavedLabelSet | SavedLinearLabelSet


class LabelSetList(BaseModel):
    label_sets: list[str]


@router.post(
    "/v1/classify",
    operation_id="classify",
    summary="Label images, with words (zero-shot) or a saved label set",
    response_model=ClassifyAnswer,
    responses=answers(NotFound, Conflict, body=True, embeds=True),
    openapi_extra=body(
        ClassifyRequest,
        form={
            "image": {"type": "array", "items": BINARY},
            "labels": {"type": "string", "description": "cat,dog or JSON."},
            "label_set": {"type": "string"},
            "templates": {"type": "array", "items": {"type": "string"}},
            "top": {"type": "integer", "minimum": 1},
            "activation": {"type": "string", "enum": ["softmax", "sigmoid"]},
            "model": {"type": "string"},
        },
        required=("image",),
        examples={
            "labels": {"images": ["https://example.com/pet.jpg"], "labels": ["cat", "dog"]},
            "prompts": {
                "images": ["https://example.com/pet.jpg"],
                "labels": {"cat": ["a cat", "a kitten"], "dog": ["a dog", "a puppy"]},
                "templates": ["a photo of {}."],
            },
        },
    ),
)
async def classify_images(request: Request) -> Response:
    """200 when any image could be classified, else the status of the first one's error."""
    parts = services(request)
    if body_kind(request, "json", "form") == "json":
        asked = await read_json(request, ClassifyRequest)
        options = ClassifyOptions(**asked.model_dump(exclude={"images"}))
        sources = [Source.image(image, f"images[{i}]") for i, image in enumerate(asked.images)]
        check_count(len(sources), parts.limits, "images", what="images")
    else:
        form = await read_form(request, parts.limits)
        options = parse_model(ClassifyOptions, _options(form), lax=True)
        images = form.all("image", "file")
        sources = [Source.image(part.value, f"{part.name}[{i}]") for i, part in enumerate(images)]
        check_count(len(sources), parts.limits, "image", what="images")
    check_model(parts, options.model)
    labels = await _labels(parts, options)
    results = await unless_gone(request, _classify(parts, sources, labels, options.top))
    rendered = [
        error_result(index, result)
        if isinstance(result, EmbedServeError)
        else {"index": index, "labels": result}
        for index, result in enumerate(results)
    ]
    return answer_each(results, rendered, {"model": parts.towers.encoder.name})


def _options(form: Form) -> dict[str, Any]:
    form.only(["image", "file", *ClassifyOptions.model_fields])
    found = form.fields(skip=["image", "file", "templates", "labels"])
    texts = {
        name: [part.value if isinstance(part.value, str) else part.value.decode() for part in form.all(name)]
        for name in ("labels", "templates")
    }
    if texts["labels"]:
        found["labels"] = _label_field(texts["labels"])
    if texts["templates"]:
        first = texts["templates"][0].lstrip()
        found["templates"] = json_field("templates", first) if first.startswith("[") else texts["templates"]
    return found


def _label_field(given: Sequence[str]) -> Any:
    """`cat,dog`, or JSON, or several fields of one label each."""
    if len(given) > 1:
        return list(given)
    if given[0].lstrip().startswith(("[", "{")):
        return json_field("labels", given[0])
    return [label.strip() for label in given[0].split(",")]


async def _labels(parts: Services, options: ClassifyOptions) -> LabelSet | LinearLabelSet:
    """The labels asked for, with the request's own templates and activation where it has them."""
    if (options.labels is None) == (options.label_set is None):
        raise InvalidField(
            "Give either 'labels' or 'label_set'"
            + (", not both." if options.labels is not None else "; neither is there."),
            param="labels",
        )
    if options.label_set is not None:
        saved = await asyncio.to_thread(parts.label_sets.get, options.label_set)
        if isinstance(saved, LinearLabelSet):
            _check_linear(parts, options, saved)
            return saved
        parts.classifier.check_text()
        templates = check_templates(options.templates) if options.templates is not None else saved.templates
        return LabelSet(saved.labels, templates, options.activation or saved.activation)
    parts.classifier.check_text()
    labels = check_labels(options.labels or [], parts.limits.max_inputs)
    return LabelSet(labels, check_templates(options.templates), options.activation)


def _check_linear(parts: Services, options: ClassifyOptions, saved: LinearLabelSet) -> None:
    check_encoder(saved, parts.towers.encoder.bundle)
    if options.templates is not None:
        raise InvalidField(
            f"The label set '{options.label_set}' was fitted to images and has no words, so 'templates' have "
            "no place; leave them out.",
            param="templates",
        )
    if options.activation == "sigmoid":
        raise InvalidField(
            f"The label set '{options.label_set}' was fitted with a softmax over its labels; leave "
            "'activation' out.",
            param="activation",
        )


async def _classify(
    parts: Services, sources: Sequence[Source], labels: LabelSet | LinearLabelSet, top: int | None
) -> list[list[dict[str, Any]] | EmbedServeError]:
    embedded: Sequence[Vector | EmbedServeError]
    if isinstance(labels, LinearLabelSet):
        embedded = [_shortened(vector, labels.dim) for vector in await embed(parts, sources)]
    else:
        label_vectors, embedded = await asyncio.gather(
            parts.classifier.label_vectors(labels.labels, labels.templates), embed(parts, sources)
        )
    good = [vector for vector in embedded if not isinstance(vector, EmbedServeError)]
    if not good:
        return [vector for vector in embedded if isinstance(vector, EmbedServeError)]
    found: list[list[Scored]]
    if isinstance(labels, LinearLabelSet):
        found = linear_scores(np.stack(good), labels, top=top)
    else:
        found = parts.classifier.score(
            np.stack(good), list(labels.labels), label_vectors, activation=labels.activation, top=top
        )
    scored = iter(found)
    return [
        vector if isinstance(vector, EmbedServeError) else [asdict(label) for label in next(scored)]
        for vector in embedded
    ]


def _shortened(vector: Vector | EmbedServeError, size: int) -> Vector | EmbedServeError:
    if isinstance(vector, EmbedServeError):
        return vector
    try:
        return shorten(vector, size)
    except InvalidField as error:
        return error


@router.get(
    "/v1/labelsets",
    operation_id="listLabelSets",
    summary="Names of the saved label sets",
    response_model=LabelSetList,
    responses=answers(),
)
async def list_label_sets(request: Request) -> Response:
    names = await asyncio.to_thread(services(request).label_sets.names)
    return json_response({"label_sets": names})


@router.get(
    "/v1/labelsets/{name}",
    operation_id="getLabelSet",
    summary="One saved label set",
    response_model=AnyLabelSet,
    responses=answers(NotFound),
)
async def get_label_set(request: Request, name: str) -> Response:
    saved = await asyncio.to_thread(services(request).label_sets.get, name)
    return json_response(_render(name, saved))


@router.put(
    "/v1/labelsets/{name}",
    operation_id="putLabelSet",
    summary="Save labels under a name: words and templates, or a linear classifier",
    response_model=AnyLabelSet,
    responses=answers(Conflict, body=True) | {201: {"model": AnyLabelSet, "description": "The name is new."}},
    openapi_extra=body(
        LabelSetRequest, examples={"pets": {"labels": {"cat": ["a cat", "a kitten"], "dog": ["a dog"]}}}
    ),
)
async def put_label_set(request: Request, name: str) -> Response:
    """Replaces a set of that name. It is on disk when the answer comes."""
    parts = services(request)
    saved: LabelSet | LinearLabelSet
    if await _says_linear(request):
        saved = _linear(parts, await read_json(request, LinearLabelSetBody))
    else:
        asked = await read_json(request, LabelSetBody)
        labels = check_labels(asked.labels, parts.limits.max_inputs)
        saved = LabelSet(labels, check_templates(asked.templates), asked.activation)
    new = await asyncio.to_thread(parts.label_sets.put, name, saved)
    return json_response(_render(name, saved), 201 if new else 200)


@router.delete(
    "/v1/labelsets/{name}",
    operation_id="deleteLabelSet",
    summary="Delete a saved label set",
    status_code=204,
    responses=answers(NotFound),
)
async def delete_label_set(request: Request, name: str) -> Response:
    await asyncio.to_thread(services(request).label_sets.delete, name)
    return Response(status_code=204)


async def _says_linear(request: Request) -> bool:
    """Whether the body is meant as a linear set; what else may be wrong with it is told by its model."""
    try:
        given = from_json(await request.body())
    except ValueError:
        return False
    return isinstance(given, dict) and "kind" in given


def _linear(parts: Services, asked: LinearLabelSetBody) -> LinearLabelSet:
    check_labels(asked.labels, parts.limits.max_inputs)
    fields = asked.model_dump(exclude={"kind", "fitted"})
    saved = linear_label_set(**fields, fitted=Fitted(**asked.fitted.model_dump()))
    check_encoder(saved, parts.towers.encoder.bundle, param="fingerprint")
    return saved


def _render(name: str, saved: LabelSet | LinearLabelSet) -> dict[str, Any]:
    return {"name": name, **as_json(saved)}
