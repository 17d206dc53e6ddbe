"""`POST /v1/classify`: images against labels in words, and the saved label sets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from embedserve.api.bodies import Form, RequestModel, body_kind, json_field, parse_model, read_form, read_json
from embedserve.api.embed import answer_each, error_result
from embedserve.api.failures import json_response
from embedserve.api.inputs import Source, check_count, embed
from embedserve.api.openapi import BINARY, Failure, answers, body
from embedserve.api.services import Services, check_model, services, unless_gone
from embedserve.classify import Activation, LabelSet, check_labels, check_templates
from embedserve.errors import EmbedServeError, InvalidField, NotFound

__all__ = ["router"]

router = APIRouter(tags=["classification"])

Labels = list[str] | dict[str, list[str]]


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
    cosine: float


class ClassifyResult(BaseModel):
    """`labels`, the most probable first, or `error`."""

    index: int
    labels: list[ScoredLabel] | None = None
    error: Failure | None = None


class ClassifyAnswer(BaseModel):
    model: str
    results: list[ClassifyResult]


class LabelSetBody(RequestModel):
    """What to save."""

    labels: Labels
    templates: list[str] | None = Field(None, description="The default set when left out.")
    activation: Activation | None = Field(None, description="The encoder's own when left out.")


class SavedLabelSet(BaseModel):
    name: str
    labels: dict[str, list[str]]
    templates: list[str]
    activation: Literal["softmax", "sigmoid"] | None


class LabelSetList(BaseModel):
    label_sets: list[str]


@router.post(
    "/v1/classify",
    operation_id="classify",
    summary="Label images with words (zero-shot)",
    response_model=ClassifyAnswer,
    responses=answers(NotFound, body=True, embeds=True),
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


async def _labels(parts: Services, options: ClassifyOptions) -> LabelSet:
    """The labels asked for, with the request's own templates and activation where it has them."""
    parts.classifier.check_text()
    if (options.labels is None) == (options.label_set is None):
        raise InvalidField(
            "Give either 'labels' or 'label_set'"
            + (", not both." if options.labels is not None else "; neither is there."),
            param="labels",
        )
    if options.label_set is not None:
        saved = await asyncio.to_thread(parts.label_sets.get, options.label_set)
        templates = check_templates(options.templates) if options.templates is not None else saved.templates
        return LabelSet(saved.labels, templates, options.activation or saved.activation)
    labels = check_labels(options.labels or [], parts.limits.max_inputs)
    return LabelSet(labels, check_templates(options.templates), options.activation)


async def _classify(
    parts: Services, sources: Sequence[Source], labels: LabelSet, top: int | None
) -> list[list[dict[str, Any]] | EmbedServeError]:
    label_vectors, embedded = await asyncio.gather(
        parts.classifier.label_vectors(labels.labels, labels.templates), embed(parts, sources)
    )
    good = [vector for vector in embedded if not isinstance(vector, EmbedServeError)]
    if not good:
        return [vector for vector in embedded if isinstance(vector, EmbedServeError)]
    scored = iter(
        parts.classifier.score(
            np.stack(good), list(labels.labels), label_vectors, activation=labels.activation, top=top
        )
    )
    return [
        vector if isinstance(vector, EmbedServeError) else [asdict(label) for label in next(scored)]
        for vector in embedded
    ]


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
    response_model=SavedLabelSet,
    responses=answers(NotFound),
)
async def get_label_set(request: Request, name: str) -> Response:
    saved = await asyncio.to_thread(services(request).label_sets.get, name)
    return json_response(_render(name, saved))


@router.put(
    "/v1/labelsets/{name}",
    operation_id="putLabelSet",
    summary="Save labels, prompts and templates under a name",
    response_model=SavedLabelSet,
    responses=answers(body=True) | {201: {"model": SavedLabelSet, "description": "The name is new."}},
    openapi_extra=body(
        LabelSetBody, examples={"pets": {"labels": {"cat": ["a cat", "a kitten"], "dog": ["a dog"]}}}
    ),
)
async def put_label_set(request: Request, name: str) -> Response:
    """Replaces a set of that name. It is on disk when the answer comes."""
    parts = services(request)
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


def _render(name: str, saved: LabelSet) -> dict[str, Any]:
    return {"name": name, **asdict(saved)}
