"""The page at `/` and the API documentation at `/docs`: local files, so both work without internet."""

from __future__ import annotations

import html
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from starlette.responses import FileResponse, HTMLResponse
from starlette.staticfiles import StaticFiles

from embedserve.errors import NotFound

__all__ = ["install", "router"]

PAGE = Path(str(resources.files("embedserve"))) / "page"
SWAGGER = Path(str(resources.files("fastapi_offline"))) / "static"

DOCS = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="favicon.ico">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; its contents are <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  docExpansion: "list",
  presets: [SwaggerUIBundle.presets.apis],
});
"""
"""In a file of its own, because the page's content security policy runs no inline scripts."""

REVALIDATE = {"Cache-Control": "no-cache"}
"""Files keep their names over releases, so browsers ask whether they have changed (304 when not)."""

router = APIRouter(include_in_schema=False)


class _Files(StaticFiles):
    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they came
        response.headers.update(REVALIDATE)
        return response


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    return _file(PAGE / "index.html")


@router.api_route("/favicon.ico", methods=["GET", "HEAD"])
async def icon() -> Response:
    return _file(PAGE / "icon.svg")


@router.get("/docs/start.js")
async def start() -> Response:
    return Response(START, media_type="text/javascript", headers=REVALIDATE)


@router.get("/docs")
async def docs() -> Response:
    return HTMLResponse(DOCS.format(title=html.escape("EmbedServe API")))


def _file(path: Path) -> Response:
    if not path.is_file():
        raise NotFound(f"This installation lacks '{path.name}' of the page; the API works. See /docs.")
    return FileResponse(path, headers=REVALIDATE)


def install(app: FastAPI) -> None:
    """Adds the page and the documentation to `app`."""
    app.include_router(router)
    app.mount("/page", _Files(directory=PAGE, check_dir=False), name="page")
    app.mount("/docs", _Files(directory=SWAGGER), name="docs")
