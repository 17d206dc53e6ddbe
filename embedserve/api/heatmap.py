"""`POST /v1/heatmap`: which parts of an image its vector comes from, or are like a text."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from embedserve.api.bodies import Form, RequestModel, body_kind, parse_model, read_form, read_json
from embedserve.api.failures import json_response
from embedserve.api.inputs import Source, embed, looks
from embedserve.api.openapi import BINARY, answers, body
from embedserve.api.services import Services, check_model, services, unless_gone
from embedserve.encoder import OutputName
from embedserve.errors import EmbedServeError, InvalidField, NotFound
from embedserve.heat import Grid, attention_grid, overlay, require_text_space, similarity_grid
from embedserve.towers import Look

__all__ = ["router"]

router = APIRouter(tags=["embeddings"])

Format = Literal["json", "png"]


class HeatOptions(RequestModel):
    """What is asked of the image."""

    text: str | None = Field(
        None, description="Compare each part with this text; left out: the attention behind the vector."
    )
    head: int | None = Field(None, ge=0, description="One attention head; left out: the mean of all.")
    format: Format = Field("json", description="png: the image in grey, coloured by the map.")
    model: str | None = Field(None, description="The encoder's name, or left out.")


class HeatRequest(HeatOptions):
    image: str = Field(description="base64, a data URI or an http(s) URL.")


class SeenRegion(BaseModel):
    """The part of the image that the grid covers, in fractions of its width and height."""

    left: float
    top: float
    width: float
    height: float


class HeatMap(BaseModel):
    model: str
    kind: Literal["attention", "similarity"]
    rows: int
    columns: int
    values: list[list[float]] = Field(description="Row by row; attention weights, or cosines with the text.")
    low: float
    high: float
    region: SeenRegion = Field(
        description="Encoders crop: the grid covers this part. Beyond 0..1 lies an added border."
    )


@router.post(
    "/v1/heatmap",
    operation_id="heatmap",
    summary="Which parts of an image its vector comes from, or are like a text",
    response_model=HeatMap,
    responses=answers(NotFound, body=True, embeds=True)
    | {
        200: {
            "content": {"image/png": {"schema": BINARY}},
            "description": "The map, as JSON or as a picture.",
        }
    },
    openapi_extra=body(
        HeatRequest,
        form={
            "file": BINARY,
            "text": {"type": "string"},
            "head": {"type": "integer", "minimum": 0},
            "format": {"type": "string", "enum": ["json", "png"]},
            "model": {"type": "string"},
        },
        required=("file",),
        examples={"attention": {"image": "https://example.com/apple.jpg", "format": "png"}},
    ),
)
async def heatmap(request: Request) -> Response:
    """Needs an encoder that offers `attention` (without a text), or `patches` in the space of texts."""
    parts = services(request)
    asked: HeatOptions
    if body_kind(request, "json", "form") == "json":
        asked = body_asked = await read_json(request, HeatRequest)
        source = Source.image(body_asked.image, "image")
    else:
        form = (await read_form(request, parts.limits)).only(["file", *HeatOptions.model_fields])
        asked = parse_model(HeatOptions, form.fields(skip=["file"]), lax=True)
        source = _file(form)
    check_model(parts, asked.model)
    look, grid = await unless_gone(request, _map(parts, source, asked))
    if asked.format == "png":
        return Response(overlay(look.pixels, grid), media_type="image/png")
    return json_response(_render(parts, look, grid, asked))


async def _map(parts: Services, source: Source, asked: HeatOptions) -> tuple[Look, Grid]:
    encoder = parts.towers.encoder
    if asked.text is None:
        outputs = encoder.require_output("attention")
        look = await _look(parts, source, "attention")
        return look, attention_grid(look.outputs["attention"], outputs, asked.head)
    if asked.head is not None:
        raise InvalidField("'head' is for the attention; leave 'text' or 'head' out.", param="head")
    outputs = encoder.require_output("patches")
    require_text_space(outputs)
    (vector,) = await embed(parts, [Source.text(asked.text, "text")])
    if isinstance(vector, EmbedServeError):
        raise vector
    look = await _look(parts, source, "patches")
    return look, similarity_grid(look.outputs["patches"], outputs, vector)


async def _look(parts: Services, source: Source, name: OutputName) -> Look:
    (look,) = await looks(parts, [source], [name])
    if isinstance(look, EmbedServeError):
        raise look
    return look


def _file(form: Form) -> Source:
    files = form.all("file")
    if len(files) != 1 or isinstance(files[0].value, str):
        raise InvalidField(
            f"The form has {len(files)} parts 'file'; send one picture (with curl: -F file=@photo.jpg).",
            param="file",
        )
    return Source.image(files[0].value, "file")


def _render(parts: Services, look: Look, grid: Grid, asked: HeatOptions) -> dict[str, Any]:
    seen = look.region
    return HeatMap(
        model=parts.towers.encoder.name,
        kind="attention" if asked.text is None else "similarity",
        rows=grid.shape[0],
        columns=grid.shape[1],
        values=grid.tolist(),
        low=float(grid.min()),
        high=float(grid.max()),
        region=SeenRegion(left=seen.left, top=seen.top, width=seen.width, height=seen.height),
    ).model_dump()
